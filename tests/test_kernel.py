"""The kernel engine: the same tree as the source and the fuse engine, shared lower mounts, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cafs import format as fmt
from cafs import image, linux, mountinfo, quota
from cafs.collect import collect
from cafs.store import Store
from tests.conftest import Run, lazy_pids, mounts_below, wait_until
from tests.test_mount import describe, make_everything

pytestmark = pytest.mark.needs("root", "fuse", "setcap", "setfacl")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (root / name).write_bytes(name.encode() * 3000)
    (root / "large").write_bytes(os.urandom((9 << 20) + 5))
    return root


def test_everything_is_as_in_the_source_and_through_the_fuse_engine(home: Path, tmp_path: Path, cmd: Run, kernel: Run) -> None:
    make_everything(tmp_path / "tree")
    cmd("cafs-index", "create", tmp_path / "tree", "-t", "all:1")
    mounted = kernel("all:1", tmp_path / "k", "--suid")
    assert mounted.returncode == 0, mounted.stderr
    (tmp_path / "f").mkdir()
    assert cmd("cafs-mount", "--engine", "fuse", "all:1", tmp_path / "f", "--suid").returncode == 0
    source, seen, other = (describe(tmp_path / name) for name in ("tree", "k", "f"))
    assert source.keys() == seen.keys() == other.keys()
    for path, what in source.items():
        assert seen[path] == what == other[path], path
    assert (tmp_path / "k" / "plain").stat().st_ino == (tmp_path / "k" / "sub" / "zz-link").stat().st_ino
    for one in mountinfo.mounts():
        if one.fstype.startswith(b"fuse.cafs") and one.point.startswith(os.fsencode(tmp_path)):
            ahead = Path(f"/sys/class/bdi/{one.device}/read_ahead_kb").read_text()
            assert ahead == "1024\n", "the kernel asks for a megabyte at once, not for 128 KiB"
    again = cmd("cafs-index", "create", tmp_path / "k", "-o", "-")
    assert again.stdout == cmd("cafs-index", "create", tmp_path / "tree", "-o", "-").stdout
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "k" / "new").touch()


def test_an_image_of_several_layers_is_mounted_without_merging(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    os.link(tree / "a", tree / "a2")
    os.link(tree / "a", tree / "a3")
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tree / "a2").unlink()
    (tree / "b").write_bytes(b"changed")
    (tree / "sub" / "c").unlink()
    (tree / "sub").rmdir()
    (tree / "sub").write_bytes(b"a file now")
    cmd("cafs-index", "create", tree, "--base", "x:1", "-t", "x:2")
    (tree / "sub").unlink()
    (tree / "sub").mkdir(0o711)
    (tree / "sub" / "d").write_bytes(b"d" * 100)
    made = cmd("cafs-index", "create", tree, "--base", "x:2", "-t", "x:3")
    assert made.returncode == 0, made.stderr
    assert kernel("x:3", tmp_path / "k").returncode == 0
    assert describe(tmp_path / "k") == describe(tree)
    options = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {tmp_path}/k " in line)
    assert options.count("lowerdir+=") == 3


def test_mounts_share_what_is_below_and_the_last_one_takes_it_away(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tree / "new").write_bytes(b"new")
    cmd("cafs-index", "create", tree, "--base", "x:1", "-t", "x:2")
    for number, name in enumerate(("x:1", "x:1", "x:2")):
        assert kernel(name, tmp_path / f"k{number}").returncode == 0
    below = mounts_below(home / "run")
    assert len(below) == 3 and len(lazy_pids(home)) == 4  # two layers, one LAZY
    again = kernel("x:2", tmp_path / "k2")
    assert again.returncode == 0 and kernel("x:1", tmp_path / "k2").returncode == 6
    assert cmd("cafs-mount", "--unmount", tmp_path / "k2").returncode == 0
    assert len(mounts_below(home / "run")) == 2
    with open(tmp_path / "k0" / "a", "rb"):
        assert cmd("cafs-mount", "--unmount", tmp_path / "k0").returncode == 6
    assert cmd("cafs-mount", "--unmount", tmp_path / "k0").returncode == 0
    assert (tmp_path / "k1" / "large").read_bytes() == (tree / "large").read_bytes()
    rows = [line.split("\t") for line in cmd("cafs-mount", "--list").stdout.decode().splitlines()]
    assert [(row[0], row[1], row[3]) for row in rows if row[0].startswith(str(home))] == [(f"{tmp_path}/k1", "x:1", "kernel")]


def test_what_a_crash_left_is_tidied_by_the_next_command(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    linux.umount(str(tmp_path / "k"))  # as if the command had died before it came to the rest
    assert len(mounts_below(home / "run")) == 2
    (tree / "other").write_bytes(b"1")
    cmd("cafs-index", "create", tree, "-t", "y:1")
    assert kernel("y:1", tmp_path / "k").returncode == 0
    for pid in lazy_pids(home):  # both at once: the mount is lost
        os.kill(pid, signal.SIGSTOP)
    for pid in lazy_pids(home):
        os.kill(pid, signal.SIGKILL)
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    assert kernel("x:1", tmp_path / "k").returncode == 0
    assert (tmp_path / "k" / "b").read_bytes() == b"b" * 3000


def test_any_character_may_be_in_a_path(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for name in ("CACHE", "STATE"):
        monkeypatch.setenv(f"CAFS_{name}", str(tmp_path / f"odd , : \\ {name} lowerdir=x"))
    point = tmp_path / "k , : \\ y"
    assert kernel("x:1", point).returncode == 0
    assert (point / "a").read_bytes() == b"a" * 3000
    assert (point / "large").read_bytes() == (tree / "large").read_bytes()


def test_a_writable_mount_keeps_what_was_written(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for turn in range(2):
        assert kernel("x:1", tmp_path / "k", "--rw", tmp_path / "up").returncode == 0
        assert (tmp_path / "k" / "a").read_bytes() == b"a" * 3000 + b"more" * turn
        with open(tmp_path / "k" / "a", "ab") as file:
            file.write(b"more")
        (tmp_path / "k" / f"new{turn}").touch()
        os.rename(tmp_path / "k" / f"new{turn}", tmp_path / "k" / "sub" / f"moved{turn}")
        assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    assert (tmp_path / "up" / "upper" / "a").read_bytes() == b"a" * 3000 + b"more" * 2
    assert sorted(os.listdir(tmp_path / "up" / "upper" / "sub")) == ["moved0", "moved1"]
    done = cmd("cafs-mount", "--engine", "fuse", "x:1", tmp_path / "k", "--rw", tmp_path / "up")
    assert done.returncode == 8 and b"kernel" in done.stderr


def test_what_the_engine_cannot_mount_goes_to_the_other_which_says_why(
    home: Path, tmp_path: Path, tree: Path, cmd: Run
) -> None:
    (tree / ".cafs-objects").mkdir()
    cmd("cafs-index", "create", tree, "-t", "x:1")
    point = tmp_path / "k"
    point.mkdir()
    done = cmd("cafs-mount", "--engine", "kernel", "x:1", point)
    assert done.returncode == 8 and b".cafs-objects" in done.stderr, done.stderr
    done = cmd("cafs-mount", "-v", "x:1", point)
    assert done.returncode == 0 and b"using the fuse engine" in done.stderr
    assert (point / "a").read_bytes() == b"a" * 3000
    assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_a_file_planted_at_the_path_of_an_object_changes_nothing(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    name = hashlib.sha256((tree / "a").read_bytes()).hexdigest()
    for top in (tree / name[:2], tree / "cafs-objects" / name[:2]):
        top.mkdir(parents=True)
        (top / name[2:]).write_bytes(b"planted")
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    assert (tmp_path / "k" / "a").read_bytes() == b"a" * 3000
    assert (tmp_path / "k" / name[:2] / name[2:]).read_bytes() == b"planted"
    (tree / "zero").touch()
    os.unlink(tree / "zero")
    os.mknod(tree / "zero", 0o20600, 0)
    cmd("cafs-index", "create", tree, "-t", "y:1")
    done = kernel("y:1", tmp_path / "k2")
    assert done.returncode == 8 and b"whiteout" in done.stderr and fmt.WHITEOUT == b"w"


def test_a_mounted_image_is_not_collected_also_when_the_server_was_killed(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    cmd("cafs-store", "untag", "x:1")
    (state,) = (home / "run" / "lazy").iterdir()
    for name in ("worker", "supervisor", "worker"):
        pid = int((state / name).read_text())
        os.kill(pid, signal.SIGKILL)
        assert collect(Store(str(home / "store")), grace_s=0).deleted == 0
        wait_until(lambda pid=pid, name=name: int((state / name).read_text()) != pid)
    assert (tmp_path / "k" / "sub" / "c").read_bytes() == b"sub/c" * 3000
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    wait_until(lambda: lazy_pids(home) == [])
    assert collect(Store(str(home / "store")), grace_s=0).deleted > 0


def test_what_is_evicted_under_a_live_mount_frees_its_space(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """Overlayfs keeps a file of the cache open for as long as it remembers it; a remount makes it forget."""
    for number in range(6):
        (tree / f"big{number}").write_bytes(os.urandom(3 << 20))
    cmd("cafs-index", "create", tree, "-t", "x:1")
    subprocess.run(["rm", "-rf", home / "cache"], check=True)
    (home / "cache").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", home / "cache"], check=True)
    for turn in range(2):  # the second time the kernel reads from the cache
        assert kernel("x:1", tmp_path / "k").returncode == 0
        for number in range(6):
            assert (tmp_path / "k" / f"big{number}").read_bytes() == (tree / f"big{number}").read_bytes()
        if not turn:
            assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
            wait_until(lambda: lazy_pids(home) == [])
    used = os.statvfs(home / "cache")
    full = used.f_blocks - used.f_bfree
    (home / "cache" / "used").rename(home / "cache" / "never")  # else what is mounted counts as used
    quota.trim(str(home / "cache"), 4 << 20)
    after = os.statvfs(home / "cache")
    assert after.f_blocks - after.f_bfree > full * 0.8, "the live mount holds what went"
    for mount in mountinfo.over(str(home / "cache")):
        linux.reconfigure(os.fsdecode(mount.point), is_read_only=True)
    after = os.statvfs(home / "cache")
    assert after.f_blocks - after.f_bfree < full * 0.5
    assert (tmp_path / "k" / "big3").read_bytes() == (tree / "big3").read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    wait_until(lambda: lazy_pids(home) == [])
    subprocess.run(["umount", home / "cache"], check=True)


def test_a_link_in_the_way_to_live_state_or_cache_is_no_other_place(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for name in ("RUN", "CACHE"):
        monkeypatch.setenv(f"CAFS_{name}", str(tmp_path / "link" / name.lower()))
    for number in range(2):
        assert kernel("x:1", tmp_path / f"k{number}").returncode == 0
    assert len(mounts_below(home / "run")) == 2 and len(lazy_pids(home)) == 4
    assert len(mountinfo.over(str(home / "cache"))) == 2


def test_caches_and_live_state_are_for_their_owner_alone(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    os.umask(0o022)
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    for path in (home / "cache", home / "run"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_what_was_left_of_a_server_hinders_nobody(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (home / "run" / "lazy" / "half.1234" / "mnt").mkdir(parents=True)
    assert kernel("x:1", tmp_path / "k").returncode == 0
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    assert not (home / "run" / "lazy" / "half.1234").exists()


def test_a_forged_metadata_image_reaches_nothing_of_the_cache_but_objects(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """One whose redirect names another file of the cache's directory than an object."""
    cmd("cafs-index", "create", tree, "-t", "x:1")
    store = Store(str(home / "store"))
    found = image.resolve(store, "x:1")
    digest = hashlib.sha256(b"a" * 3000).hexdigest()
    right = f"/.cafs-objects/{digest[:2]}/{digest[2:]}".encode()
    secret = b"s" * (len(right) - 1)
    data = store.get_meta(found.metadata[0], image.METADATA)
    assert data.count(right) == 1
    forged = store.put_meta(data.replace(right, b"/" + secret), image.METADATA)
    made = image.put_layers(store, found.layers, found.config, (forged,))
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / secret.decode()).write_bytes(b"x" * 3000)
    assert kernel(made.digest.hex(), tmp_path / "k").returncode == 0
    assert (tmp_path / "k" / "b").read_bytes() == b"b" * 3000
    with pytest.raises(OSError):
        (tmp_path / "k" / "a").read_bytes()


