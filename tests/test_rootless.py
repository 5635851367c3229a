"""crun of an ordinary user with subordinate ids: the same commands, in a user namespace of theirs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.crunning import make_rootfs
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox", "unshare", "setpriv", "newuidmap")
SLOT = os.getpid() % 4096  # another suite on this machine has other ids
USER, FIRST, COUNT = 50_000 + SLOT, 3_000_000 + SLOT * 65536, 65536
PROGRAM = "import sys; sys.argv[0] = 'x'; import importlib; importlib.import_module(sys.argv.pop(1)).entry()"


class Ordinary:
    """A user that this host does not have: /etc/passwd, /etc/subuid and /dev/fuse are its own, in a mount namespace."""

    def __init__(self, base: Path) -> None:
        self.base = base
        (base / "passwd").write_text(Path("/etc/passwd").read_text() + f"ordinary:x:{USER}:{USER}::{base}/home:/bin/sh\n")
        self.give(f"ordinary:{FIRST}:{COUNT}\n")
        os.mknod(base / "fuse", 0o020666, os.makedev(10, 229))
        os.chmod(base / "fuse", 0o666)
        for name in ("home", "run"):
            (base / name).mkdir(mode=0o700)
            os.chown(base / name, USER, USER)
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": f"{base}/home",
            "CAFS_RUN": f"{base}/run",
        }
        self.interpreter = sys.executable
        if os.path.realpath(self.interpreter).startswith("/root/"):  # a user cannot start it
            self.interpreter = "/usr/bin/python3"
            self.environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path[1:]])

    def give(self, ids: str) -> None:
        (self.base / "sub").write_text(ids)

    def __call__(self, module: str, *words: object, **options: object) -> subprocess.CompletedProcess[str]:
        binds = "".join(
            f"mount --bind {self.base}/{one} {to}; " for one, to in (("passwd", "/etc/passwd"), ("fuse", "/dev/fuse"))
        )
        binds += f"touch /etc/subuid /etc/subgid; mount --bind {self.base}/sub /etc/subuid; mount --bind {self.base}/sub /etc/subgid; "
        drop = [
            "setpriv",
            f"--reuid={USER}",
            f"--regid={USER}",
            "--clear-groups",
            self.interpreter,
            "-c",
            PROGRAM,
            f"cli.{module}",
        ]
        command = [shutil.which("unshare"), "-m", "/bin/sh", "-c", binds + 'exec "$@"', "sh", *drop, *map(str, words)]
        options.setdefault("env", self.environment)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60 * SLOW, cwd=self.base / "home", **options
        )  # type: ignore[call-overload,no-any-return]

    def ok(self, *words: object, **options: object) -> str:
        done = self("crun", *words, **options)
        assert done.returncode == 0, (words, done.stderr)
        return str(done.stdout)

    def keeper(self) -> int:
        return int((self.base / "run" / "rootless" / "keeper").read_text().split()[0])

    def processes(self) -> list[int]:
        """Of the user and its subordinate ids, but for dead ones."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                owner = os.stat(f"/proc/{pid}").st_uid
                is_dead = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if (owner == USER or FIRST <= owner < FIRST + COUNT) and not is_dead:
                found.append(pid)
        return found


@pytest.fixture
def ordinary(tmp_path: Path) -> Iterator[Ordinary]:
    base = Path("/var/tmp") / f"cafs-rootless-{os.getpid()}"
    base.mkdir(mode=0o755)
    user = Ordinary(base)
    try:
        rootfs = base / "rootfs"
        make_rootfs(rootfs)
        (rootfs / "of7").write_text("text")
        os.chown(rootfs / "of7", 7, 8)
        done = user("cafs_index", "create", rootfs, "-t", "b:1")
        if "No module named" in done.stderr or "ermission denied" in done.stderr:
            pytest.skip("this interpreter cannot be read by another user")
        assert done.returncode == 0, done.stderr
        yield user
        for container in user.ok("ps", "-aq").split():
            user.ok("rm", "-f", container)
        user.ok("gc")
        wait_until(lambda: user.processes() == [])
    finally:
        for pid in user.processes():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: user.processes() == [])
        shutil.rmtree(base)


