"""crun run, with real runc over a real mount: what docker's users expect, and no leftovers after any end."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafs import mountinfo
from tests.conftest import BIN, Run, lazy_pids, mounts_below, wait_until
from tests.crunning import crun, leftovers, make_rootfs, until
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox")


def test_output_and_exit_code_are_the_commands(image: Path) -> None:
    done = crun("b:1", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)


@pytest.mark.parametrize(
    ("command", "code"),
    [(["nothing"], 127), (["/bin/nothing"], 127), (["/bin/data"], 126), (["/bin"], 126), (["/bin/data/x"], 127)],
)
def test_what_cannot_be_run_is_126_and_what_is_not_there_127(image: Path, command: list[str], code: int) -> None:
    done = crun("b:1", *command)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("crun: cannot run") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nme", "x", "b:1"], "did you mean --name?"),
        (["-Z", "b:1"], "unknown flag '-Z'"),
        (["b:9"], "no image 'b:9'"),
        (["-u", "nobody", "b:1", "true"], "no user 'nobody'"),
        (["-v", "/a:b", "b:1", "true"], "is not SRC:DST[:ro]"),
        (["-w", "/proc/self/fd/7", "b:1", "true"], "working directory"),
        (["--network", "nowhere", "b:1", "true"], "no network"),
        (["-w", "//proc/self/fd/7", "b:1", "true"], "working directory"),
        (["-v", "/proc/nothing/x:/x", "b:1", "true"], "cannot use '/proc/nothing"),
        (["-u", "\u00b2", "b:1", "true"], "no user '\u00b2'"),
        (["b:1"], "no command"),
        ([], "IMAGE is missing"),
    ],
)
def test_our_own_failures_are_125_and_say_why(image: Path, arguments: list[str], said: str) -> None:
    done = crun(*arguments)
    assert done.returncode == 125, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_arguments_after_the_image_are_the_commands(image: Path) -> None:
    assert crun("b:1", "sh", "-c", 'echo x "$@"', "--", "-e", "--rm", "-it").stdout == "x -e --rm -it\n"


def test_a_container_is_a_filter(image: Path) -> None:
    data = os.urandom(3 << 20)
    done = subprocess.run(
        [BIN / "crun", "run", "--rm", "-i", "b:1", "cat"], input=data, capture_output=True, timeout=60 * SLOW, check=True
    )
    assert done.stdout == data
    assert crun("b:1", "cat", input="not read").stdout == ""


def test_environment_user_and_directory(image: Path, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# comment\nFROM_FILE='quoted'\nINHERITED\n")
    arguments = ["-e", "A=1=2", "-eB", "--env-file", tmp_path / "env", "-u", "joe", "-w", "/tmp", "--hostname", "box"]
    done = crun(*arguments, "b:1", "sh", "-c", "env; id; pwd; hostname", env=os.environ | {"B": "b", "INHERITED": "yes"})
    for line in ("A=1=2", "B=b", "FROM_FILE='quoted'", "INHERITED=yes", "HOME=/home/joe", "HOSTNAME=box", "/tmp", "box"):
        assert line in done.stdout.splitlines(), done.stdout
    assert "uid=1000(joe) gid=1001(joe) groups=1001(joe),2000(extra)" in done.stdout


def test_a_numeric_user_is_not_looked_up_as_a_name(image: Path) -> None:
    assert crun("-u", "7", "b:1", "id", "-u").stdout == "7\n"


def test_volumes_are_bound_and_read_only_where_asked(image: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("in")
    done = crun(
        "-v", f"{tmp_path}:/rw", "-v", f"{tmp_path}:/ro:ro", "b:1", "sh", "-c", "cat /rw/in; touch /rw/out; touch /ro/no"
    )
    assert done.stdout == "in" and (tmp_path / "out").exists() and not (tmp_path / "no").exists()
    assert "Read-only file system" in done.stderr


def test_the_image_is_writable_for_the_container_only(image: Path) -> None:
    assert crun("b:1", "sh", "-c", "echo x > /new && cat /new").stdout == "x\n"
    assert crun("b:1", "ls", "/new").returncode != 0
    assert "Read-only file system" in crun("--read-only", "b:1", "touch", "/new").stderr


def test_the_defaults_are_dockers(image: Path) -> None:
    done = crun(
        "--network",
        "none",
        "b:1",
        "sh",
        "-c",
        "grep Cap /proc/self/status; cat /proc/keys | head -c 1; echo x >/proc/sys/kernel/domainname; ls /sys/firmware; ip link",
    )
    lines = done.stdout.splitlines()
    assert (
        "CapEff:\t00000000a80425fb" in lines and "CapInh:\t0000000000000000" in lines and "CapAmb:\t0000000000000000" in lines
    )
    assert "Read-only file system" in done.stderr
    assert [line for line in lines if ": " in line and "lo" in line] and "eth" not in done.stdout
    descriptors = crun("b:1", "ls", "/proc/self/fd").stdout.split()
    assert descriptors == ["0", "1", "2", "3"], "3 is ls's own"


def read_terminal(master: int) -> bytes:
    """What is there, empty once nobody holds the other end (Linux says EIO)."""
    try:
        return os.read(master, 1024)
    except OSError:
        return b""


def test_a_terminal_is_given_with_t(image: Path) -> None:
    assert crun("-t", "b:1", "tty").stdout == "/dev/pts/0\n"
    assert "not a tty" in crun("b:1", "tty").stdout
    master, slave = pty.openpty()
    with subprocess.Popen(
        [BIN / "crun", "run", "--rm", "-it", "b:1", "sh"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as child:
        os.close(slave)
        os.write(master, b"echo a$((40+2))z; exit 5\n")
        seen = b""
        while data := read_terminal(master):
            seen += data
        assert b"a42z" in seen
        assert child.wait(30 * SLOW) == 5
    os.close(master)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([BIN / "crun", "run", "--rm", *arguments], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(image: Path, number: signal.Signals) -> None:
    with start("b:1", "sh", "-c", f"trap 'exit 33' {number.value}; echo ready; while :; do sleep 0.05; done") as child:
        child.send_signal(number)
        assert child.wait(30 * SLOW) == 33


def test_a_command_ended_by_a_signal_is_128_and_its_number(image: Path) -> None:
    assert crun("b:1", "sh", "-c", "sh -c 'kill -9 $$'; exit $?").returncode == 137


def test_a_container_whose_state_was_removed_dies_with_its_crun_all_the_same(image: Path) -> None:
    with start("b:1", "sh", "-c", f"echo ready; exec sleep 4343.{os.getpid()}") as child:
        shutil.rmtree(image / "run" / "runc")
        child.kill()
    assert until(
        lambda: not subprocess.run(["pgrep", "-f", f"sleep 4343.{os.getpid()}"], capture_output=True, check=False).stdout
    )


_ENDED_AT = """
import os, signal, sys
left, me = int(sys.argv.pop(1)), os.getpid()
def on_event(name, arguments):
    global left
    if name in ("os.mkdir", "os.symlink", "os.rename", "open") and os.getpid() == me:
        if any(isinstance(one, str) and "state/" in one for one in arguments):
            left -= 1
            if left == 0:
                os.kill(me, signal.SIGKILL)
