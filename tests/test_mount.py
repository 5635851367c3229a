"""The fuse engine: a mounted index is the source tree, entry by entry, and failures end in a clear error or EIO."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafs import slots
from cafs.cache import Cache
from cafs.digest import PLAIN
from cafs.store import Store
from tests.conftest import Run
from tests.waiting import SLOW, until

pytestmark = pytest.mark.needs("root", "fuse", "fusermount3")


def make_everything(root: Path, many: int = 6_000) -> None:
    """Every kind of entry that an index knows."""
    root.mkdir()
    for name, mode in (("plain", 0o644), ("setuid", 0o4755), ("sticky", 0o1000), ("none", 0)):
        (root / name).write_bytes(name.encode() * 100)
        os.chown(root / name, 1234, 4294967294)
        (root / name).chmod(mode)
    (root / "empty").touch()
    os.link(root / "plain", root / "plain-link")
    (root / "sub").mkdir(0o2750)
    os.link(root / "plain", root / "sub" / "zz-link")
    os.mknod(root / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 65537))
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", 0o755 | stat.S_IFSOCK)
    os.symlink("x" * 4000, root / "long-link")
    os.symlink("-", root / "dash")
    for name in (b"\xff\xfe", b"new\nline", b"a b\\c", "\u00fc\u0085".encode(), b"n" * 255):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(name)
    os.setxattr(root / "plain", "user.key,=", b"\0binary\xff")
    os.setxattr(root / "sub", "user.dir", b"")
    subprocess.run(["setcap", "cap_net_raw+ep", root / "setuid"], check=True)
    subprocess.run(["setfacl", "-m", "u:77:r", root / "plain"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "g:5:rwx", root / "sub"], check=True)
    with open(root / "sparse", "wb") as file:
        file.truncate(5 << 30)
        file.seek(3 << 30)
        file.write(b"island")
    (root / "large").write_bytes(os.urandom((9 << 20) + 17))
    (root / "zeros").write_bytes(bytes(6 << 20))
    (root / "many").mkdir()
    for number in range(many):
        (root / "many" / f"{number:x}").touch()
    for path in (root / "plain", root / "sub", root):
        os.utime(path, ns=(5, -1_234_567_891))


def describe(root: Path) -> dict[bytes, tuple[object, ...]]:
    """What a walk sees; content by hash, sparse files only around their data."""
    found: dict[bytes, tuple[object, ...]] = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        for path in [os.path.join(directory, name) for name in [*names, *files]] + [directory]:
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content = ""
            if kind == stat.S_IFREG:
                with open(path, "rb") as file:
                    if status.st_size > 1 << 30:
                        file.seek((3 << 30) - 4096)
                        content = hashlib.sha256(file.read(8192)).hexdigest()
                    else:
                        content = hashlib.sha256(file.read()).hexdigest()
            xattrs = tuple(
                sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in os.listxattr(path, follow_symlinks=False))
            )
            found[path[len(top) :]] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_rdev,
                None if kind == stat.S_IFDIR else (status.st_size, status.st_nlink),
                os.readlink(path) if kind == stat.S_IFLNK else None,
                xattrs,
                content,
            )
    return found


@pytest.mark.needs("root", "fuse", "setcap", "setfacl")
@pytest.mark.parametrize("engine", ["fuse", "pyfuse3"])
def test_a_mounted_index_is_the_source_tree(home: Path, tmp_path: Path, cmd: Run, engine: str) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    make_everything(tree)
    point.mkdir()
    made = cmd("cafs-index", "create", tree, "-t", "all:1")
    assert made.returncode == 0, made.stderr
    mounted = cmd("cafs-mount", "--engine", engine, "all:1", point, "--log", tmp_path / "log")
    assert mounted.returncode == 0, mounted.stderr
    source, seen = describe(tree), describe(point)
    assert source.keys() == seen.keys()
    for path, what in source.items():
        assert seen[path] == what, path
    assert len(os.listdir(point / "many")) == 6_000
    assert (point / "plain").stat().st_ino == (point / "sub" / "zz-link").stat().st_ino
    again = cmd("cafs-index", "create", point, "-o", "-")
    assert again.returncode == 0, again.stderr
    assert again.stdout == cmd("cafs-index", "create", tree, "-o", "-").stdout
    with pytest.raises(OSError) as caught:
        (point / "new").touch()
    assert caught.value.errno == errno.EROFS
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    assert (tmp_path / "log").read_text() == ""


@pytest.fixture
def small(home: Path, tmp_path: Path, cmd: Run) -> Path:
    """A ref s:1 of a small tree; returns an empty mount point."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"a" * 5000)
    (tree / "b").write_bytes(b"b" * 5000)
    assert cmd("cafs-index", "create", tree, "-t", "s:1").returncode == 0
    point = tmp_path / "mnt"
    point.mkdir()
    return point


