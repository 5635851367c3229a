"""The fuse engine's own server: killed under its readers, told to reload, without a cache, as a recorder, from fstab."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafs import mountinfo
from tests.conftest import BIN, Run, make_files, pid_of, wait_until
from tests.test_lazy import READER, digests
from tests.test_mount import server_pid
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "fusermount3")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_files(tmp_path / "tree", 100, (9 << 20) + 5)


@pytest.fixture
def point(tmp_path: Path, tree: Path, cmd: Run) -> Path:
    """Where x:1 of the tree is mounted."""
    point = tmp_path / "mnt"
    point.mkdir()
    assert cmd("cafs-index", "create", tree, "-t", "x:1").returncode == 0
    done = cmd("cafs-mount", "--engine", "fuse", "x:1", point, "--log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    return point


def kill(home: Path, name: str) -> None:
    """Kill one of the two, and wait until the other has started another."""
    pid = pid_of(home, name, "fuse")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid_of(home, name, "fuse") != pid)


def test_forty_kills_fail_no_read_of_a_tree(home: Path, tmp_path: Path, tree: Path, point: Path) -> None:
    """Slow (some 10 s) because it is what sets this server apart from pyfuse3's."""
    (tmp_path / "names").write_text(json.dumps(digests(tree)))
    command = [sys.executable, "-c", READER, point, "1", tmp_path / "done", tmp_path / "names"]
    rng = random.Random(3)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        kills = 0
        while kills < 40 or not (tmp_path / "done.1").exists():  # until there were more than 100 reads
            time.sleep(rng.uniform(0, 0.1))  # at random moments
            kill(home, rng.choice(["worker", "worker", "supervisor"]))
            kills += 1
        (tmp_path / "done").touch()
        reads, wrong, failed, slowest = json.loads(reader.communicate(timeout=60 * SLOW)[0])
    print(f"{kills} kills: {reads} reads, {wrong} wrong, {len(failed)} failed, slowest {slowest:.2f} s")
    assert (wrong, failed) == (0, []) and slowest < 5 * SLOW and reads > 100


def test_without_its_cache_a_new_server_goes_on(home: Path, tree: Path, point: Path) -> None:
    """The cache is safe to delete at any time; the columns of the tree stay open."""
    assert (point / "1").read_bytes() == (tree / "1").read_bytes()
    while (home / "cache").exists():  # neighbours are still being written
        shutil.rmtree(home / "cache", ignore_errors=True)
    kill(home, "worker")
    for name in ("1", "2", "large"):
        assert (point / name).read_bytes() == (tree / name).read_bytes()
    assert sorted(os.listdir(point)) == sorted(os.listdir(tree))


