"""The processes behind a mount in odd situations: signals at bad moments, no log, no password in sight, others' mounts."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cafs import image, locator, paths
from cafs.cache import Cache
from cafs.digest import checksum
from cafs.errors import UnsupportedError
from cafs.store import Store
from cafs.stream import Stream
from tests.conftest import BIN, Run, mounts_below, pid_of, wait_until
from tests.test_fuse import kill
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "fusermount3")
ENGINES = pytest.mark.parametrize("engine", ["kernel", "fuse"])


@pytest.fixture
def tree(home: Path, tmp_path: Path, cmd: Run) -> Path:
    """Of x:1: small files, each too large to come along with another."""
    root = tmp_path / "tree"
    root.mkdir()
    (tmp_path / "mnt").mkdir()
    rng = random.Random(1)
    for number in range(48):
        (root / f"{number}").write_bytes(rng.randbytes(1_500_000))
    assert cmd("cafs-index", "create", root, "-t", "x:1").returncode == 0
    return root


@pytest.fixture
def protected(home: Path, tree: Path) -> Iterator[str]:
    """The store behind a web server that wants a password: its address with it."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(home))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"u:pw").decode():
                self.send_error(401)
                return
            wanted = self.headers.get("Range")
            try:
                data = (home / self.path.lstrip("/")).read_bytes()
            except OSError:
                self.send_error(404)
                return
            start, end = 0, len(data)
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                start = int(first) if first else max(len(data) - int(last), 0)
                end = min(int(last) + 1, len(data)) if first and last else len(data)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(data[start:end])

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://u:pw@127.0.0.1:{server.server_port}/store"
    server.shutdown()
    server.server_close()