sys.addaudithook(on_event)
from cli.crun import entry
sys.exit(entry())
"""


def test_a_crun_that_is_killed_at_each_change_of_its_state_leaves_nothing(image: Path) -> None:
    for step in range(1, 100):
        words = ["run", "--rm", "--name", "early", "-v", "/v", "b:1", "true"]
        done = subprocess.run([sys.executable, "-c", _ENDED_AT, str(step), *words], check=False)
        # Between its mark of life and the guard only the mark is left, for the next container to remove.
        assert until(lambda: not [p for p in leftovers(image) if "/alive/" not in p]), (step, leftovers(image))
        assert until(lambda: not list((image / "state" / "volumes").glob("[!.]*"))), step
        if done.returncode == 0:
            break
    assert step > 10
    assert crun("b:1", "true").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_crun_that_is_ended_at_any_moment_leaves_nothing(image: Path, number: signal.Signals) -> None:
    """From before its first line to after the command runs: whoever is left tidies up."""
    for delay_ms in range(0, 200, 40):
        loop = f"trap 'exit 0' TERM; while :; do sleep 0.05; done; true 4141.{os.getpid()}"
        child = subprocess.Popen([BIN / "crun", "run", "--rm", "--name", "early", "b:1", "sh", "-c", loop])
        time.sleep(delay_ms / 1000)  # the moment is what is tested
        for _ in range(30):
            child.send_signal(number)
            try:
                child.wait(1)
                break
            except subprocess.TimeoutExpired:
                continue  # it came before the shell's trap, and the kernel keeps such signals from an init
        # As above.
        assert until(lambda: not [p for p in leftovers(image) if "/alive/" not in p]), (delay_ms, leftovers(image))
    assert crun("b:1", "true").returncode == 0
    assert subprocess.run(["pgrep", "-f", f"true 4141.{os.getpid()}"], capture_output=True, check=False).returncode == 1


def test_what_a_crash_of_the_machine_leaves_is_removed_by_the_next_container(image: Path) -> None:
    dead = "d" * 64
    for path in (image / "state" / "alive", image / "state" / "containers" / dead / "upper" / "deep"):
        path.mkdir(parents=True, exist_ok=True)
    (image / "state" / "alive" / dead).touch()
    assert crun("b:1", "true").returncode == 0


def test_a_container_with_very_deep_directories_keeps_its_exit_code_and_leaves_nothing(image: Path) -> None:
    script = "i=0; while [ $i -lt 1300 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done 2>/dev/null; exit 7"
    assert crun("b:1", "sh", "-c", script).returncode == 7


def test_a_name_taken_over_from_a_killed_crun_stays_with_its_new_holder(image: Path) -> None:
    for _ in range(4):
        with start("--name", "web", "b:1", "sh", "-c", f"echo ready; exec sleep 4040.{os.getpid()}") as old:
            old.kill()
            old.wait()
            assert until(lambda: crun("--name", "web", "b:1", "true").returncode == 0)
        with start("--name", "web", "b:1", "sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done") as new:
            assert os.path.lexists(image / "state" / "names" / "web")
            assert "'web' is in use" in crun("--name", "web", "b:1", "true").stderr
            new.terminate()


def test_devices_and_named_pipes_of_the_host_keep_their_owner(image: Path, tmp_path: Path) -> None:
    """The runtime gives the command's user what it gets as a standard stream."""
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "zero", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    keeper = os.open(tmp_path / "fifo", os.O_RDWR)
    os.write(keeper, b"from the fifo")
    for name in ("zero", "fifo"):
        with open(tmp_path / name, "rb") as file:
            done = crun("-i", "-u", "joe", "b:1", "head", "-c", "4", stdin=file)
        assert (done.returncode, done.stdout) == (0, "\0\0\0\0" if name == "zero" else "from"), done.stderr
        assert (tmp_path / name).stat().st_uid == 0
    os.close(keeper)