def test_damaged_columns_are_made_anew(home: Path, tree: Path, point: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    (columns,) = (home / "cache" / "columns").iterdir()
    for data in (b"", b"junk", columns.read_bytes()[:-1], columns.read_bytes()[:-8] + b"12345678"):
        columns.chmod(0o600)
        columns.write_bytes(data)
        done = cmd("cafs-mount", "--engine", "fuse", "x:1", point)
        assert done.returncode == 0, done.stderr
        assert (point / "3").read_bytes() == (tree / "3").read_bytes()
        assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_a_new_program_takes_over_a_tree(home: Path, tree: Path, point: Path, cmd: Run) -> None:
    worker = pid_of(home, "worker", "fuse")
    with open(point / "large", "rb", buffering=0) as file:
        head = file.read(1 << 20)
        assert cmd("cafs-mount", "--reload").returncode == 0
        wait_until(lambda: pid_of(home, "worker", "fuse") != worker)
        assert head + b"".join(iter(lambda: file.read(1 << 20), b"")) == (tree / "large").read_bytes()


def test_what_is_read_through_a_tree_can_be_recorded(home: Path, tmp_path: Path, tree: Path, point: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    done = cmd("cafs-mount", "--engine", "fuse", "x:1", point, "--record", tmp_path / "record")
    assert done.returncode == 0, done.stderr
    for name in ("7", "5", "large"):
        (point / name).read_bytes()
    kill(home, "worker")
    (point / "9").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    assert cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record").returncode == 0
    shutil.rmtree(home / "cache")
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", point).returncode == 0
    wait_until(lambda: len(list((home / "cache" / "data" / ".cafs-objects").glob("*/*"))) == 4)  # of themselves
    assert (point / "9").read_bytes() == (tree / "9").read_bytes()


def test_a_tree_ends_when_the_mount_does_and_leaves_nothing(home: Path, point: Path, cmd: Run) -> None:
    pids = [pid_of(home, "worker", "fuse"), server_pid(cmd, point)]
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    assert list((home / "run" / "fuse").iterdir()) == list((home / "run" / "mounts").iterdir()) == []
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/cmdline") and _is_live(pid) for pid in pids))
    assert list((home / "store" / "leases").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_what_is_mounted_in_the_foreground(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, number: signal.Signals
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tmp_path / "f").mkdir()
    command = [BIN / "cafs-mount", "--foreground", "--engine", "fuse", "x:1", tmp_path / "f"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as mount:
        wait_until(lambda: (tmp_path / "f" / "9").exists())
        mount.send_signal(number)
        mount.wait(20 * SLOW)
        assert not os.path.ismount(tmp_path / "f") and list((home / "run" / "mounts").iterdir()) == []


def test_a_mount_can_be_made_by_an_idle_task(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tmp_path / "f").mkdir()
    idle = ["setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "chrt", "-i", "0"]
    subprocess.run([*idle, BIN / "cafs-mount", "--engine", "fuse", "x:1", tmp_path / "f"], check=True)
    assert (tmp_path / "f" / "9").read_bytes() == (tree / "9").read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "f").returncode == 0


def _is_live(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_fstab_can_name_an_image(home: Path, tree: Path, point: Path, cmd: Run) -> None:
    """As mount(8) calls it: mount.cafs SOURCE DIR -o OPTIONS."""
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    options = f"ro,nofail,noauto,engine=fuse,store={home}/store,x-systemd.automount,_netdev"
    done = subprocess.run([BIN / "mount.cafs", "x:1", point, "-o", options], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (point / "4").read_bytes() == (tree / "4").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    done = subprocess.run([BIN / "mount.cafs", "x:1", point, "-o", "engin=fuse"], capture_output=True, check=False)
    assert done.returncode == 1 and b"unknown option 'engin'" in done.stderr


def test_fstab_can_restrict_what_a_mount_is_used_for(home: Path, tree: Path, point: Path, cmd: Run) -> None:
    shutil.copy("/bin/true", tree / "true")
    cmd("cafs-index", "create", tree, "-t", "p:1")
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    for engine, options, words, runs in (
        ("kernel", "ro,noexec,noatime", {"ro", "noexec", "nosuid", "nodev", "noatime"}, False),
        ("fuse", "noexec,nosymfollow", {"ro", "noexec", "nosuid", "nodev", "nosymfollow"}, False),
        ("kernel", "users,exec,suid,rw,ro", {"ro", "nodev"}, True),
        ("kernel", f"ro,upper={home}/up", {"ro", "nosuid", "nodev"}, True),
        ("kernel", f"defaults,upper={home}/up", {"rw", "nosuid", "nodev"}, True),
    ):
        done = subprocess.run([BIN / "mount.cafs", "p:1", point, "-o", f"{options},engine={engine}"], capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        here = mountinfo.at(str(point))
        assert here and here.words - {"relatime"} == words, options
        try:
            subprocess.run([point / "true"], check=True)
            assert runs, options
        except PermissionError:
            assert not runs, options
        assert cmd("cafs-mount", "p:1", point).returncode == 6, "it is mounted with other options"
        assert cmd("cafs-mount", "--unmount", point).returncode == 0
    for option in ("sync,upper=/nowhere", "upper=", "store=", "remount"):
        done = subprocess.run([BIN / "mount.cafs", "p:1", point, "-o", option], capture_output=True, check=False)
        assert done.returncode == 1, option
    assert subprocess.run([BIN / "mount.cafs", "p:1", point, "-N", "1"], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--list", "--rw", "x"],
        ["--unmount", "DIR", "--foreground"],
        ["--json", "x:1", "DIR"],
        ["--rw", "", "x:1", "DIR"],
        ["--bwlimit", "1M", "x:1", "DIR"],
        ["--record", "r", "--prefetch", "all", "x:1", "DIR"],
    ],
)
def test_an_option_that_would_do_nothing_is_refused(home: Path, tmp_path: Path, cmd: Run, words: list[str]) -> None:
    done = cmd("cafs-mount", *[str(tmp_path) if word == "DIR" else word for word in words])
    assert done.returncode == 2, done.stderr


def test_what_an_engine_cannot_do_is_said(home: Path, tmp_path: Path, tree: Path, point: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    done = cmd("cafs-mount", "--engine", "pyfuse3", "x:1", point, "--record", tmp_path / "record")
    assert done.returncode == 8 and b"pyfuse3 engine can neither record nor prefetch" in done.stderr
    done = cmd("cafs-mount", "--engine", "fuse", "x:1", point, "--rw", tmp_path / "upper")
    assert done.returncode == 8 and b"only the kernel engine can be written to" in done.stderr
    assert not (tmp_path / "record").exists() and not os.path.ismount(point)