OLD_KERNEL = """
import errno, sys
from cafs import linux
from cli.cafs_mount import entry
real = linux.mount
def mount(source, target, kind, *more):
    if kind == "erofs":
        raise OSError(errno.ENOTBLK, "Block device required")
    real(source, target, kind, *more)
linux.mount = mount
entry()
"""


def test_a_metadata_image_is_mounted_through_a_loop_device_where_a_file_cannot_be(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """As before Linux 6.12: mount(2) of EROFS from a file is made to fail as it did there."""
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tmp_path / "k").mkdir()
    command = [sys.executable, "-c", OLD_KERNEL, "--engine", "kernel", "x:1", tmp_path / "k"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert any("/dev/loop" in line for line in lines if f"{home}/run/" in line)
    assert describe(tmp_path / "k") == describe(tree)


OLDER_KERNEL = """
import errno
from cafs import linux
from cli.cafs_mount import entry
real = linux._configure
def configure(fs, command, key, value):
    if key == "lowerdir+":
        raise OSError(errno.EINVAL, "Invalid argument", key)
    real(fs, command, key, value)
linux._configure = configure
entry()
"""


@pytest.mark.parametrize("name", ["k", "odd , : \\\\ :: name"])
def test_an_overlay_is_mounted_by_options_where_it_cannot_be_by_keys(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As before Linux 6.8: the key lowerdir+ of fsconfig(2) is made to fail as it did there."""
    monkeypatch.setenv("CAFS_CACHE", str(tmp_path / name / "cache"))
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tree / "b").write_bytes(b"changed")
    cmd("cafs-index", "create", tree, "--base", "x:1", "-t", "x:2")
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-c", OLDER_KERNEL, "--engine", "kernel", "x:2", tmp_path / "mnt"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (mount,) = [one for one in mountinfo.mounts() if one.point == os.fsencode(tmp_path / "mnt")]
    assert b"lowerdir=" in mount.options and len(mount.layers) == 4
    assert mount.layers[2] == ("datadir+", str(tmp_path / name / "cache" / "data"))
    assert describe(tmp_path / "mnt") == describe(tree)


def test_a_directory_of_changes_is_mounted_once_and_over_its_own_image(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    tree.chmod(0o711)
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (tree / "a").write_bytes(b"of another image, and longer")
    cmd("cafs-index", "create", tree, "-t", "x:2")
    up = tmp_path / "up"
    assert kernel("x:1", tmp_path / "k", "--rw", up).returncode == 0
    assert os.stat(tmp_path / "k").st_mode & 0o7777 == 0o711, "as the root of the image"
    assert kernel("x:1", tmp_path / "k", "--rw", up).returncode == 0, "it is mounted there already"
    for options in ((), ("--rw", tmp_path / "other"), ("--record", tmp_path / "record"), ("--rw", up, "--prefetch", "all")):
        assert kernel("x:1", tmp_path / "k", *options).returncode == 6, options
    (tmp_path / "link").symlink_to(up)
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", tmp_path / "k").returncode == 6
    (tmp_path / "k3").mkdir()
    shared = cmd("cafs-mount", "x:1", tmp_path / "k3", "--log", tmp_path / "log")
    assert shared.returncode == 0 and b"a server that is there serves it too" in shared.stderr
    second = kernel("x:1", tmp_path / "k2", "--rw", tmp_path / "link")
    assert second.returncode == 6 and b"in use" in second.stderr
    os.chmod(tmp_path / "k" / "a", 0o600)
    copy = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "60"])
    wait_until(lambda: os.readlink(f"/proc/{copy.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    assert kernel("x:1", tmp_path / "k", "--rw", up).returncode == 6, "mounted in another namespace still"
    copy.kill()
    copy.wait()
    wait_until(lambda: kernel("x:1", tmp_path / "k", "--rw", up).returncode == 0)
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    other = kernel("x:2", tmp_path / "k", "--rw", up)
    assert other.returncode == 6 and b"hint" in other.stderr
    assert kernel("x:1", tmp_path / "k", "--rw", up).returncode == 0
    assert (tmp_path / "k" / "a").read_bytes() == b"a" * 3000
    assert os.stat(tmp_path / "k" / "a").st_mode & 0o777 == 0o600