def test_mounting_twice_is_fine_and_another_image_there_is_busy(small: Path, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "s:1", small).returncode == 0
    assert cmd("cafs-mount", "s:1", small).returncode == 0
    (tmp_path / "tree" / "c").write_text("c")
    assert cmd("cafs-index", "create", tmp_path / "tree", "-t", "s:2").returncode == 0
    other = cmd("cafs-mount", "s:2", small)
    assert other.returncode == 6 and b"is taken: image" in other.stderr
    listed = cmd("cafs-mount", "--list").stdout.decode()
    assert f"{small}\ts:1\t" in listed
    assert cmd("cafs-mount", "--unmount", small).returncode == 0
    assert cmd("cafs-mount", "--unmount", small).returncode == 4
    assert str(small) not in cmd("cafs-mount", "--list").stdout.decode()


def test_an_index_of_another_hash_than_the_store_is_not_mounted(small: Path, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-index", "create", tmp_path / "tree", "-o", tmp_path / "x.idx", "--hash", "xxh128").returncode == 0
    done = cmd("cafs-mount", tmp_path / "x.idx", small)
    assert done.returncode == 2 and b"is of xxh128" in done.stderr and os.listdir(small) == []


def test_a_relative_store_and_log_are_the_callers(small: Path, tmp_path: Path, cmd: Run) -> None:
    done = cmd("cafs-mount", "--store", "store", "--log", "the.log", "s:1", "mnt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (small / "a").read_bytes() == b"a" * 5000 and (tmp_path / "the.log").exists()


def test_what_goes_wrong_in_the_server_has_its_own_exit_code(small: Path, tmp_path: Path, cmd: Run) -> None:
    done = cmd("cafs-mount", "--engine", "fuse", "s:1", small, "--log", "/proc/nothing/x")
    assert done.returncode == 4 and b"cannot log to '/proc/nothing/x'" in done.stderr


def test_another_file_system_on_the_mount_point_is_busy(small: Path, cmd: Run) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", small], check=True)
    try:
        done = cmd("cafs-mount", "s:1", small)
        assert done.returncode == 6 and b"a tmpfs file system is mounted there" in done.stderr
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("engine", ["fuse", "pyfuse3"])
def test_a_server_told_to_stop_twice_serves_its_last_user(small: Path, cmd: Run, engine: str) -> None:
    assert cmd("cafs-mount", "--engine", engine, "s:1", small).returncode == 0
    pid = server_pid(cmd, small)
    with open(small / "a", "rb") as file:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not os.path.ismount(small), 10)
        os.kill(pid, signal.SIGTERM)
        assert file.read() == b"a" * 5000


def test_access_lists_are_kept_by_the_mount(home: Path, tmp_path: Path, cmd: Run) -> None:
    """The bits of the group are the mask where there is a list: they are not the group's rights."""
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    point.mkdir()
    (tree / "file").write_text("secret")
    os.chown(tree / "file", 0, 2000)
    (tree / "file").chmod(0o640)
    subprocess.run(["setfacl", "-m", "u:77:r,g::-", tree / "file"], check=True)
    assert cmd("cafs-index", "create", tree, "-t", "acl:1").returncode == 0
    assert cmd("cafs-mount", "acl:1", point).returncode == 0
    for user, group, code in ((77, 77, 0), (1000, 2000, 1), (1000, 1000, 1)):
        who = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        for top in (tree, point):
            # By a descriptor of the directory: the directories above are root's alone.
            done = subprocess.run([*who, "cat", "./file"], cwd=top, capture_output=True, check=False)
            assert done.returncode == code, (user, group, top, done.stderr)


def test_a_hostile_index_does_not_end_the_server(small: Path, tmp_path: Path, cmd: Run) -> None:
    """A file of 2^63-1 bytes with a list of one run, and more blocks than statfs(2) can say."""
    size = (1 << 63) - 1
    text = f"cafs-chunks 1 sha256 4194304 {size}\n{-(-size // 4194304)} -\n".encode()
    digest = hashlib.sha256(text).hexdigest()
    from cafs.digest import CHUNK_LIST
    from cafs.pack import encode_frame
    from cafs.store import Store
    from cafs.writer import Writer

    with Writer(Store(str(tmp_path / "store"))) as writer:
        writer.put(bytes.fromhex(digest), CHUNK_LIST, encode_frame(text, CHUNK_LIST, None))
    lines = [f"F 644 0 0 0 {size} {digest} - - /f{number:05}\n" for number in range(10_000)]
    index = tmp_path / "hostile.idx"
    index.write_text("cafs-index 1 sha256 4194304\nd 755 0 0 0 - - - - /\n" + "".join(lines) + f"end {len(lines) + 1}\n")
    done = cmd("cafs-mount", index, small, "--log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    os.statvfs(small)
    for name in ("f00000", "f09999"):
        with open(small / name, "rb") as file:
            assert file.read(10) == bytes(10)
            file.seek(size - 16384)  # read(2) refuses what would end beyond 2^63
            assert file.read(10) == bytes(10)
    assert len(os.listdir(small)) == 10_000


def test_a_mount_of_many_large_files_needs_few_descriptors(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    point.mkdir()
    for number in range(150):
        with open(tree / f"{number}", "wb") as file:
            file.write(b"%d" % number)
            file.truncate(5 << 20)
    assert cmd("cafs-index", "create", tree, "-t", "many:1").returncode == 0
    assert cmd("cafs-mount", "--engine", "fuse", "many:1", point).returncode == 0
    for number in range(150):
        with open(point / f"{number}", "rb") as file:
            assert file.read(3).rstrip(b"\0") == b"%d" % number
    held = os.listdir(f"/proc/{server_pid(cmd, point)}/fd")
    assert len(held) < 120


def test_a_mount_point_in_use_is_busy(small: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "s:1", small).returncode == 0
    with open(small / "a"):
        done = cmd("cafs-mount", "--unmount", small)
    assert done.returncode == 6 and b"in use" in done.stderr
    assert cmd("cafs-mount", "--unmount", small).returncode == 0


def test_bad_mount_points_are_named(small: Path, tmp_path: Path, cmd: Run) -> None:
    missing = cmd("cafs-mount", "s:1", tmp_path / "missing")
    assert missing.returncode == 4 and b"No such file or directory" in missing.stderr
    (small / "x").touch()
    full = cmd("cafs-mount", "s:1", small)
    assert full.returncode == 1 and b"Directory not empty" in full.stderr
    nothing = cmd("cafs-mount", "s:3", small)
    assert nothing.returncode == 4 and b"did you mean 's:1'" in nothing.stderr


def server_pid(cmd: Run, point: Path) -> int:
    rows = [line.split("\t") for line in cmd("cafs-mount", "--list").stdout.decode().splitlines()]
    return next(int(row[4]) for row in rows if row[0] == str(point))


def end_and_wait(pid: int, number: int) -> None:
    fd = os.pidfd_open(pid)
    os.kill(pid, number)
    assert select.select([fd], [], [], 10 * SLOW)[0]
    os.close(fd)


@pytest.mark.parametrize("engine", ["fuse", "pyfuse3"])
def test_a_mount_whose_servers_were_killed_is_replaced(small: Path, cmd: Run, engine: str) -> None:
    assert cmd("cafs-mount", "--engine", engine, "s:1", small).returncode == 0
    pids = [server_pid(cmd, small)]
    if engine == "fuse":
        (state,) = (small.parent / "run" / "fuse").iterdir()
        pids = list(slots.pids(str(state)).values())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # or one would start the others
    for pid in pids:
        end_and_wait(pid, signal.SIGKILL)
    with pytest.raises(OSError):
        (small / "a").read_bytes()
    assert cmd("cafs-mount", "--engine", engine, "s:1", small).returncode == 0
    assert (small / "a").read_bytes() == b"a" * 5000
    assert engine != "fuse" or len(list((small.parent / "run" / "fuse").iterdir())) == 1


@pytest.mark.parametrize("engine", ["fuse", "pyfuse3"])
def test_a_server_told_to_stop_unmounts(small: Path, cmd: Run, engine: str) -> None:
    assert cmd("cafs-mount", "--engine", engine, "s:1", small).returncode == 0
    end_and_wait(server_pid(cmd, small), signal.SIGTERM)
    assert os.listdir(small) == []
    assert list((small.parent / "run" / "mounts").iterdir()) == []


def test_damage_is_eio_with_a_line_in_the_log_and_the_rest_can_be_read(small: Path, tmp_path: Path, cmd: Run) -> None:
    pack = next((tmp_path / "store" / "packs").glob("?" * 64))
    data = bytearray(pack.read_bytes())
    digest = hashlib.sha256(b"a" * 5000).hexdigest()
    data[20] ^= 1  # in the first frame, which is that of /a
    pack.unlink()
    pack.write_bytes(data)
    assert cmd("cafs-mount", "--engine", "fuse", "s:1", small, "--log", tmp_path / "log").returncode == 0
    with pytest.raises(OSError) as caught:
        (small / "a").read_bytes()
    assert caught.value.errno == errno.EIO
    assert (small / "b").read_bytes() == b"b" * 5000
    log = (tmp_path / "log").read_text()
    assert digest in log and "/a" in log


def test_a_damaged_cached_object_is_set_aside_and_fetched_again(small: Path, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--engine", "fuse", "s:1", small).returncode == 0
    assert (small / "a").read_bytes() == b"a" * 5000
    assert cmd("cafs-mount", "--unmount", small).returncode == 0
    cached = [p for p in (tmp_path / "cache" / "data" / ".cafs-objects").glob("*/*")]
    (first,) = [path for path in cached if path.read_bytes() == b"a" * 5000]
    assert stat.S_IMODE(first.stat().st_mode) == 0o444
    first.chmod(0o644)
    first.write_bytes(b"A" * 5000)
    assert cmd("cafs-mount", "--engine", "fuse", "s:1", small).returncode == 0
    assert (small / "a").read_bytes() == b"a" * 5000
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


def test_a_full_cache_disk_costs_speed_only(small: Path, tmp_path: Path, cmd: Run) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", cache], check=True)
    try:
        with open(cache / "fill", "wb") as file, pytest.raises(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        assert cmd("cafs-mount", "--engine", "fuse", "s:1", small, "--log", tmp_path / "log").returncode == 0
        assert (small / "a").read_bytes() == b"a" * 5000
        assert "No space left" in (tmp_path / "log").read_text()
        (cache / "fill").unlink()
        assert (small / "b").read_bytes() == b"b" * 5000
        assert len(list((cache / "data" / ".cafs-objects").glob("*/*"))) == 1
        assert cmd("cafs-mount", "--unmount", small).returncode == 0
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


def test_a_full_store_disk_is_a_clear_error_and_leaves_nothing_half_written(home: Path, tmp_path: Path, cmd: Run) -> None:
    store, tree = tmp_path / "store", tmp_path / "tree"
    store.mkdir()
    tree.mkdir()
    (tree / "f").write_bytes(os.urandom(3 << 20))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", store], check=True)
    try:
        done = cmd("cafs-index", "create", tree, "-t", "f:1")
        assert done.returncode == 1 and b"No space left on device" in done.stderr and b"Traceback" not in done.stderr
        assert list((store / "packs").iterdir()) == [] and list((store / "tmp").iterdir()) == []
        assert cmd("cafs-store", "ls").stdout == b""
        subprocess.run(["mount", "-o", "remount,size=16m", store], check=True)
        assert cmd("cafs-index", "create", tree, "-t", "f:1").returncode == 0
        assert cmd("cafs-store", "fsck").returncode == 0
    finally:
        subprocess.run(["umount", "-l", store], check=True)


def test_who_waits_for_anothers_fetch_fetches_by_himself_at_last(small: Path, tmp_path: Path) -> None:
    """Another process holds the fetch lock of /a's object for good."""
    digest = hashlib.sha256(b"a" * 5000).digest()
    cache = Cache(str(tmp_path / "cache"), Store(str(tmp_path / "store")), limit_s=2)
    with open(tmp_path / "cache" / "fetch.lock", "w") as file:
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int.from_bytes(digest[:7], "big"), 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        begin = time.monotonic()
        fd = cache.open(digest, PLAIN)
        assert 0.5 < time.monotonic() - begin < 10 * SLOW
        assert os.pread(fd, 6000, 0) == b"a" * 5000
        os.close(fd)


@pytest.mark.needs("root", "fuse", "fusermount3", "setpriv")
def test_an_ordinary_user_can_mount(home: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    base = Path("/var/tmp") / f"cafs-user-{os.getpid()}"
    base.mkdir()
    os.chown(base, 65534, 65534)
    environment = {f"CAFS_{n}": str(base / n.lower()) for n in ("STORE", "CACHE", "RUN", "STATE")} | {
        "PATH": os.environ["PATH"]
    }
    interpreter = sys.executable
    if os.path.realpath(interpreter).startswith("/root/"):  # a user cannot start it; one of the system reads the same packages
        interpreter = "/usr/bin/python3"
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path[1:]])
    program = "import sys; sys.argv[0] = 'x'; import importlib; importlib.import_module(sys.argv.pop(1)).entry()"

    def as_user(module: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", interpreter, "-c", program, module]
        return subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, env=environment, check=False, timeout=60 * SLOW, cwd=base
        )

    os.mknod(base / "fuse", 0o020666, os.makedev(10, 229))
    (base / "fuse").chmod(0o666)  # as udev has it on every distribution; those beside us keep theirs
    subprocess.run(["mount", "--bind", base / "fuse", "/dev/fuse"], check=True)
    try:
        probe = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", interpreter, "-c", "import cafs, xxhash, click"],
            capture_output=True, env=environment, cwd=base, check=False,
        )  # fmt: skip
        if probe.returncode:
            pytest.skip("this interpreter cannot be read by another user")
        for name in ("tree", "mnt"):
            (base / name).mkdir()
            os.chown(base / name, 65534, 65534)
        (base / "tree" / "f").write_text("text")
        assert as_user("cli.cafs_index", "create", base / "tree", "-t", "u:1").returncode == 0
        done = as_user("cli.cafs_mount", "u:1", base / "mnt")
        assert done.returncode == 0, done.stderr
        (state,) = (base / "run" / "fuse").iterdir()
        end_and_wait(int((state / "worker").read_text()), signal.SIGKILL)
        assert as_user("cli.cafs_index", "create", base / "mnt", "-o", "-").stdout.count(b"\n") == 4
        assert as_user("cli.cafs_mount", "--unmount", base / "mnt").returncode == 0
    finally:
        subprocess.run(["umount", "-l", base / "mnt"], capture_output=True, check=False)
        subprocess.run(["umount", "-l", "/dev/fuse"], check=True)
        shutil.rmtree(base)


@pytest.mark.needs("root", "unshare")
def test_no_dev_fuse_is_exit_8_with_a_hint(small: Path) -> None:
    from tests.conftest import BIN

    hide = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", BIN / "cafs-mount", "s:1", small], capture_output=True, check=False
    )
    assert done.returncode == 8, done.stderr
    assert b"cannot open '/dev/fuse': No such file or directory" in done.stderr and b"apt install fuse3" in done.stderr


@pytest.mark.needs("root", "fuse", "setpriv")
def test_no_fusermount3_is_exit_8_with_a_hint(small: Path) -> None:
    import sys

    code = "import sys; sys.argv = ['cafs-mount', *sys.argv[1:]]; from cli.cafs_mount import entry; entry()"
    base = small.parent  # at /mnt, as what is above it is closed to others
    hide = (
        f"mount --bind /dev/null /usr/bin/fusermount3 && mount --bind {base} /mnt && "
        'exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    )
    for path in (base, small, base / "store"):
        path.chmod(0o755)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {f"CAFS_{name}": f"/mnt/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")}
    os.chown(small, 65534, 65534)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-c", code, "s:1", "/mnt/mnt"],
        capture_output=True, check=False, env=environment, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    if b"No module named" in done.stderr or (b"Permission denied" in done.stderr and b"cafs-mount" not in done.stderr):
        pytest.skip("this interpreter cannot be read by another user")
    assert done.returncode == 8 and b"apt install fuse3" in done.stderr, done.stderr
