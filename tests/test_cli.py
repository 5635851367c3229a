"""The commands as a user meets them: wrong arguments, bad input, pipes, and what they print."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import BIN, Run
from tests.waiting import SLOW


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "os-release").write_text("NAME=test\n")
    (root / "large").write_bytes(os.urandom(5 << 20))
    os.symlink("etc/os-release", root / "link")
    return root


def test_the_first_path_from_directory_to_content(home: Path, tree: Path, cmd: Run) -> None:
    made = cmd("cafs-index", "create", tree, "-t", "demo:1")
    assert made.returncode == 0 and made.stderr == b"" and len(made.stdout.strip()) == 64
    assert cmd("cafs-index", "ls", "demo:1").stdout.split() == [b"/", b"/etc", b"/etc/os-release", b"/large", b"/link"]
    assert cmd("cafs-index", "ls", "demo:1", "/etc").stdout.split() == [b"/etc", b"/etc/os-release"]
    assert cmd("cafs-index", "cat", "demo:1", "/etc/os-release").stdout == b"NAME=test\n"
    assert cmd("cafs-index", "cat", "demo:1", "/large").stdout == (tree / "large").read_bytes()
    row = json.loads(cmd("cafs-index", "ls", "--json", "demo:1", "/link").stdout)
    assert (row["path"], row["type"], row["target"]) == ("/link", "l", "etc/os-release")
    assert b"-> etc/os-release" in cmd("cafs-index", "ls", "-l", "demo:1").stdout
    index = cmd("cafs-index", "create", tree, "-o", "-").stdout
    assert b" /etc/os-release\n" in index
    piped = cmd("cafs-index", "ls", "-", input=index)
    assert piped.stdout.count(b"\n") == 5
    assert cmd("cafs-index", "stat", "demo:1", "/etc/os-release").stdout in index.splitlines(keepends=True)
    info = json.loads(cmd("cafs-store", "info", "--json").stdout)
    assert (info["refs"], info["images"], info["packs"]) == (1, 1, 1)
    assert cmd("cafs-store", "tag", "demo:1", "other").returncode == 0
    assert cmd("cafs-store", "ls", "-q").stdout == b"demo:1\nother:latest\n"
    assert cmd("cafs-store", "rm", "demo:1").returncode == 0
    assert cmd("cafs-store", "ls").stdout == b""


BAD = [
    (["cafs-index", "create", "{}/missing", "-o", "-"], 4, "cannot index '{}/missing': No such file or directory"),
    (["cafs-index", "create", "{}/file", "-o", "-"], 5, "cannot index '{}/file': tar, at byte 0: not a tar archive"),
    (["cafs-index", "create", "{}/rootfs", "-o", "-", "--json"], 2, "stdout"),
    (["cafs-index", "create", "{}/rootfs", "--hash", "xxh128"], 2, "--hash goes with -o"),
    (["cafs-index", "create", "{}/rootfs", "-t", "Bad:1"], 2, "is not a ref"),
    (["cafs-index", "create", "{}/rootfs", "-o", "{}/no/where"], 4, "cannot write"),
    (["cafs-index", "ls", "{}/file"], 5, "not an index"),
    (["cafs-index", "ls", "{}/newer"], 5, "unknown index version '2'"),
    (["cafs-index", "ls", "{}/missing"], 4, "cannot open index '{}/missing': No such file or directory"),
    (["cafs-index", "ls", "demp:1"], 4, "did you mean 'demo:1'"),
    (["cafs-index", "cat", "demo:1", "/nothing"], 4, "no '/nothing' in 'demo:1'"),
    (["cafs-index", "cat", "demo:1", "/etc"], 2, "is not a regular file"),
    (
        ["cafs-index", "cat", "{}/other-hash", "/f"],
        2,
        "index '{}/other-hash' is of xxh128 and chunks of 4194304, store '{}/store' of",
    ),
    (["cafs-index", "create", "{}/rootfs", "--store", "{}/newer-store"], 5, "store '{}/newer-store' has an unknown format"),
    (["cafs-index", "nonsense"], 2, "nonsense"),
    (["cafs-store", "untag", "x:1"], 4, "no ref 'x:1'"),
    (["cafs-store", "info", "--store", "{}/rootfs"], 4, "not a store"),
    (["cafs-index", "create", "{}/rootfs", "--store", "{}/rootfs"], 4, "not a store"),
    (["cafs-store", "info", "--store", "s3://UPPER/x"], 2, "is not s3://BUCKET"),
    (["cafs-store", "info", "--store", "ftp://host/x"], 2, "unknown scheme 'ftp'"),
    (
        ["cafs-store", "info", "--store", "http://127.0.0.1:9/x"],
        7,
        "cannot read 'cafs-store.json' of store 'http://127.0.0.1:9/x'",
    ),
    (["cafs-mount", "demo:1"], 2, "IMAGE and DIR"),
    (["cafs-store", "push", "demo:1", "host:/srv/store"], 2, "'host:/srv/store' is not the address of a store"),
    (["cafs-store", "pull", "demo:1", "s3:bucket"], 2, "'s3:bucket' is not the address of a store"),
    (["cafs-store", "ls", "--store", ""], 2, "an unset variable?"),
    (["cafs-mount", "--store", "", "demo:1", "{}"], 2, "an unset variable?"),
    (["cafs-index", "export", "demo:1", "host:/srv/x"], 2, "unknown kind 'host'"),
    (["cafs-index", "export", "demo:1", "oci-archve:x"], 2, "did you mean oci-archive:?"),
    (["cafs-index", "export", "demo:1", "s3://bucket/x"], 2, "unknown kind 's3'"),
    (["cafs-index", "export", "demo:1", "{}/x.tar.gz"], 2, "a tar is written uncompressed"),
]


@pytest.mark.parametrize(("command", "code", "said"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_input_is_one_clear_line_and_its_exit_code(
    home: Path, tree: Path, tmp_path: Path, cmd: Run, command: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("text\n")
    (tmp_path / "newer").write_text("cafs-index 2 sha256 4194304\nend 0\n")
    (tmp_path / "other-hash").write_text(
        f"cafs-index 1 xxh128 4194304\nd 755 0 0 0 - - - - /\nf 644 0 0 0 1 {'a' * 32} - - /f\nend 2\n"
    )
    (tmp_path / "newer-store").mkdir()
    (tmp_path / "newer-store" / "cafs-store.json").write_text('{"chunk_size":4194304,"format":9,"hash":"sha256"}')
    cmd("cafs-index", "create", tree, "-t", "demo:1")
    done = cmd(*[word.replace("{}", str(tmp_path)) for word in command])
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert said.replace("{}", str(tmp_path)) in text
    assert text.startswith(f"{command[0]}: ") and "Traceback" not in text
    assert done.stdout == b""


@pytest.mark.parametrize("program", ["cafs-index", "cafs-store", "cpool"])
def test_a_command_alone_prints_its_help(home: Path, cmd: Run, program: str) -> None:
    done = cmd(program)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and done.stdout == b""
    assert lines[0].startswith(f"Usage: {program}") and max(map(len, lines)) <= 80
    assert done.stderr == cmd(program, "--help").stdout


def test_an_unreadable_file_is_an_error_or_left_out_with_exit_3(home: Path, tree: Path, cmd: Run) -> None:
    # Root reads everything, so what cannot be read here is a name that its directory does not let through.
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "none", tree / "etc"], check=True)
    (tree / "etc" / "secret").write_text("x")
    (tree / "etc" / "secret").chmod(0)
    try:
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
        run = [*drop, str(BIN / "cafs-index"), "create", str(tree), "-o", "-"]
        done = subprocess.run(run, capture_output=True, check=False)
        assert done.returncode == 1 and b"cannot read '/etc/secret': Permission denied" in done.stderr
        assert b"--skip-unreadable" in done.stderr and done.stdout == b""
        done = subprocess.run([*run, "--skip-unreadable"], capture_output=True, check=False)
        assert done.returncode == 3 and b"left out '/etc/secret'" in done.stderr
        assert b"/large" in done.stdout and b"secret" not in done.stdout
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", tree / "etc"], check=True)


def test_exclude_leaves_out_a_path_and_what_is_below(home: Path, tree: Path, cmd: Run) -> None:
    done = cmd("cafs-index", "create", tree, "-o", "-", "--exclude", "/etc")
    assert b"/etc" not in done.stdout.replace(b"etc/os-release /link", b"") and b"/large" in done.stdout


FILES = ".git/config a/.git/x a/node_modules/m/n node_modulesx/y .env a/.env a/b/c.o d/é d/ee"


def test_exclude_matches_what_tar_excludes(home: Path, tmp_path: Path, cmd: Run) -> None:
    root = tmp_path / "t"
    for name in FILES.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    tar = ["tar", "-C", root, "-cf", "-"]
    whole = subprocess.run([*tar, "."], capture_output=True, check=True).stdout
    utf8 = os.environ | {"LC_ALL": "C.UTF-8"}
    for pattern in (".git", "node_modules", "*.o", "b/c.o", "a/*", "./a", "./.env", "d/?", "é", "[ab]", "odules"):
        packed = subprocess.run([*tar, "--exclude", pattern, "."], capture_output=True, check=True, env=utf8).stdout
        list_ = ["tar", "--quoting-style=literal", "-tf", "-"]
        listed = subprocess.run(list_, input=packed, capture_output=True, check=True, env=utf8).stdout.decode()
        wanted = sorted(line[1:].rstrip("/") or "/" for line in listed.splitlines())
        for source in (root, "-"):
            done = cmd("cafs-index", "create", source, "-o", tmp_path / "i", "--exclude", pattern, input=whole)
            assert sorted(cmd("cafs-index", "ls", tmp_path / "i").stdout.decode().splitlines()) == wanted, pattern
            assert (b"matched nothing" in done.stderr) == (pattern == "odules"), pattern


def test_a_closed_pipe_is_141_and_silent(home: Path, tree: Path, cmd: Run) -> None:
    for number in range(3000):
        (tree / f"some-long-name-{number}").touch()
    cmd("cafs-index", "create", tree, "-t", "demo:1")
    with subprocess.Popen([BIN / "cafs-index", "ls", "demo:1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stderr
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


def test_ctrl_c_is_130(home: Path, cmd: Run) -> None:
    with subprocess.Popen([BIN / "cafs-index", "ls", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin and child.stderr
        child.stdin.write(b"cafs-index 1 sha256 4194304\nd 755 0 0 0 - - - - /\n")
        for number in range(50_000):  # more than a pipe holds: once it is written, somebody is reading
            child.stdin.write(b"d 755 0 0 0 - - - - /%06d\n" % number)
        child.stdin.flush()
        child.send_signal(signal.SIGINT)
        assert child.wait(20 * SLOW) == 130
        assert child.stderr.read() == b""


WAITING = """
import os, sys, threading, time
from cafs import stopping
stopping.heed()
reads, _ = os.pipe()
for _ in range(8):
    threading.Thread(target=stopping.wait, args=(reads,), daemon=True).start()
