"""cbuild as a user runs it: from a shell, with pipes, with wrong arguments, and what comes out at the other end."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import pty
import re
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from builder import agent, output
from builder.mounts import Mount
from cafs import layerblob
from cafs.store import Store
from tests.conftest import BIN, wait_until
from tests.faultproxy import free_port
from tests.test_build import make_context
from tests.test_commit import image_of
from tests.waiting import SLOW

pytestmark = [pytest.mark.needs("root", "fuse", "runc", "busybox"), pytest.mark.usefixtures("image")]
TEXT = "FROM b:1\nARG V=1\nCOPY a /a\nRUN cat /a > /b; echo $V\n"


def cbuild(*words: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [str(BIN / "cbuild"), *map(str, words)]
    options["timeout"] = options.get("timeout", 60) * SLOW
    return subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def digest(*words: object, **options: object) -> str:
    done = cbuild("-q", *words, **options)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert re.fullmatch(rb"[0-9a-f]{64}\n", done.stdout)
    return str(done.stdout.decode().strip())


@pytest.fixture
def context(tmp_path: Path) -> Path:
    return make_context(tmp_path / "context", {"a": "A\n", "sub/Other": "FROM b:1\nENV A=1\n"}, TEXT)


def test_every_way_to_give_a_context_makes_the_same_image(context: Path, tmp_path: Path) -> None:
    wanted = digest(context)
    tar = subprocess.run(["tar", "-c", "-C", context, "."], capture_output=True, check=True).stdout
    assert digest("-", input=tar) == wanted
    packed = subprocess.run(["tar", "-cz", "-C", context, "."], capture_output=True, check=True).stdout
    assert digest("-", input=packed) == wanted
    assert digest("-f", "-", context, input=TEXT.encode()) == wanted
    (tmp_path / "elsewhere").write_text(TEXT)
    assert digest("-f", tmp_path / "elsewhere", context) == wanted
    assert digest(".", cwd=context) == wanted
    (tmp_path / "context.tar").write_bytes(tar)
    with served(tmp_path) as url:
        assert digest(f"{url}/context.tar") == wanted
    (context / "Dockerfile").rename(context / "Containerfile")
    assert digest(context) == wanted
    assert digest("-", input=b"FROM b:1\nENV A=1\n") == digest("-f", context / "sub" / "Other", context)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(directory))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n32\r\nabcde",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_a_download_that_ends_too_early_is_an_error(context: Path, answer: bytes) -> None:
    def serve() -> None:
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/f"
        for words, given in ((["-"], f"FROM scratch\nADD {url} /f\n".encode()), ([url], b"")):
            done = cbuild(*words, input=given)
            assert done.returncode == 7 and b"cannot fetch" in done.stderr, done.stderr
        thread.join(10 * SLOW)


@pytest.mark.needs("git")
def test_git_repositories_are_contexts_and_sources(context: Path, tmp_path: Path) -> None:
    def git(*words: object) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", *who, "-C", context, *map(str, words)], check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    subprocess.run(["git", "clone", "-q", "--bare", context, tmp_path / "r.git"], check=True)
    subprocess.run(["git", "-C", tmp_path / "r.git", "update-server-info"], check=True)
    with served(tmp_path) as url:
        assert digest(f"{url}/r.git") == digest(context)
        assert digest(f"{url}/r.git#main:sub", "-f", "Other") == digest("-", input=b"FROM b:1\nENV A=1\n")
        text = f"FROM b:1\nADD {url}/r.git#main /got\nADD {url}/r.git/HEAD /file\nRUN cat /got/a && test ! -e /got/.git && test -s /file\n"
        assert cbuild("-", input=text.encode()).returncode == 0
        done = cbuild("-", input=f"FROM b:1\nADD --checksum=sha256:{'0' * 64} {url}/r.git/HEAD /file\n".encode())
        assert done.returncode == 1 and b"has the checksum sha256:" in done.stderr
        assert cbuild("-", input=f"FROM b:1\nADD {url}/none /file\n".encode()).returncode == 7
        assert cbuild(f"{url}/none.git").returncode == 7
        for place, code in ((f"{url}/r.git", 0), (tmp_path / "r.git", 7)):  # that of the server, and one of this machine
            (context / ".gitmodules").write_text(f'[submodule "m"]\n\tpath = m\n\turl = {place}\n')
            main = subprocess.run(["git", "-C", tmp_path / "r.git", "rev-parse", "main"], capture_output=True, check=True)
            git("update-index", "--add", "--cacheinfo", f"160000,{main.stdout.decode().strip()},m")
            git("add", ".gitmodules")
            git("commit", "-q", "-m", "with a submodule")
            subprocess.run(["git", "clone", "-q", "--bare", context, tmp_path / f"with{code}.git"], check=True)
            subprocess.run(["git", "-C", tmp_path / f"with{code}.git", "update-server-info"], check=True)
            text = f"FROM b:1\nADD {url}/with{code}.git /got\nRUN cat /got/m/a && test ! -e /got/m/.git\n"
            done = cbuild("-", input=text.encode())
            assert done.returncode == code, done.stderr


def test_what_docker_would_do_and_this_does_not_is_refused(context: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--pull"], b"is of the store: there is nothing to pull it from"),
        (["--pull=always"], b"--pull can be true or false"),
        (["--rm=false"], b"--rm can be true"),
        (["--cache-to", "type=gha,mode=max"], b"--cache-to takes a store"),
        (["--cache-to", "type=local"], b"--cache-to takes a store"),
        (["--cache-from", "type=registry,ref=x/y"], b"--cache-from takes a store"),
    ):
        done = cbuild("-q", *words, context, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, (words, done.stderr)
        assert b"\nmain\n" not in done.stderr
    assert not list(tmp_path.glob("type=*"))
    wanted = digest("--cache-to", f"type=local,dest={tmp_path}/steps,mode=max", context)
    assert digest("--cache-from", f"type=local,src={tmp_path}/steps", "--no-cache=false", context) == wanted


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--no-cache-filter", "nosuch"], 2, b"no stage 'nosuch'"),
        (["--ulimit", "nofile=x"], 2, b"is not NAME=SOFT"),
        (["--shm-size", "lots"], 2, b"is not a size"),
        (["--add-host", "foo"], 2, b"is not NAME:IP"),
        (["--secret", "id=x,src=/nonexistent"], 4, b"no file '/nonexistent'"),
        (["--ssh", "default=/nonexistent"], 4, b"no ssh agent"),
        (["--build-context", "n=/nonexistent"], 4, b"no directory '/nonexistent'"),
        (["--allow-secret-in-layer", "x"], 2, b"no --secret has this id"),
        (["-o", "dest=foo"], 2, b"has no type="),
        (["-o", "type=oci,dest=o,push=true"], 2, b"has no 'push=true'"),
        (["-o", "type=oci,dest=o,compression-level=22"], 2, b"has no 'compression-level=22'"),
        (["-o", "type=local,dest=o,compression=zstd"], 2, b"has no 'compression=zstd'"),
        (["-o", "type=image,push=maybe,name=x"], 2, b"true or false"),
        (["-o", "type=image,push=1"], 2, b"needs a name"),
        (["-o", "type=registry"], 2, b"needs a name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_would_be_ignored_is_refused(context: Path, tmp_path: Path, words: list[str], code: int, said: bytes) -> None:
    done = cbuild("-q", *words, context, cwd=tmp_path)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "dest=foo").exists()


def test_what_was_ignored_works(context: Path, tmp_path: Path) -> None:
    text = "FROM b:1 AS One\nRUN echo one\nFROM b:1\nRUN echo two\n"
    (context / "Dockerfile").write_text(text + "COPY --from=one /etc/passwd /p\n")
    digest(context)
    for words, count in ((["ONE"], 1), (["1"], 1), (["one,1"], 2), (["one", "1"], 2)):
        filters = [word for name in words for word in ("--no-cache-filter", name)]
        said = cbuild(*filters, context).stderr
        assert len(re.findall(rb"#[0-9]+ [0-9.]+ (?:one|two)\n", said)) == count, said
    wanted = digest(context)
    assert digest("--network", "default", context) == wanted
    assert b"BUILDKIT_INLINE_CACHE does nothing here" in cbuild("--build-arg", "BUILDKIT_INLINE_CACHE=1", context).stderr
    assert digest("-o", "type=image,name=named:1", context) == wanted
    found = subprocess.run([BIN / "cafs-store", "ls"], capture_output=True, check=True).stdout.decode()
    assert f"named:1\t{wanted}\n" in found
    digest("-o", f"type=docker,dest={tmp_path}/d.tar,name=x:3", "-t", "y:4", context)
    with tarfile.open(tmp_path / "d.tar") as archive:
        assert json.load(archive.extractfile("manifest.json"))[0]["RepoTags"] == ["x:3"]  # type: ignore[arg-type]


def test_what_is_not_there_is_explained(context: Path) -> None:
    (context / ".dockerignore").write_text("secret\nbuild\n")
    (context / "secret").touch()
    (context / "build").mkdir()
    (context / "build" / "out").touch()
    for text, said in (
        ("COPY secret /x\n", ".dockerignore leaves it out"),
        ("COPY build/out /x\n", ".dockerignore leaves it out"),
        ("COPY sub/Othr /x\n", "did you mean 'sub/Other'?"),
        ("COPY --from=biulder /x /x\n", "did you mean stage 'builder'?"),
        ("COPY --from=builder /etc/pasword /x\n", "did you mean 'etc/passwd'?"),
        ("RUN --mount=from=buildr,target=/m true\n", "did you mean stage 'builder'?"),
    ):
        done = cbuild("-q", "-f", "-", context, input=f"FROM b:1 AS builder\nFROM b:1\n{text}".encode())
        assert done.returncode == 4 and f"hint: {said}\n".encode() in done.stderr, (text, done.stderr)


def test_an_image_whose_last_steps_make_no_layer_can_be_loaded_by_docker(context: Path, tmp_path: Path) -> None:
    text = b'FROM scratch\nCOPY a /a\nENV A=1\nLABEL x=y\nCMD ["/a"]\n'
    assert cbuild("-f", "-", "-o", f"docker-archive:{tmp_path}/out.tar", context, input=text).returncode == 0
    with tarfile.open(tmp_path / "out.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest[0]["Config"]))  # type: ignore[arg-type]
    assert [bool(step.get("empty_layer")) for step in config["history"]] == [False, True, True, True]
    assert len(config["rootfs"]["diff_ids"]) == 1


def test_what_is_said_and_written(context: Path, tmp_path: Path) -> None:
    done = cbuild(
        "--no-cache",
        "-t",
        "made:1",
        "-t",
        "made:2",
        "--iidfile",
        tmp_path / "iid",
        "--metadata-file",
        tmp_path / "meta",
        context,
    )
    said = done.stderr.decode()
    assert done.returncode == 0 and "[stage-0 3/3] RUN cat /a > /b; echo $V" in said and re.search(r"#3 [0-9.]+ 1\n", said)
    made = done.stdout.decode().strip()
    assert (tmp_path / "iid").read_text() == made
    assert json.loads((tmp_path / "meta").read_text())["image.name"] == "made:1,made:2"
    assert (
        subprocess.run([BIN / "crun", "run", "--rm", "made:2", "cat", "/b"], capture_output=True, check=True).stdout == b"A\n"
    )
    assert cbuild(context).stderr.count(b"CACHED") == 2
    explained = cbuild("--explain", "-q", context).stderr.decode()
    assert re.fullmatch(r"(#\d\tcached, saved [0-9.]+ s\t\[stage-0 \d/3\] .*\n){2}", explained)
    events = [json.loads(line) for line in cbuild("--progress", "json", "--no-cache", context).stderr.splitlines()]
    assert [event["event"] for event in events] == ["begin", "done", "begin", "output", "done"]
    assert cbuild("-q", "--build-arg", "V", context, env=os.environ | {"V": "7"}).returncode == 0
    warned = cbuild("--build-arg", "NONE=1", context)
    assert warned.returncode == 0 and b"--build-arg NONE is declared by no ARG" in warned.stderr
    labelled = cbuild("-q", "--label", "a=b", "-t", "made:3", context)
    assert labelled.returncode == 0 and labelled.stdout.decode().strip() != made


def test_make_knows_what_an_image_is_made_of(context: Path, tmp_path: Path) -> None:
    (context / "with space").write_text("x")
    (context / "Dockerfile").write_text(
        'FROM b:1\nCOPY a /\nCOPY ["with space", "/x"]\nRUN --mount=source=sub,target=/m ls /m\n'
    )
    words = ["-q", "--depfile", "app.d", "--iidfile", "app.id", "--report", tmp_path / "report.html", "context"]
    assert cbuild(*words, cwd=tmp_path).returncode == 0
    (tmp_path / "Makefile").write_text(f"app.id:\n\t{BIN}/cbuild {' '.join(map(str, words))} > log\ninclude app.d\n")

    def make() -> bytes:
        return subprocess.run(["make", "-C", tmp_path, "app.id"], capture_output=True, check=True).stdout

    assert b"up to date" in make()
    for name in ("sub/Other", "with space", "a", "Dockerfile"):
        os.utime(context / name, (2_000_000_000, 2_000_000_000))
        assert b"cbuild" in make(), name
        os.utime(context / name, (1, 1))
        assert b"up to date" in make(), name
    page = (tmp_path / "report.html").read_text()
    assert "COPY a /" in page and "3 from the cache" in page


def test_make_notices_files_that_come_and_go(context: Path) -> None:
    words = ["-q", "--depfile", "app.d", "--iidfile", "app.id", "."]
    (context / "Makefile").write_text(f"app.id:\n\t{BIN}/cbuild {' '.join(words)} > /dev/null\n-include app.d\n")
    (context / ".dockerignore").write_text("app.*\nlog\n")

    def make() -> bytes:
        return subprocess.run(["make", "app.id"], capture_output=True, check=True, cwd=context).stdout

    for text in ("FROM b:1\nCOPY . /app\n", "FROM b:1\nCOPY s*/?e* /app/\n"):
        (context / "Dockerfile").write_text(text)
        make()
        assert b"up to date" in make()
        (context / "sub" / "new").write_text("x")
        assert b"cbuild" in make() and b"up to date" in make(), "a new file"
        (context / "sub" / "new").unlink()
        assert b"cbuild" in make() and b"up to date" in make(), "a deleted one"


def test_a_terminal_keeps_the_digest(context: Path) -> None:
    """It is printed after the display has been taken away, not into it."""
    main, terminal = pty.openpty()
    with subprocess.Popen([BIN / "cbuild", context], stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"}):
        os.close(terminal)
        said = b""
        try:
            while data := os.read(main, 65536):
                said += data
        except OSError:
            pass  # the end, as Linux has it
    os.close(main)
    after = said[said.rindex(b"\x1b[") :] if b"\x1b[" in said else said
    assert re.search(rb"(?:^|\n)[0-9a-f]{64}\r\n$", said) and b"[+] building" not in after


@pytest.mark.parametrize("kind", ["type=docker", "type=oci", "type=tar", "-", "docker-archive:-:x:1"])
def test_an_archive_on_standard_output_is_all_that_is_there(context: Path, kind: str) -> None:
    done = cbuild("-q", "-o", kind, context)
    assert done.returncode == 0 and len(done.stdout) % 512 == 0 and done.stdout.endswith(bytes(1024))


def test_actions_get_groups(context: Path) -> None:
    said = cbuild(context, env=os.environ | {"GITHUB_ACTIONS": "true"}).stderr.decode()
    assert said.count("::group::#") == said.count("::endgroup::") == 2
    both = "FROM b:1 AS {0}\nRUN for i in $(seq 20); do echo {0}$i; sleep 0.02; done; echo {0} > /{0}\n"
    text = both.format("one") + both.format("two") + "FROM b:1\nCOPY --from=one /one /\nCOPY --from=two /two /\n"
    said = cbuild("-", input=text.encode(), env=os.environ | {"GITHUB_ACTIONS": "true"}).stderr.decode()
    marks = re.findall("^::(?:end)?group::", said, re.MULTILINE)
    assert marks == ["::group::", "::endgroup::"] * 4, "none inside another"
    for name in ("one", "two"):
        group = re.search(f"::group::#[0-9]+ .*echo {name}\\$i.*?::endgroup::", said, re.DOTALL)
        assert group and all(f"{name}{number}\n" in group[0] for number in range(1, 21))
    (context / "Dockerfile").write_text("FROM b:1\n  RUNN x\n")
    said = cbuild(".", cwd=context, env=os.environ | {"GITHUB_ACTIONS": "true"}).stderr.decode()
    assert "::error file=Dockerfile,line=2,col=3::unknown instruction 'RUNN' (did you mean RUN?)\n" in said


@pytest.mark.parametrize(
    ("words", "text", "code", "said"),
    [
        ([], "FROM b:1\nRUN echo before; exit 5\n", 1, "Dockerfile:2: RUN echo before; exit 5: exit code 5"),
        ([], "FROM b:1\nRUN exit 5\n", 1, "crun run --rm -it "),
        ([], "FROM b:1\nCOPY none /x\n", 4, "Dockerfile:2: COPY: no 'none' to copy"),
        ([], "FROM b:1\nENV A=$\n", 0, ""),
        (["--target", "none"], TEXT, 2, "no stage 'none'"),
        (["--platform", "linux/s390x"], TEXT, 2, "nothing is emulated"),
        (["--build-arg", "=x"], TEXT, 2, "is not K=V"),
        (["--secret", "src=x"], TEXT, 2, "is not id=ID"),
        (["--allow", "all"], TEXT, 2, "network.host, security.insecure or device"),
        (["-t", "Not A Ref"], TEXT, 2, ""),
        (["--nothing"], TEXT, 2, "no such option"),
        (["-f", "/nonexistent"], TEXT, 4, "cannot read '/nonexistent'"),
        (["-o", "type=odd"], TEXT, 2, "unknown output type"),
        (["--check"], "FROM b:1\nRUN a && \\\n\n b\n", 1, "Dockerfile:3: an empty line"),
        (["--check"], TEXT, 0, ""),
        (["--iidfile", "/nonexistent/iid"], TEXT, 4, "cannot write '/nonexistent/iid'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(context: Path, words: list[str], text: str, code: int, said: str) -> None:
    (context / "Dockerfile").write_text(text)
    done = cbuild("-q", *words, context)
    both = (done.stdout + done.stderr).decode()
    assert done.returncode == code and said in both and "Traceback" not in both, both
    if "echo before" in text:
        assert "before\n" in both, "the end of what it printed"


def test_the_shell_that_an_error_offers_has_what_was_made_before(context: Path) -> None:
    (context / "Dockerfile").write_text("FROM b:1\nRUN echo made > /before\nRUN false\n")
    said = cbuild("-q", context).stderr.decode()
    command = re.search(r"crun (run --rm) -it ([0-9a-f]+) sh", said)
    assert command
    done = subprocess.run([BIN / "crun", *command[1].split(), command[2], "cat", "/before"], capture_output=True, check=False)
    assert done.stdout == b"made\n", done.stderr


@pytest.mark.needs("skopeo", "umoci")
def test_outputs_are_read_by_other_programs(context: Path, tmp_path: Path) -> None:
    layout, saved, tar, tree = (tmp_path / name for name in ("layout", "saved", "t.tar", "tree"))
    outputs = [
        f"oci:{layout}:v",
        f"docker-archive:{saved}",
        tar,
        tree,
        f"type=oci,dest={tmp_path}/a.oci",
        "type=tar,dest=" + str(tmp_path / "u.tar"),
    ]
    done = cbuild("-q", "-t", "made:1", *(word for one in outputs for word in ("-o", one)), context)
    assert done.returncode == 0, done.stderr
    for name in (f"oci:{layout}:v", f"docker-archive:{saved}", f"oci-archive:{tmp_path}/a.oci"):
        found = json.loads(subprocess.run(["skopeo", "inspect", "--config", name], capture_output=True, check=True).stdout)
        assert found["config"]["Env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    assert (tree / "b").read_text() == "A\n"
    for path in (tar, tmp_path / "u.tar"):
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.split()
        assert "b" in {name.strip("./") for name in listed}
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:v", tmp_path / "bundle"], check=True, capture_output=True)
    assert (tmp_path / "bundle" / "rootfs" / "b").read_text() == "A\n"


def test_a_directory_may_have_something_in_it_that_stays(context: Path, tmp_path: Path) -> None:
    (context / "Dockerfile").write_text("FROM scratch\nCOPY a /a\nCOPY a /sub/a\nCOPY a /sub/link\n")
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    (out / "sub" / "link").symlink_to(tmp_path / "outside")
    for path in (out / "a", out / "kept", out / "sub" / "kept"):
        path.write_text("old")
    out.chmod(0o705)
    for words in (["-o", out], ["-o", f"type=local,dest={out}"]):
        assert cbuild("-q", *words, context).returncode == 0
        assert {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()} == {
            "a": "A\n", "kept": "old", "sub/a": "A\n", "sub/kept": "old", "sub/link": "A\n",
        }  # fmt: skip
    assert (tmp_path / "outside").read_text() == "mine" and out.stat().st_mode & 0o777 == 0o705
    (out / "a").unlink()
    (out / "a").mkdir()
    refused = cbuild("-q", "-o", out, context)
    assert refused.returncode == 1 and b"cannot write '/a': Is a directory" in refused.stderr, refused.stderr
    (out / "sub").rename(tmp_path / "moved")
    (out / "sub").symlink_to(tmp_path / "moved")
    (out / "a").rmdir()
    assert cbuild("-q", "-o", out, context).returncode == 1, "no link is followed out of it"


def test_squash_makes_one_layer_and_the_same_tree(context: Path) -> None:
    one, many = digest("--squash", context), digest(context)
    assert one != many
    assert subprocess.run([BIN / "cafs-index", "diff", one, many], check=False).returncode == 0


def test_secrets_are_in_no_file_of_the_store_and_in_no_output(context: Path, tmp_path: Path) -> None:
    value = os.urandom(16).hex()
    (tmp_path / "secret").write_text(value)
    text = (
        'FROM b:1\nRUN --mount=type=secret,id=s --mount=type=secret,id=e,env=E cat /run/secrets/s | wc -c > /n; test -n "$E"\n'
    )
    (context / "Dockerfile").write_text(text)
    words = ["--secret", f"id=s,src={tmp_path}/secret", "--secret", "id=e,env=TOKEN", "--no-cache", context]
    done = cbuild(*words, env=os.environ | {"TOKEN": value})
    assert done.returncode == 0 and value.encode() not in done.stdout + done.stderr
    assert having(value, "STORE", "CACHE", "STATE", "RUN") == []


def having(value: str, *places: str) -> list[Path]:
    """The files below the directories of these names that have a value in them."""
    tops = [os.environ[f"CAFS_{name}"] for name in places]
    files = [Path(directory) / one for top in tops for directory, _, names in os.walk(top) for one in names]
    return [path for path in files if path.is_file() and not path.is_symlink() and value.encode() in path.read_bytes()]


def test_a_secret_variable_is_on_no_disk_while_the_command_runs(context: Path) -> None:
    value = os.urandom(16).hex()
    wait = 'touch /c/here; until test -f /c/go; do sleep 0.01; done; rm /c/*; test -n "$E"'
    (context / "Dockerfile").write_text(
        f"FROM b:1\nRUN --mount=type=secret,id=e,env=E --mount=type=cache,target=/c,id=sync {wait}\n"
    )
    cache = Path(os.environ["CAFS_STATE"]) / "caches" / hashlib.sha256(b"\0sync").hexdigest()
    command = [BIN / "cbuild", "-q", "--secret", "id=e,env=TOKEN", "--no-cache", context]
    with subprocess.Popen(command, env=os.environ | {"TOKEN": value}, stdout=subprocess.DEVNULL) as running:
        wait_until((cache / "here").exists)
        assert having(value, "STORE", "CACHE", "STATE") == []
        assert having(value, "RUN"), "which is memory: the runtime has to read it somewhere"
        (cache / "go").touch()
        assert running.wait() == 0
    assert having(value, "RUN") == []


def test_a_cache_mount_becomes_an_image_that_starts_another(context: Path) -> None:
    use = "RUN --mount=type=cache,target=/c,id={id}{more} cat /c/kept 2> /old; echo {id} > /c/kept\n"
    (context / "Dockerfile").write_text("FROM b:1\n" + use.format(id="one", more=""))
    done = cbuild("-q", "--no-cache", "--cache-mount-to", "one=kept:1", context)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([BIN / "cafs-index", "cat", "kept:1", "kept"], capture_output=True, check=True).stdout == b"one\n"
    (context / "Dockerfile").write_text("FROM b:1\n" + use.format(id="two", more=",from=kept:1"))
    assert b"one" in cbuild("--progress", "plain", context).stderr
    refused = cbuild("-q", "--cache-mount-to", "three=kept:3", context)
    assert refused.returncode == 4 and b"no cache mount 'three'" in refused.stderr
    assert cbuild("-q", "--cache-mount-to", "three", context).returncode == 2


def test_an_agent_is_for_the_user_that_the_mount_names(context: Path) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(directory, 0o711)
        listener.bind(f"{directory}/agent")
        os.chmod(f"{directory}/agent", 0o600)
        listener.listen()

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # it was shut down
                with connection:
                    connection.sendall(b"key of " + connection.recv(100))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        mount = Mount("ssh", "/agent", uid=1000, gid=7, mode=0o640)
        with agent.passed_on(f"{directory}/agent", f"{directory}/other", mount):
            for uid, wanted in ((1000, b"key of me"), (1001, b"EACCES")):
                assert as_user(uid, lambda: ask(f"{directory}/other")) == wanted
            assert as_user(1000, lambda: ask(f"{directory}/agent")) == b"EACCES"
        text = "FROM b:1\nUSER 1000\nRUN --mount=type=ssh,uid=1000,gid=7,mode=0640 stat -c '%u %g %a' $SSH_AUTH_SOCK\n"
        (context / "Dockerfile").write_text(text)
        done = cbuild("--no-cache", "--progress", "plain", "--ssh", f"default={directory}/agent", context)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert done.returncode == 0 and b"1000 7 640" in done.stderr, done.stderr


def ask(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError as error:
            return errno.errorcode[error.errno or 0].encode()
        client.sendall(b"me")
        return client.recv(100)


def as_user(uid: int, work: Callable[[], bytes]) -> bytes:
    """What it returns in a process of a user's."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setresgid(uid, uid, uid)
            os.setgroups([])
            os.setresuid(uid, uid, uid)
            os.write(writer, work())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        return pipe.read()