def test_output_that_cannot_be_written_is_an_error(image: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", tmp_path / "full"], check=True)
    try:
        with open(tmp_path / "full" / "out", "wb") as out:
            os.write(out.fileno(), bytes(4096))
            done = subprocess.run(
                [BIN / "crun", "run", "--rm", "-u", "joe", "b:1", "sh", "-c", "echo important"],
                stdout=out, stderr=subprocess.PIPE, check=False, timeout=60 * SLOW,
            )  # fmt: skip
        assert done.returncode == 125 and b"No space left on device" in done.stderr
    finally:
        subprocess.run(["umount", tmp_path / "full"], check=True)


def test_rlimits_are_the_callers(image: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (777, 777))

    assert crun("b:1", "sh", "-c", "ulimit -n", preexec_fn=limit).stdout == "777\n"


def test_the_root_directory_is_as_in_the_image(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_rootfs(tmp_path / "rootfs")
    os.chown(tmp_path / "rootfs", 1000, 1001)
    (tmp_path / "rootfs").chmod(0o711)
    os.utime(tmp_path / "rootfs", (1_000_000_000, 1_000_000_000))
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    done = cmd(
        "crun", "run", "--rm", "--read-only", "--store", "./store", "b:1", "stat", "-c", "%a %u %g %Y", "/", cwd=tmp_path
    )
    assert done.stdout == b"711 1000 1001 1000000000\n", done.stderr


def test_a_container_dies_with_a_killed_crun_and_leaves_nothing(image: Path) -> None:
    with start("--name", "victim", "b:1", "sh", "-c", f"echo ready; exec sleep 4242.{os.getpid()}") as child:
        child.kill()
        child.wait()
    assert until(lambda: not leftovers(image)), leftovers(image)
    assert subprocess.run(["pgrep", "-f", f"sleep 4242.{os.getpid()}"], capture_output=True, check=False).returncode == 1


def test_a_name_is_taken_while_its_container_runs(image: Path) -> None:
    with start("--name", "web", "b:1", "sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done") as child:
        done = crun("--name", "web", "b:1", "true")
        assert done.returncode == 125 and "'web' is in use" in done.stderr
        child.terminate()
    assert crun("--name", "web", "b:1", "true").returncode == 0


def test_containers_share_one_mount_that_goes_with_the_last(home: Path, tmp_path: Path, cmd: Run) -> None:
    """Nothing is mounted beforehand: eight at once mount once, all work, and nothing is left."""
    make_rootfs(tmp_path / "rootfs")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    children = [subprocess.Popen([BIN / "crun", "run", "--rm", "b:1", "sh", "-c", f"exit {n}"]) for n in range(8)]
    assert [child.wait(60 * SLOW) for child in children] == list(range(8))
    assert until(lambda: not leftovers(tmp_path)), leftovers(tmp_path)


def test_a_container_that_starts_beside_a_long_one_does_not_wait_for_it(home: Path, tmp_path: Path, cmd: Run) -> None:
    """Two of one image start at once; one mounts it and stays.  The other must see that and go on."""
    make_rootfs(tmp_path / "rootfs")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    for _ in range(5):
        with subprocess.Popen([BIN / "crun", "run", "--rm", "-i", "b:1", "cat"], stdin=subprocess.PIPE) as long:
            others = [subprocess.Popen([BIN / "crun", "run", "--rm", "b:1", "true"]) for _ in range(3)]
            assert [other.wait(30 * SLOW) for other in others] == [0] * 3
            assert long.stdin
            long.stdin.close()
            assert long.wait(30 * SLOW) == 0
        assert until(lambda: not leftovers(tmp_path)), leftovers(tmp_path)


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_an_image_with_a_link_where_the_system_mounts_is_refused(home: Path, tmp_path: Path, cmd: Run, name: str) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "rootfs" / name).rmdir()
    (tmp_path / "rootfs" / name).symlink_to("/tmp")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    done = cmd("crun", "run", "--rm", "b:1", "true")
    assert done.returncode == 125 and f"'/{name}' is not a directory".encode() in done.stderr


def test_an_image_whose_etc_is_a_link_out_of_the_root_touches_nothing_of_the_hosts(
    home: Path, tmp_path: Path, cmd: Run
) -> None:
    make_rootfs(tmp_path / "rootfs")
    outside = tmp_path / "outside"
    (tmp_path / "rootfs" / "etc").rename(outside)
    (tmp_path / "rootfs" / "etc").symlink_to(f"../../../../../..{outside}")
    (outside / "hosts").write_text("the host's own\n")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    done = cmd("crun", "run", "--rm", "-u", "joe", "b:1", "true")
    assert done.returncode == 125 and b"no user 'joe'" in done.stderr, "the host's passwd is not read"
    done = cmd("crun", "run", "--rm", "--hostname", "box", "b:1", "cat", "/etc/hosts")
    assert done.returncode == 0 and b"\tbox " in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_mount_that_another_user_calls_ours_is_not_run(image: Path, tmp_path: Path) -> None:
    """Anybody can serve whatever they like under the name of an image; here it is a server that never answers."""
    from cafs import linux

    digest = subprocess.run([BIN / "cafs-store", "ls"], capture_output=True, text=True, check=True).stdout.split()[1]
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=1000,group_id=1000,allow_other"
    subprocess.run([BIN / "cafs-mount", "--unmount", image / "mnt"], check=True)
    linux.mount(f"cafs:{digest}", str(tmp_path), "fuse.cafs", 0, options)
    try:
        done = crun("b:1", "sh", "-c", "echo right")
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
    finally:
        linux.umount(str(tmp_path), linux.MNT_DETACH)
        os.close(device)
        subprocess.run([BIN / "cafs-mount", "b:1", image / "mnt"], check=True)


def test_users_are_looked_up_inside_the_image_whatever_its_links_say(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "secret").write_text("spy:x:4711:4711::/:/bin/sh\n")
    (tmp_path / "rootfs" / "etc" / "passwd").unlink()
    (tmp_path / "rootfs" / "etc" / "passwd").symlink_to(f"../../../../../..{tmp_path}/secret")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "b:1").returncode == 0
    done = cmd("crun", "run", "--rm", "-u", "spy", "b:1", "true")
    assert done.returncode == 125 and b"no user 'spy'" in done.stderr