def test_commands_run_with_the_ids_of_the_image_shifted_to_those_of_the_user(ordinary: Ordinary) -> None:
    (ordinary.base / "home" / "v").mkdir()
    os.chown(ordinary.base / "home" / "v", USER, USER)
    show = "id -u; stat -c %u:%g /of7; head -c 1 /of7; touch /v/of0; touch /v/of9; chown 9:9 /v/of9; echo >> /of7; cat"
    done = ordinary("crun", "run", "-i", "--rm", "-v", "./v:/v", "b:1", "sh", "-c", show, input="given")
    assert done.stdout.splitlines() == ["0", "7:8", "tgiven"], done.stderr
    owners = {path.name: path.stat().st_uid for path in (ordinary.base / "home" / "v").iterdir()}
    assert owners == {"of0": USER, "of9": FIRST + 8}
    assert ordinary("crun", "run", "--rm", "b:1", "sh", "-c", "exit 7").returncode == 7
    assert ordinary.ok("run", "--rm", "-u", "7", "b:1", "sh", "-c", "id -u; touch /bin/x || echo refused").split()[0] == "7"
    links = ordinary.ok("run", "--rm", "b:1", "sh", "-c", "ip -o link").splitlines()
    assert len(links) == 1 and " lo:" in links[0], "no network but its own"
    assert len(ordinary.ok("run", "--rm", "--network", "host", "b:1", "ip", "-o", "link").splitlines()) >= 1
    assert ordinary.ok("run", "--rm", "-v", "data:/d", "b:1", "sh", "-c", "echo kept > /d/f") == ""
    assert ordinary.ok("run", "--rm", "-v", "data:/d", "b:1", "cat", "/d/f") == "kept\n"


def test_a_container_in_the_background_is_looked_after_from_other_commands(ordinary: Ordinary) -> None:
    ordinary.ok("run", "-d", "--name", "bg", "b:1", "sh", "-c", "while :; do echo x; sleep 0.02; done")
    assert ordinary.ok("exec", "bg", "id", "-u") == "0\n"
    assert "sleep" in ordinary.ok("top", "bg") and "x\n" in ordinary.ok("logs", "bg")
    ordinary.ok("pause", "bg")
    assert json.loads(ordinary.ok("inspect", "bg"))["State"]["Status"] == "paused"
    before = ordinary.ok("logs", "bg")
    assert ordinary.ok("logs", "bg") == before
    ordinary.ok("unpause", "bg")
    ordinary.ok("exec", "bg", "sh", "-c", "echo new > /etc/new; rm /bin/seq; mkdir /bin/seq")
    assert ordinary.ok("diff", "bg").splitlines() == ["C /bin", "A /bin/seq", "C /etc", "A /etc/new"]
    ordinary.ok("cp", "bg:/etc/new", ordinary.base / "home" / "copied")
    assert (ordinary.base / "home" / "copied").read_text() == "new\n"
    ordinary.ok("commit", "bg", "made:1")
    assert ordinary.ok("run", "--rm", "made:1", "cat", "/etc/new") == "new\n"
    os.kill(ordinary.keeper(), signal.SIGKILL)
    assert ordinary.ok("exec", "bg", "cat", "/etc/new") == "new\n", "the namespaces live on with the mount's server"
    ordinary.ok("stop", "-t", "0", "bg")
    assert json.loads(ordinary.ok("inspect", "bg"))["State"]["ExitCode"] == 137
    ordinary.ok("start", "bg")
    assert ordinary.ok("exec", "bg", "cat", "/etc/new") == "new\n"