print("ready", flush=True)
try:
    stopping.wait()
except stopping.Ended as end:
    print("tidying up", flush=True)
    if sys.argv[1:]:
        time.sleep(1000)
    os._exit(128 + end.number)
"""


def waiting(*words: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", WAITING, *words], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    return child


def test_a_signal_is_for_the_main_thread_whatever_other_threads_wait_for() -> None:
    for _ in range(20):
        with waiting() as child:
            child.terminate()
            assert child.wait(20 * SLOW) == 143


def test_who_is_told_again_while_he_tidies_up_for_too_long_ends() -> None:
    with waiting("long") as child:
        child.terminate()
        assert child.stdout and child.stdout.readline() == b"tidying up\n"
        child.terminate()  # at once: as a whole process group may be told
        deadline = time.monotonic() + 20 * SLOW
        while child.poll() is None and time.monotonic() < deadline:
            child.terminate()
            time.sleep(0.1)
        assert child.wait(0) == 143


ALLOWED = {"_note", "write", "end"}
"""What handlers may be called: each sets a flag, or writes a byte."""

EXCEPTION = "signal.signal(signal.SIGUSR1, self._cancel)"
"""Of the shim: the cancel of a call is an exception in its handler, which may be in a sleep or a read."""


def test_no_handler_of_a_signal_does_more_than_note_it() -> None:
    top = Path(__file__).parent.parent
    found = []
    for path in sorted(one for room in ("cafs", "runner", "builder", "pool", "cli") for one in (top / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "signal.signal"):
                continue
            handler = node.args[1]
            body = handler.body if isinstance(handler, ast.Lambda) else handler
            name = ast.unparse(body.func if isinstance(body, ast.Call) else body).rpartition(".")[2]
            if name not in {"SIG_DFL", "SIG_IGN", "None", *ALLOWED} and ast.unparse(node) != EXCEPTION:
                found.append(f"{path.relative_to(top)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_output_does_not_depend_on_locale_or_hash_seed(home: Path, tree: Path) -> None:
    seen = set()
    for locale, seed, jobs in (("C", "0", "1"), ("C.UTF-8", "1", "4"), ("nonsense", "2", "8")):
        environment = os.environ | {"LC_ALL": locale, "PYTHONHASHSEED": seed}
        run = [BIN / "cafs-index", "create", tree, "-o", "-", "-j", jobs]
        seen.add(subprocess.run(run, env=environment, capture_output=True, check=True).stdout)
    assert len(seen) == 1


def test_an_index_file_is_replaced_whole_or_not_at_all(home: Path, tree: Path, tmp_path: Path, cmd: Run) -> None:
    out = tmp_path / "out"
    assert cmd("cafs-index", "create", tree, "-o", out).returncode == 0
    before = out.read_bytes()
    assert cmd("cafs-index", "create", tree / "missing", "-o", out).returncode == 4
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.glob("tmp.*")) == []


def test_a_file_that_changes_while_it_is_read_is_reported(
    home: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cafs import create
    from cafs.errors import CafsError
    from cafs.indexing import Options, create_image

    real = create._read_whole

    def growing(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        with open(tree / "etc" / "os-release", "a") as file:
            file.write("more")
        return data

    monkeypatch.setattr(create, "_read_whole", growing)
    with pytest.raises(CafsError, match="changed while the tree was read"):
        create_image(Options(str(tree), jobs=1), str(tmp_path / "s"), "t:1")
    assert not (tmp_path / "s" / "refs" / "t").exists()


def test_closed_standard_streams_are_no_error_and_hold_no_other_file(home: Path, tree: Path) -> None:
    script = f"{BIN}/cafs-index create {tree} -t demo:1 >&- 2>&- <&- && {BIN}/cafs-index ls demo:1 >&-"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0
    script = f"{BIN}/cafs-index ls nothing:1 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 4


def test_an_index_may_come_from_a_pipe_with_a_name(home: Path, tree: Path) -> None:
    script = f"{BIN}/cafs-index ls <({BIN}/cafs-index create {tree} -o -) /etc"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert done.stdout == b"/etc\n/etc/os-release\n", done.stderr


def walked(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
        yield from walked(below, f"{words} {name}")


def test_every_option_that_is_declared_is_read_by_the_code_that_runs() -> None:
    """Of commands by click; those of crun are in test_runflags.  A name counts as read where code uses or names it."""
    read: set[str] = set()
    top = Path(__file__).parent.parent
    for file in [*(top / "cli").glob("*.py"), top / "pool" / "calling.py"]:  # which is handed some as they are
        for function in ast.walk(ast.parse(file.read_text())):
            for node in ast.walk(ast.Module(function.body, [])) if isinstance(function, ast.FunctionDef) else ():
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    read.add(node.id)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)
    ignored = []
    for module in ("cafs_index", "cafs_store", "cbuild", "cpool"):
        main = importlib.import_module(f"cli.{module}").main
        for words, command in walked(main, module):
            ignored += [f"{words} {one.opts[0]}" for one in command.params if one.expose_value and one.name not in read]
    assert ignored == ["cpool cloud policy provider"], "which has one value"


@pytest.mark.parametrize(
    "words",
    [
        "cafs-index create T -o F -t x:1",
        "cafs-index create T -o F --store S",
        "cafs-index create T --platform linux/amd64",
        "cafs-index create A -x",
        "cafs-index create A --rehash",
        "cafs-index create A --skip-unreadable",
        "cafs-index ls x:1 -l -0",
        "cafs-index ls x:1 -l --json",
        "cafs-index diff x:1 x:1 --name-only --json",
        "cafs-index verify x:1 --json",
        "cafs-index verify x:1 -j 2",
        "cafs-index merge x:1 x:1 -o F -t y:1",
        "cafs-index profile x:1 --from R --show --name n",
        "cafs-index profile x:1 --from R --show --svg F --json",
        "cafs-store ls -q --json",
        "cafs-store pull x:1 --json",
        "cafs-store fsck --cache --store S",
        "cafs-store fsck -q --json",
    ],
)
def test_an_option_that_would_be_ignored_is_refused(home: Path, tree: Path, tmp_path: Path, cmd: Run, words: str) -> None:
    assert cmd("cafs-index", "create", tree, "-t", "x:1").returncode == 0
    subprocess.run(["tar", "-C", tree, "-cf", tmp_path / "A", "."], check=True)
    (tmp_path / "R").write_text("cafs-record 1 sha256\n")
    places = {"T": tree, "F": tmp_path / "F", "S": tmp_path / "store", "A": tmp_path / "A", "R": tmp_path / "R"}
    program, *rest = words.split()
    done = cmd(program, *[str(places.get(word, word)) for word in rest])
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "F").exists()