def test_run_loads_neither_click_nor_other_slow_modules(image: Path) -> None:
    slow = ["click", "rich", "dataclasses", "inspect", "typing", "subprocess", "logging", "zstandard", "shutil"]
    code = (
        "import sys; from cli.crun import main\n"
        "assert main(['run', '--rm', 'b:1', 'true']) == 0\n"
        f"print([m for m in {slow} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60 * SLOW, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_missing_runc_is_exit_8_with_a_hint(image: Path) -> None:
    done = crun("b:1", "true", env={k: v for k, v in os.environ.items() if k.startswith("CAFS_")} | {"PATH": "/nonexistent"})
    assert done.returncode == 8 and "apt install runc" in done.stderr


@pytest.mark.needs("setpriv")
def test_without_root_and_without_subordinate_ids_is_exit_8_with_a_hint(image: Path) -> None:
    code = "import sys; sys.argv = ['crun', 'run', '--rm', 'b:1', 'true']; from cli.crun import entry; entry()"
    interpreter, environment = sys.executable, dict(os.environ)
    if os.path.realpath(interpreter).startswith("/root/"):
        interpreter, environment["PYTHONPATH"] = "/usr/bin/python3", os.pathsep.join(sys.path[1:])
    base = Path("/var/tmp") / f"cafs-nobody-{os.getpid()}"
    base.mkdir(mode=0o700)
    os.chown(base, 65534, 65534)
    environment |= {f"CAFS_{name}": str(base / name.lower()) for name in ("STORE", "CACHE", "RUN", "STATE")}
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", interpreter, "-c", code],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent, env=environment,
    )  # fmt: skip
    shutil.rmtree(base)
    if "No module named" in done.stderr or ("Permission denied" in done.stderr and "cafs" not in done.stderr):
        pytest.skip("this interpreter cannot be read by another user")
    assert done.returncode == 8 and "has no subordinate ids" in done.stderr and "usermod" in done.stderr, done.stderr