@ENGINES
def test_a_store_with_a_password_is_read_by_the_server_too(
    home: Path, tmp_path: Path, tree: Path, protected: str, cmd: Run, kernel: Run, engine: str
) -> None:
    environment = os.environ | {"CAFS_STORE": protected}
    done = cmd("cafs-mount", "--engine", engine, "x:1", tmp_path / "mnt", env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mnt" / "1").read_bytes() == (tree / "1").read_bytes()
    (state,) = (home / "run" / ("lazy" if engine == "kernel" else "fuse")).iterdir()
    assert (state.stat().st_mode & 0o777, (state / "config.json").stat().st_mode & 0o777) == (0o700, 0o400)
    assert b"pw@" not in b"".join(
        Path(f"/proc/{pid_in(state, name)}/cmdline").read_bytes() for name in ("worker", "supervisor")
    )
    assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0


def pid_in(state: Path, name: str) -> int:
    return int((state / name).read_text())


def test_two_hangups_in_a_row_lose_nothing(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", tmp_path / "mnt").returncode == 0
    for pause_s in (0.0, 0.01, 0.03, 0.06, 0.1):
        worker = pid_of(home, "worker", "fuse")
        for _ in range(2):
            os.kill(pid_of(home, "supervisor", "fuse"), signal.SIGHUP)
            time.sleep(pause_s)  # the second one at different moments of a new start
        wait_until(lambda worker=worker: pid_of(home, "worker", "fuse") != worker)
        assert (tmp_path / "mnt" / "1").read_bytes() == (tree / "1").read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0


@ENGINES
def test_a_worker_that_cannot_begin_is_eio_and_nobody_hangs(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    point, other = tmp_path / "mnt", tmp_path / "other"
    other.mkdir()
    (tmp_path / "logs").mkdir()
    done = cmd("cafs-mount", "--engine", engine, "x:1", point, "--log", tmp_path / "logs" / "log")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").touch()
    (state,) = (home / "run" / ("lazy" if engine == "kernel" else "fuse")).iterdir()
    os.kill(pid_in(state, "worker"), signal.SIGKILL)
    reading = subprocess.run(["cat", point / "1"], capture_output=True, timeout=30 * SLOW, check=False)
    assert reading.returncode == 1 and b"Input/output error" in reading.stderr
    assert cmd("cafs-mount", "--engine", engine, "x:1", other, timeout=60).returncode == 0
    assert (other / "2").read_bytes() == (tree / "2").read_bytes()
    for one in (other, point):
        done = cmd("cafs-mount", "--unmount", one, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_cached_is_read_while_many_others_wait(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", tmp_path / "mnt", "--timeout", "20").returncode == 0
    assert (tmp_path / "mnt" / "0").read_bytes() == (tree / "0").read_bytes()
    kill(home, "worker")  # so that nothing is open there
    Path("/proc/sys/vm/drop_caches").write_text("3")
    os.rename(home / "store", home / "away")
    waiting = [subprocess.Popen(["cat", tmp_path / "mnt" / f"{n}"], stdout=subprocess.DEVNULL) for n in range(5, 45)]
    time.sleep(1)  # until all of them wait
    began = time.monotonic()
    assert (tmp_path / "mnt" / "0").read_bytes() == (tree / "0").read_bytes()
    assert time.monotonic() - began < 5 * SLOW
    os.rename(home / "away", home / "store")
    assert [one.wait(60 * SLOW) for one in waiting] == [0] * 40


def test_a_server_told_to_end_leaves_other_mounts_alone(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    point = tmp_path / "mnt"
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", point).returncode == 0
    supervisor = pid_of(home, "supervisor", "fuse")
    with open(point / "1", "rb"):
        subprocess.run(["umount", "-l", point], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
        (point / "precious").touch()
        os.kill(supervisor, signal.SIGTERM)
        time.sleep(0.3)  # it would have been unmounted by now
        assert (point / "precious").exists()
    subprocess.run(["umount", point], check=True)


@ENGINES
def test_a_locator_that_says_a_file_is_empty_empties_nothing(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    store = Store(str(home / "store"))
    layer = image.resolve(store, "x:1").layers[0]
    right = store.get_locator(layer)
    assert right
    rest = bytearray(right.data[24:])
    start, row = 112 - 24 + 32 * len(right.packs), 33 + 24
    for number in range(len(right)):
        struct.pack_into("<Q", rest, start + number * row + 33, 0)
    store.put_locator(layer, locator.MAGIC + checksum(rest) + rest)
    assert cmd("cafs-mount", "--engine", engine, "x:1", tmp_path / "mnt", "--timeout", "2").returncode == 0
    try:
        data = (tmp_path / "mnt" / "1").read_bytes()
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOENT)
    else:
        assert data == (tree / "1").read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0


def test_the_foreground_is_listed_and_does_not_stop_a_reload(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    other = tmp_path / "other"
    other.mkdir()
    command = [BIN / "cafs-mount", "--engine", "fuse", "--foreground", "x:1", tmp_path / "mnt"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as server:
        wait_until(lambda: os.path.ismount(tmp_path / "mnt"))
        assert (tmp_path / "mnt" / "1").read_bytes() == (tree / "1").read_bytes()
        listed = cmd("cafs-mount", "--list").stdout.decode().splitlines()
        (mine,) = [line for line in listed if line.startswith(f"{tmp_path}/mnt\tx:1\t")]  # others may have mounts too
        assert mine.split("\t")[4] == str(server.pid)
        assert cmd("cafs-mount", "--engine", "fuse", "x:1", other).returncode == 0
        assert cmd("cafs-mount", "--reload").returncode == 0
        assert cmd("cafs-mount", "--unmount", other).returncode == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(20 * SLOW) == 0 and server.stderr and server.stderr.read() == b""
    assert list((home / "run" / "fuse").iterdir()) == list((home / "run" / "mounts").iterdir()) == []


@ENGINES
def test_what_was_pulled_mounts_without_the_store(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    assert cmd("cafs-store", "pull", "x:1").returncode == 0
    os.rename(home / "store", home / "away")
    done = cmd("cafs-mount", "--engine", engine, "x:1", tmp_path / "mnt")
    assert (done.returncode == 0 and b"seconds ago" in done.stderr) or b"second ago" in done.stderr
    for path in tree.iterdir():
        assert (tmp_path / "mnt" / path.name).read_bytes() == path.read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0


def test_everything_is_brought_as_often_as_it_is_asked_for(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    objects = home / "cache" / "data" / ".cafs-objects"
    assert kernel("x:1", tmp_path / "k").returncode == 0
    for _ in range(2):
        assert kernel("x:1", tmp_path / "k2", "--prefetch", "all").returncode == 0
        wait_until(lambda: len(list(objects.glob("*/[!t]*"))) == 48)
        (state,) = (home / "run" / "lazy").iterdir()
        wait_until(lambda state=state: list((state / "prefetch").iterdir()) == [])
        assert cmd("cafs-mount", "--unmount", tmp_path / "k2").returncode == 0
        for path in objects.glob("*/*"):
            path.unlink()


def test_an_image_is_let_go_when_it_is_unmounted_also_while_another_is_mounted(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    (tree / "1").write_bytes(b"other")
    cmd("cafs-index", "create", tree, "-t", "x:2")
    for number in (1, 2):
        assert kernel(f"x:{number}", tmp_path / f"k{number}").returncode == 0

    def held() -> set[str]:
        images = set()
        for path in (home / "store" / "leases").iterdir():
            with suppress(FileNotFoundError):  # let go while this looks
                images.add(json.loads(path.read_text())["image"])
        return images

    wait_until(lambda: len(held()) == 2)
    assert cmd("cafs-mount", "--unmount", tmp_path / "k1").returncode == 0
    wait_until(lambda: len(held()) == 1, 20)


def test_umount_by_hand_takes_everything_along(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    """Slow (10 to 20 s): the server looks every ten seconds."""
    assert kernel("x:1", tmp_path / "k").returncode == 0
    subprocess.run(["umount", tmp_path / "k"], check=True)
    wait_until(lambda: mounts_below(home / "run") == [], 30)


def test_a_profile_that_hangs_holds_up_nobody_for_long(home: Path, tmp_path: Path) -> None:
    from cafs.store import init

    with socket.create_server(("127.0.0.1", 0)):
        cache = Cache(str(tmp_path / "cache"), init(str(tmp_path / "store")), limit_s=30)
        stream = Stream(cache, ["profiles/x/default"], lambda digest: pytest.fail("no file"), lambda digest: None)
        began = time.monotonic()
        stream.wait(b"d" * 32)  # nobody runs it: its list never comes
        assert time.monotonic() - began < 5 * SLOW


@pytest.mark.needs("root")
def test_a_disk_without_file_numbers_makes_room_too(home: Path, tmp_path: Path, tree: Path) -> None:
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=400", "none", root], check=True)
    cache = Cache(str(root), Store(str(home / "store")))
    for number in range(600):
        data = b"%d" % number
        cache.keep(cache.store.hash(data), 0, data)
    assert Path(cache.path(cache.store.hash(b"599"), 0)).read_bytes() == b"599"


def test_a_directory_of_somebody_else_is_not_used_for_live_state(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"/tmp/cafs-{os.getuid()}"
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("CAFS_RUN", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    existed = os.path.isdir(name)
    os.makedirs(name, exist_ok=True)
    try:
        with pytest.raises(UnsupportedError, match="not a directory of yours"):
            paths.run()
    finally:
        if not existed:
            os.rmdir(name)


@pytest.mark.parametrize("option", ["engine=kernl", "timeout=nan", "timeout=-1", "timeout=x", "bwlimit=much", "what"])
def test_fstab_with_wrong_options_is_refused(tmp_path: Path, option: str) -> None:
    done = subprocess.run([BIN / "mount.cafs", "x:1", tmp_path, "-o", option], capture_output=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(b"mount.cafs: ") and b"Traceback" not in done.stderr


def test_what_stands_in_for_a_server_leaves_nothing_for_the_kernel_to_remember(
    home: Path, tmp_path: Path, tree: Path, cmd: Run
) -> None:
    """Neither an empty directory nor that there are no attributes; and it is looked after as a server is."""
    os.setxattr(tree / "1", "user.mark", b"x")
    cmd("cafs-index", "create", tree, "-t", "y:1")
    point = tmp_path / "mnt"
    assert cmd("cafs-mount", "--engine", "fuse", "y:1", point).returncode == 0
    (state,) = (home / "run" / "fuse").iterdir()
    os.rename(state / "config.json", state / "away")
    os.kill(pid_of(home, "worker", "fuse"), signal.SIGKILL)
    wait_until(lambda: (state / "log").exists())
    for look in (os.listdir, lambda path: os.getxattr(path / "1", "user.mark"), lambda path: os.stat(path / "2")):
        with pytest.raises(OSError) as caught:
            look(point)
        assert caught.value.errno == errno.EIO
    os.kill(pid_of(home, "supervisor", "fuse"), signal.SIGKILL)
    time.sleep(0.5)  # for the stand-in to start another
    os.rename(state / "away", state / "config.json")

    def is_back() -> bool:
        try:
            return len(os.listdir(point)) == 48
        except OSError:
            return False

    wait_until(is_back, 30)
    assert os.getxattr(point / "1", "user.mark") == b"x"
    assert (point / "1").read_bytes() == (tree / "1").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_two_mounts_at_once_are_one(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    for engine in ("kernel", "fuse"):
        command = [BIN / "cafs-mount", "--engine", engine, "x:1", tmp_path / "mnt"]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
        assert [one.wait(60 * SLOW) for one in both] == [0, 0]
        assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0
        assert not os.path.ismount(tmp_path / "mnt")


def test_an_image_that_was_unmounted_lazily_is_held_on(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    (tree / "1").write_bytes(b"other")
    cmd("cafs-index", "create", tree, "-t", "x:2")
    for number in (1, 2):
        assert kernel(f"x:{number}", tmp_path / f"k{number}").returncode == 0
    (state,) = (home / "run" / "lazy").iterdir()
    with open(tmp_path / "k1" / "2", "rb") as file:
        subprocess.run(["umount", "-l", tmp_path / "k1"], check=True)
        assert kernel("x:2", tmp_path / "k3").returncode == 0
        assert cmd("cafs-mount", "--unmount", tmp_path / "k3").returncode == 0
        assert len(list((state / "images").iterdir())) == 2
        assert file.read() == (tree / "2").read_bytes()


def test_a_mount_point_with_a_carriage_return_elsewhere_does_no_harm(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    odd = tmp_path / "a\rb"
    odd.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", odd], check=True)
    try:
        assert kernel("x:1", tmp_path / "k").returncode == 0
        assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    finally:
        subprocess.run(["umount", odd], check=True)


def test_reloading_again_and_again_needs_no_more_descriptors(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    assert cmd("cafs-mount", "--engine", "fuse", "x:1", tmp_path / "mnt").returncode == 0
    counts = []
    for _ in range(4):
        worker = pid_of(home, "worker", "fuse")
        assert cmd("cafs-mount", "--reload").returncode == 0
        wait_until(lambda worker=worker: pid_of(home, "worker", "fuse") != worker)
        place, looks = f"/proc/{pid_of(home, 'supervisor', 'fuse')}/fd", []
        for _ in range(10):  # some are open for a moment only
            looks.append(len(os.listdir(place)))
            time.sleep(0.02)
        counts.append(min(looks))
    assert max(counts) - min(counts) <= 1
    assert cmd("cafs-mount", "--unmount", tmp_path / "mnt").returncode == 0


def test_looking_whether_a_file_is_open_does_not_end_who_looks(tmp_path: Path) -> None:
    """Somebody opens it in the moment in which we have a lease on it."""
    (tmp_path / "file").touch()
    opening = "import sys\nwhile True:\n    open(sys.argv[1]).close()"
    with subprocess.Popen([sys.executable, "-c", opening, tmp_path / "file"]) as other:
        looking = (
            "import sys, time\nfrom cafs.quota import _is_open\nuntil = time.monotonic() + 3\n"
            "while time.monotonic() < until:\n    _is_open(sys.argv[1])"
        )
        try:
            assert subprocess.run([sys.executable, "-c", looking, tmp_path / "file"], check=False).returncode == 0
        finally:
            other.kill()


def test_a_kernel_that_sends_nothing_again_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before Linux 6.9, which answers the notification with EINVAL."""
    from cafs.fusedev import Server

    reader, writer = os.pipe()
    server = Server(writer, None, 1)

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        server.take_over()
    assert "before 6.9" in caplog.text
    os.close(reader)
    os.close(writer)