def test_a_check_says_all_that_is_wrong_and_builds_nothing(context: Path) -> None:
    (context / "Dockerfile").write_text(
        "FROM absent:1 AS one\nARG A=${B:?}\nENV C=${D\nRUN --mount=type=odd true\nCOPY a\nFROM b:1\n"
        "WORKDIR ${E:?no place}\nEXPOSE x\nRUN --network=odd true\nRUN --mount=type=cache,target=/c true\n"
    )
    done = cbuild("--check", context)
    said = done.stdout.decode().splitlines()
    assert done.returncode == 1 and [line.split(":")[1] for line in said] == ["3", "4", "5", "7", "8", "9"], said
    assert "E: no place" in said[3] and "unknown mount type 'odd'" in said[1]


def test_two_builds_at_once_of_one_thing_give_one_image(context: Path) -> None:
    (context / "a").write_text(os.urandom(8).hex())
    command = [BIN / "cbuild", "-q", context]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    found = [one.communicate(timeout=60 * SLOW) for one in running]
    assert all(one.returncode == 0 for one in running), found
    again = digest(context)
    assert again == digest(context)


def test_a_build_that_is_killed_leaves_a_store_that_is_sound(context: Path) -> None:
    (context / "Dockerfile").write_text("FROM b:1\nCOPY a /k\nRUN echo started; sleep 1000\n")
    with subprocess.Popen([BIN / "cbuild", context], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as build:
        assert build.stderr
        while b"started" not in (line := build.stderr.readline()):
            assert line
        build.kill()
    (context / "Dockerfile").write_text("FROM b:1\nCOPY a /k\n")
    assert cbuild(context).stderr.count(b"CACHED") == 1
    assert subprocess.run([BIN / "crun", "gc"], check=False).returncode == 0
    found = subprocess.run([BIN / "cafs-store", "fsck"], check=False, capture_output=True).stdout.splitlines()
    assert [line for line in found if not line.startswith(b"dead-lease\t")] == []


def test_on_a_terminal_steps_are_drawn_and_stdout_has_the_digest_alone(context: Path) -> None:
    master, slave = pty.openpty()
    command = [BIN / "cbuild", "--no-cache", context]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=os.environ | {"TERM": "xterm"}) as build:
        os.close(slave)
        said = b""
        try:
            while data := os.read(master, 65536):
                said += data
        except OSError:
            pass  # the other end is closed
        os.close(master)
        assert build.stdout and re.fullmatch(rb"[0-9a-f]{64}\n", build.stdout.read())
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", said).decode()
    assert "[+] building" in text and re.search(r"=> \[stage-0 3/3\] RUN cat /a > /b; echo \$V +[0-9.]+s", text), text
    assert build.returncode == 0


@contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on an empty directory; its HOST:PORT."""
    port = free_port()
    directory.mkdir()
    (directory / "registry.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {directory}/data\nhttp:\n  addr: 127.0.0.1:{port}\n"
    )
    with subprocess.Popen(["docker-registry", "serve", directory / "registry.yml"], stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.mark.needs("docker-registry", "skopeo")
def test_images_are_pushed_to_a_registry_and_built_upon(context: Path, tmp_path: Path) -> None:
    with registry(tmp_path / "one") as place:
        done = cbuild("-q", "-o", f"docker://{place}/app:1", context)
        assert done.returncode == 0, done.stderr
        (context / "Dockerfile").write_text(f"FROM docker://{place}/app:1\nRUN cat /b > /c\n")
        done = cbuild("-q", "-t", "upon:1", context)
        assert done.returncode == 0, done.stderr
        found = subprocess.run([BIN / "cafs-index", "cat", "upon:1", "/c"], capture_output=True, check=True).stdout
        assert found == b"A\n"
        (context / "Dockerfile").write_text("FROM b:1\nRUN echo new > /b\n")
        assert cbuild("-q", "-o", f"docker://{place}/app:1", context).returncode == 0
        (context / "Dockerfile").write_text(f"FROM docker://{place}/app:1\nRUN cat /b > /c\n")
        for words, seen in (([], b"A\n"), (["--pull"], b"new\n"), (["--pull=false"], b"new\n")):
            assert cbuild("-q", "-t", "upon:1", *words, context).returncode == 0
            found = subprocess.run([BIN / "cafs-index", "cat", "upon:1", "/c"], capture_output=True, check=True).stdout
            assert found == seen, words
        seen = subprocess.run(
            ["skopeo", "inspect", "--tls-verify=false", f"docker://{place}/app:1"], capture_output=True, check=True
        )
        pinned = f"{place}/app:1@{json.loads(seen.stdout)['Digest']}"
        unknown = cbuild("-q", "-", input=f"FROM {pinned}\nENV A=1\n".encode())
        assert unknown.returncode == 4 and f"docker://{pinned}".encode() in unknown.stderr
        assert cbuild("-q", "-", input=f"FROM docker://{pinned}\nENV A=1\n".encode()).returncode == 0
    assert cbuild("-q", "-", input=f"FROM {pinned}\nENV A=1\n".encode()).returncode == 0
    assert cbuild("-q", "--pull", context).returncode == 7, "the registry is away"
    assert cbuild("-q", "-o", f"docker://{place}/app:1", context).returncode != 0


@pytest.mark.needs("docker-registry", "skopeo")
def test_a_layer_that_a_registry_has_is_not_compressed_again(
    context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    write = layerblob._write

    def counted(*words: Any) -> layerblob.Blob:
        made.append(words[-1])
        return write(*words)

    monkeypatch.setattr(layerblob, "_write", counted)
    monkeypatch.setenv("CAFS_CACHE", str(tmp_path / "cache"))
    store = Store(os.environ["CAFS_STORE"])

    def pushed(place: str) -> list[str]:
        """How the layers were compressed that had to be."""
        made.clear()
        found = image_of(digest(context))
        store.refresh()
        output.write(store, found, place, ())
        return list(made)

    with registry(tmp_path / "one") as one, registry(tmp_path / "two") as two:
        (context / "Dockerfile").write_text("FROM b:1\nCOPY a /a\n")
        assert pushed(f"docker://{one}/app:1") == ["gzip"] * 2
        (context / "Dockerfile").write_text("FROM b:1\nCOPY a /a\nCOPY a /c\n")
        assert pushed(f"docker://{one}/app:2") == ["gzip"], "the layer that is new"
        assert pushed(f"docker://{one}/app:3") == []
        assert pushed(f"docker://{two}/app:1") == ["gzip"] * 3, "which has none of them"
        assert pushed(f"oci:{tmp_path}/layout:v") == ["gzip"] * 3 and pushed(f"oci:{tmp_path}/layout:w") == []
        assert pushed(f"type=registry,name={one}/app:4,compression=zstd") == ["zstd"] * 3
        raw = subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{one}/app:4"], capture_output=True, check=True
        )
        assert {layer["mediaType"].rpartition("+")[2] for layer in json.loads(raw.stdout)["layers"]} == {"zstd"}
        for name in (f"{one}/app:2", f"{one}/app:4", f"{two}/app:1"):
            create = subprocess.run(
                [BIN / "cafs-index", "create", f"docker://{name}"], capture_output=True, text=True, check=True
            )
            assert (
                subprocess.run([BIN / "cafs-index", "diff", digest(context), create.stdout.strip()], check=False).returncode
                == 0
            )
    assert cbuild("-q", "-o", "type=oci,compression=lzma", context).returncode == 2
    assert cbuild("-q", "-o", "type=oci,odd=1", context).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_build_at_once_and_leaves_nothing_of_the_step(context: Path, number: int) -> None:
    (context / "Dockerfile").write_text("FROM b:1\nRUN --mount=type=secret,id=s,env=S echo started; sleep 1000\n")
    secret = os.urandom(16).hex()
    command = [BIN / "cbuild", "--secret", "id=s,env=TOKEN", context]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TOKEN": secret}) as build:
        assert build.stderr
        while b"started" not in (line := build.stderr.readline()):
            assert line
        build.send_signal(number)
        assert build.wait(10 * SLOW) == 128 + number
    for name in ("RUN", "STATE"):
        for directory, _, files in os.walk(os.environ[f"CAFS_{name}"]):
            assert not [one for one in files if secret.encode() in (Path(directory) / one).read_bytes()], directory


def test_an_output_that_is_wrong_is_refused_before_anything_is_built(context: Path) -> None:
    for wrong in ("type=bogus", "type=local", "type=image,name=Not:A:Ref"):
        done = cbuild("-t", "early:1", "-o", wrong, context)
        assert (
            done.returncode == 2
            and b"early:1" not in subprocess.run([BIN / "cafs-store", "ls"], capture_output=True, check=True).stdout
        ), done


def left_of_builds() -> list[Path]:
    return [one for name in ("RUN", "STATE") for one in Path(os.environ[f"CAFS_{name}"]).glob("builds/*")]


def test_what_a_killed_build_has_left_the_next_one_removes(context: Path) -> None:
    (context / "secret").write_text("quite a secret")
    (context / "Dockerfile").write_text("FROM b:1\nRUN --mount=type=secret,id=s <<E\necho started; sleep 1000\nE\n")
    with subprocess.Popen(
        [BIN / "cbuild", "--secret", f"id=s,src={context}/secret", context], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as build:
        assert build.stderr
        while b"started" not in (line := build.stderr.readline()):
            assert line
        assert left_of_builds()
        build.kill()
    (context / "Dockerfile").write_text("FROM b:1\nENV A=1\n")
    wait_until(lambda: cbuild("-q", context).returncode == 0 and not left_of_builds())
    wait_until(lambda: not list((Path(os.environ["CAFS_STATE"]) / "containers").iterdir()))


def test_odd_places_for_output(context: Path, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    done = cbuild("-q", "--iidfile", "/dev/stdout", context)
    assert done.returncode == 0 and done.stdout.count(done.stdout[:64]) == 2 and os.path.islink("/dev/stdout")
    assert cbuild("-q", "-o", "type=local", context).returncode == 2
    assert cbuild("-q", "--push", context).returncode == 2
    assert cbuild("-q", "-o", "type=image,name=x:1", context).stdout.count(b"\n") == 1
    tar = cbuild("-q", "-o", "-", context).stdout
    listed = subprocess.run(["tar", "-t"], input=tar, capture_output=True, check=True)
    assert b"b" in listed.stdout.split() and listed.stderr == b""
    assert cbuild("-q", context, env=os.environ | {"SOURCE_DATE_EPOCH": "\u00b2"}).returncode == 2
    assert cbuild("--check", "-", input=TEXT.encode()).returncode == 0


def test_steps_go_to_another_store_and_come_from_it(context: Path, tmp_path: Path) -> None:
    (context / "a").write_text(os.urandom(8).hex())
    (context / "Dockerfile").write_text(
        "FROM b:1 AS one\nCOPY a /a\nFROM b:1 AS two\nRUN echo 1 > /b\nWORKDIR /w\nFROM b:1\nCOPY --from=one /a /\nCOPY --from=two /b /\n"
    )
    wanted = digest("--cache-to", tmp_path / "shared", context)
    environment = os.environ | {f"CAFS_{name}": str(tmp_path / name) for name in ("STORE", "CACHE")}
    subprocess.run(
        [BIN / "cafs-index", "create", Path(os.environ["CAFS_STORE"]).parent / "rootfs", "-t", "b:1"],
        env=environment,
        check=True,
        capture_output=True,
    )
    done = cbuild("--cache-from", tmp_path / "shared", context, env=environment)
    assert done.returncode == 0 and done.stderr.count(b"CACHED") == 5, done.stderr
    assert done.stdout.decode().strip() == wanted
    assert (
        subprocess.run([BIN / "cafs-index", "verify", wanted], env=environment, check=False, capture_output=True).returncode
        == 0
    )
    assert cbuild("--cache-from", tmp_path / "none", context).returncode == 4
