"""Mounting an image with the fuse engine: checks, the daemon, the list of mounts, unmounting."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time

from cafs import atomic, image, linux, mountinfo, paths
from cafs.cache import FETCH_LIMIT_S, Cache
from cafs.errors import BusyError, CafsError, NotFound, UnsupportedError, os_error, quote
from cafs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.index import Index

_EXIT_WAIT_MS = 5000
_CLOSE_UP_TO = 4096


class Request:
    """What to mount and how.  name: IMAGE as given; point: absolute mount point."""

    def __init__(
        self,
        name: str,
        point: str,
        *,
        store: str,
        log: str | None = None,
        extra: set[str] | None = None,
        limit_s: float = FETCH_LIMIT_S,
    ) -> None:
        self.name = name
        self.point = os.path.realpath(point)
        self.store = store
        self.log = log
        self.extra = extra or {"nosuid", "nodev"}
        self.limit_s = limit_s


def mount(request: Request, *, foreground: bool = False) -> str | None:
    """Mount, and return once the mount answers (foreground: once it is unmounted).

    Returns a note if the same image was mounted there already.  Raises NotFound, BusyError, UnsupportedError, CafsError.
    """
    index, identity, store = image.load_index(request.name, request.store)
    if store is None:
        image.check_hash(index, request.name, Store(request.store))
    digest = identity.hex()
    note = _check_point(request.point, digest)
    if note:
        return note
    _check_host()
    if foreground:
        _serve(request, index, digest, lambda: None)
        return None
    _daemonise(request, index, digest)
    try:
        os.stat(request.point)
    except OSError as error:
        raise os_error(f"mounted on {quote(request.point)}, but it does not answer", error) from error
    return None


def _check_point(point: str, digest: str) -> str | None:
    here = mountinfo.at(point)
    if here and here.fstype == mountinfo.FSTYPE:
        if not mountinfo.answers(point):
            _unmount_stale(point)
            here = None
        else:
            if here.digest == digest and mountinfo.is_mine(here):
                return f"already mounted on {point}"
            raise BusyError(
                f"{quote(point)} is taken: image {here.digest[:12]} is mounted there", hint=f"cafs-mount --unmount {point}"
            )
    if here:
        raise BusyError(f"{quote(point)} is taken: a {here.fstype.decode()} file system is mounted there")
    try:
        names = os.listdir(point)
    except OSError as error:
        raise os_error(f"cannot mount on {quote(point)}", error) from error
    if names:
        raise CafsError(
            f"cannot mount on {quote(point)}: Directory not empty", hint="its content would be hidden; use an empty one"
        )
    return None


def _check_host() -> None:
    try:
        if os.geteuid() == 0:  # an ordinary user's fusermount3 opens it for them
            os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        else:
            os.stat("/dev/fuse")
    except OSError as error:
        raise UnsupportedError(f"cannot open '/dev/fuse': {error.strerror}", hint="modprobe fuse; apt install fuse3") from error
    if os.geteuid() and not shutil.which("fusermount3"):
        raise UnsupportedError("cannot mount without root: no fusermount3", hint="apt install fuse3")


def _daemonise(request: Request, index: Index, digest: str) -> None:
    """Fork a server in its own session; returns when it is mounted.  Its failure is raised here."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_daemon(request, index, digest, writer))
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read(65536)
    os.waitpid(child, 0)
    if answer != b"ok":
        message, _, hint = answer.decode(errors="replace").partition("\n")
        raise UnsupportedError(message or "the server died while it mounted", hint=hint or None)


def _daemon(request: Request, index: Index, digest: str, writer: int) -> int:
    """In the child: fork again, so that nobody has to wait for the server; report 'ok' or the error through the pipe."""
    os.setsid()
    if os.fork():
        return 0
    os.closerange(3, writer)  # whoever waits for the end of a pipe or a lock of the caller's must not wait for us
    os.closerange(writer + 1, _CLOSE_UP_TO)
    os.chdir("/")

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(writer, b"ok")
        os.close(writer)

    try:
        _serve(request, index, digest, ready)
    except BaseException as error:  # the only way out of this process
        hint = getattr(error, "hint", None) or ""
        try:
            os.write(writer, f"{error}\n{hint}".encode())
        except OSError:
            logging.getLogger(__name__).exception("server failed")
        return 1
    return 0