@pytest.mark.parametrize("engine", ["kernel", "fuse"])
def test_a_container_runs_on_either_engine_and_leaves_nothing(home: Path, tmp_path: Path, cmd: Run, engine: str) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "rootfs" / "big").write_bytes(b"big" * 3_000_000)
    if engine == "fuse":
        (tmp_path / "rootfs" / ".cafs-objects").mkdir()  # what the kernel engine does not mount
    cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "x:1")
    script = "echo more >> /etc/group; mv /home /house; grep -c . /etc/group; stat -c %s /big; grep overlay /proc/mounts"
    done = cmd("crun", "run", "--rm", "x:1", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    count, size, line = done.stdout.split(b"\n", 2)
    assert (count, size) == (b"4", b"9000000") and (b"datadir+" in line) == (engine == "kernel")
    assert mounts_below(home) == []
    wait_until(lambda: lazy_pids(home) == [])


def test_a_pipe_that_is_carried_holds_more(image: Path) -> None:
    reader, writer = os.pipe()
    try:
        command = [BIN / "crun", "run", "-i", "--rm", "--network", "none", "b:1", "true"]
        subprocess.run(command, stdin=reader, check=True, timeout=60 * SLOW)
        assert fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) == 1 << 20
    finally:
        os.close(reader)
        os.close(writer)