def test_nothing_is_left_after_a_foreground_container_but_a_process_that_waits(ordinary: Ordinary) -> None:
    ordinary.ok("run", "--rm", "b:1", "true")
    wait_until(lambda: ordinary.processes() == [ordinary.keeper()])
    assert list((ordinary.base / "run" / "images").iterdir()) == []


def test_what_is_missing_is_said_with_what_helps(ordinary: Ordinary) -> None:
    for words, code, said in (
        (["--network", "bridge"], 8, "--network none, or host"),
        (["--memory", "64m"], 8, "without root"),
        (["-p", "80:80"], 125, "-p needs a network"),
    ):
        done = ordinary("crun", "run", "--rm", *words, "b:1", "true")
        assert done.returncode == code and said in done.stderr, done.stderr
    assert ordinary("crun", "network", "create", "mine").returncode == 8
    ordinary.ok("gc")
    wait_until(lambda: ordinary.processes() == [])
    ordinary.give("somebody:1:2\n")
    done = ordinary("crun", "run", "--rm", "b:1", "true")
    assert done.returncode == 8 and "usermod --add-subuids" in done.stderr
    ordinary.give(f"ordinary:{FIRST}:{COUNT}\n")
    without = ordinary.base / "bin"
    without.mkdir()
    for name in ("sh", "mount", "touch", "setpriv", "runc"):
        (without / name).symlink_to(shutil.which(name) or "")
    done = ordinary("crun", "run", "--rm", "b:1", "true", env=ordinary.environment | {"PATH": str(without)})
    assert done.returncode == 8 and "apt install uidmap" in done.stderr


def test_a_file_of_a_user_that_has_no_number_here_is_named(ordinary: Ordinary) -> None:
    os.chown(ordinary.base / "rootfs" / "of7", 70_000, 8)
    assert ordinary("cafs_index", "create", ordinary.base / "rootfs", "-t", "far:1").returncode == 0
    done = ordinary("crun", "run", "--rm", "far:1", "true")
    assert done.returncode == 125 and "'/of7' belongs to user 70000" in done.stderr


def test_attributes_of_the_image_are_not_taken_for_the_overlays_own(ordinary: Ordinary) -> None:
    victim = ordinary.base / "rootfs" / "victim"
    victim.mkdir()
    (victim / "seen").write_text("seen")
    os.setxattr(victim, "user.overlay.opaque", b"y")
    os.setxattr(ordinary.base / "rootfs" / "of7", "user.overlay.redirect", b"/etc/passwd")
    os.setxattr(ordinary.base / "rootfs" / "of7", "user.overlay.metacopy", b"")
    os.setxattr(ordinary.base / "rootfs" / "of7", "user.kept", b"1")
    assert ordinary("cafs_index", "create", ordinary.base / "rootfs", "-t", "sly:1").returncode == 0
    assert ordinary.ok("run", "--rm", "sly:1", "sh", "-c", "cat /of7 /victim/seen") == "textseen"


def test_a_build_of_an_ordinary_user_has_the_owners_that_it_should(ordinary: Ordinary) -> None:
    context = ordinary.base / "home" / "context"
    context.mkdir()
    (context / "a").write_text("A")
    (context / "Dockerfile").write_text(
        "FROM b:1\nCOPY --chown=7:8 a /a\nRUN --mount=target=/m cat /m/a > /b; chown 9:9 /b; rm /bin/seq; mkdir /bin/seq\nRUN stat -c %u:%g /a /b\n"
    )
    os.chown(context, USER, USER)
    refused = ordinary("cbuild", context)
    assert refused.returncode == 8 and "--network none, or host" in refused.stderr
    done = ordinary("cbuild", "--network", "none", "-t", "made:1", context)
    assert done.returncode == 0 and "7:8\n" in done.stderr and "9:9\n" in done.stderr, done.stderr
    shown = ordinary("cafs_index", "ls", "-l", "made:1", "/b", "/bin/seq").stdout
    assert re.search(r"9 +9 +1 .*/b\n", shown) and re.search(r"^d.*/bin/seq\n", shown, re.M), shown