def _serve(request: Request, index: Index, digest: str, ready: Callable[[], None]) -> None:
    from cafs.fusefs import serve
    from cafs.tree import Tree

    _log_to(request.log)
    store = Store(request.store)
    tree = Tree(index, Cache(paths.cache(), store, limit_s=request.limit_s), store.get_locator(index.identity))
    record = _record_path(request.point)

    def mounted() -> None:
        _write_record(record, request, digest)
        ready()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server ends when the last user of the mount has
        signal.signal(number, lambda *_: _unmount_stale(request.point))
    try:
        serve(tree, request.point, f"cafs:{digest}", extra=request.extra, limit_s=request.limit_s, ready=mounted)
    finally:
        tree.close()
        atomic.unlink_quietly(record)


def _log_to(path: str | None) -> None:
    import logging.handlers

    handler: logging.Handler
    if path:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s cafs-mount[%(process)d]: %(levelname)s: %(message)s"))
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log")
        handler.setFormatter(logging.Formatter("cafs-mount[%(process)d]: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("cafs-mount: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _record_path(point: str) -> str:
    name = hashlib.sha256(os.fsencode(point)).hexdigest()[:32]
    return os.path.join(paths.run(), "mounts", f"{name}.json")


def _write_record(path: str, request: Request, digest: str) -> None:
    """Note for --list; mountinfo stays the truth about what is mounted."""
    record = {"digest": digest, "engine": "fuse", "image": request.name, "pid": os.getpid(), "start": int(time.time())}
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        atomic.replace_file(path, json.dumps(record, sort_keys=True).encode(), 0o600)
    except OSError as error:
        logging.getLogger(__name__).warning("cannot write %s: %s", path, error.strerror)


def listing() -> list[dict[str, object]]:
    """Our mounts: point, digest, engine, and what the record adds: image, pid, start."""
    found = []
    for one in mountinfo.ours():
        point = os.fsdecode(one.point)
        row: dict[str, object] = {
            "mountpoint": point,
            "digest": one.digest,
            "engine": "fuse",
            "image": "",
            "pid": 0,
            "start": 0,
        }
        row.update(_read_record(point, one.digest))
        found.append(row)
    return found


def _read_record(point: str, digest: str) -> dict[str, object]:
    try:
        record = json.loads(atomic.read_file(_record_path(point), 65536))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("digest") == digest else {}


def unmount(point: str) -> None:
    """Unmount, and wait until the server has ended.  Raises NotFound, BusyError."""
    point = os.path.realpath(point)
    here = mountinfo.at(point)
    if not here or here.fstype != mountinfo.FSTYPE:
        raise NotFound(f"nothing of ours is mounted on {quote(point)}", hint="cafs-mount --list")
    pid = _read_record(point, here.digest).get("pid", 0)
    pidfd = -1
    if isinstance(pid, int) and pid > 1:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = -1
    try:
        _unmount(point)
        if pidfd >= 0:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(_EXIT_WAIT_MS)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _unmount(point: str) -> None:
    if os.geteuid() == 0:
        try:
            linux.umount(point, linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == 16:
                raise BusyError(f"cannot unmount {quote(point)}: it is in use", hint=f"fuser -vm {point}") from error
            raise os_error(f"cannot unmount {quote(point)}", error) from error
        return
    done = subprocess.run(["fusermount3", "-u", "--", point], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BusyError(f"cannot unmount {quote(point)}: {done.stderr.strip().rpartition(': ')[2]}")


def _unmount_stale(point: str) -> None:
    if os.geteuid() == 0:
        linux.umount(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    else:
        subprocess.run(["fusermount3", "-u", "-z", "--", point], capture_output=True, check=False)