def test_a_shell_completes_commands_flags_containers_and_images(image: Path, tmp_path: Path) -> None:
    subprocess.run([BIN / "crun", "create", "--name", "completed", "b:1", "true"], capture_output=True, check=True)
    script = tmp_path / "completion"
    script.write_bytes(subprocess.run([BIN / "crun", "completion", "bash"], capture_output=True, check=True).stdout)
    ask = f'. {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _crun; echo "${{COMPREPLY[*]}}"'
    path = f"{BIN}:{os.environ['PATH']}"
    for words, wanted in (
        (["st"], "start stop stats"),
        (["run", "--mem"], "--memory --memory-swap --memory-reservation"),
        (["rm", "comp"], "completed"),
        (["run", "b:"], "b:1"),
        (["logs", "--fo"], "--follow"),
        (["run", "--env-file", "/etc/hostn"], "/etc/hostname"),
        (["nothing", "x"], ""),
    ):
        command = ["bash", "-c", ask, "bash", "crun", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path})
        assert done.stdout.strip() == wanted, words
    for shell in ("zsh", "fish"):
        said = subprocess.run([BIN / "crun", "completion", shell], capture_output=True, text=True, check=True).stdout
        assert "memory-swap" in said and "commit" in said
    assert subprocess.run([BIN / "crun", "completion", "tcsh"], capture_output=True, check=False).returncode == 2
    assert subprocess.run([BIN / "crun", "rm", "completed"], capture_output=True, check=False).returncode == 0


def test_the_runtime_knows_nothing_of_the_callers_environment(image: Path, tmp_path: Path) -> None:
    """runc would wait for a command to tell systemd that it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "n"))
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "n"), "LISTEN_FDS": "3"}
        for words in ([], ["-d"]):
            command = [BIN / "crun", "run", *words, "--name", "told", "--network", "none", "b:1", "echo", "x"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30 * SLOW, check=False)
            assert done.returncode == 0, done.stderr
            assert subprocess.run([BIN / "crun", "rm", "-f", "told"], capture_output=True, check=False).returncode == 0


def test_a_container_stands_on_a_mount_of_its_own_store_and_cache(image: Path, tmp_path: Path) -> None:
    """The image is mounted by another store, and by another cache, too."""
    subprocess.run([BIN / "cafs-store", "push", "b:1", tmp_path / "store"], check=True)
    here = mountinfo.at(str(image / "mnt"))
    assert here
    cache, lazy = (path for key, path in here.layers if key == "datadir+")
    for variable, has_cache, has_lazy in (("NONE", True, True), ("CAFS_CACHE", False, False), ("CAFS_STORE", True, False)):
        done = crun("b:1", "cat", "/proc/self/mounts", env=os.environ | {variable: str(tmp_path / variable[5:].lower())})
        root = done.stdout.splitlines()[0]
        assert (f"datadir+={cache}," in root, f"datadir+={lazy}," in root) == (has_cache, has_lazy), root
