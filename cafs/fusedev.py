"""The protocol of /dev/fuse, as far as a read-only file system needs it, for servers that may be killed at any time.

Nothing about an open file is ever remembered: OPEN and OPENDIR are answered with ENOSYS, after which the kernel sends no OPEN,
RELEASE or FLUSH.  So a new server takes the descriptor of a dead one, has the requests that the dead one had taken sent again
(FUSE_NOTIFY_RESEND, Linux 6.9), and goes on.  Sources: include/uapi/linux/fuse.h; Documentation/filesystems/fuse/.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from cafs.fusemount import READAHEAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

LOOKUP, FORGET, GETATTR, READLINK, READ, STATFS, RELEASE = 1, 2, 3, 5, 15, 17, 18
GETXATTR, LISTXATTR, FLUSH, INIT, READDIR, RELEASEDIR, INTERRUPT = 22, 23, 25, 26, 28, 29, 36
DESTROY, BATCH_FORGET, READDIRPLUS = 38, 42, 44
ROOT = 1
FOREVER_S = 1 << 30
_NOTIFY_RESEND = 7
_ASYNC_READ, _DO_READDIRPLUS, _READDIRPLUS_AUTO, _PARALLEL_DIROPS = 1 << 0, 1 << 13, 1 << 14, 1 << 18
_POSIX_ACL, _MAX_PAGES, _CACHE_SYMLINKS, _EXPLICIT_INVAL_DATA, _INIT_EXT = 1 << 20, 1 << 22, 1 << 23, 1 << 25, 1 << 30
_FLAGS = _ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES | _EXPLICIT_INVAL_DATA | _INIT_EXT
TREE_FLAGS = _DO_READDIRPLUS | _READDIRPLUS_AUTO | _POSIX_ACL | _CACHE_SYMLINKS
"""Also wanted by a file system that lists directories and has links and access lists."""

_HAS_RESEND = 1 << (39 - 32)
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<QQQQII")
_INIT_IN = struct.Struct("<IIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_MAX_WRITE = 1 << 16
_PAGES = 256
_READERS = 2
_THREADS, _NEAR_THREADS = 32, 4
_TICK_S = 0.25
_DRAIN_S = 0.5
_INTERRUPT_S = 5.0
_log = logging.getLogger(__name__)


def attr(
    node: int, mode: int, size: int, links: int = 1, mtime_ns: int = 0, uid: int = 0, gid: int = 0, device: int = 0
) -> bytes:
    """struct fuse_attr; if nothing else is said of a file of root's."""
    seconds, ns = divmod(mtime_ns, 10**9)
    seconds &= 0xFFFF_FFFF_FFFF_FFFF
    blocks = (size + 511) // 512
    times = seconds, seconds, seconds, ns, ns, ns
    return _ATTR.pack(node, size, blocks, *times, mode, links, uid, gid, device & 0xFFFF_FFFF, 4096, 0)


def entry_out(node: int, attributes: bytes) -> bytes:
    """struct fuse_entry_out that holds for ever."""
    return _ENTRY.pack(node, 0, FOREVER_S, FOREVER_S, 0, 0) + attributes


def no_entry_out(valid_s: int = 0) -> bytes:
    """The same without a node: in a listing of what is not to be looked up; to a LOOKUP, for so long there is no such name."""
    return _ENTRY.pack(0, 0, valid_s, 0, 0, 0) + bytes(_ATTR.size)


def attr_out(attributes: bytes) -> bytes:
    """struct fuse_attr_out that holds for ever."""
    return struct.pack("<QII", FOREVER_S, 0, 0) + attributes


def statfs_out(blocks: int = 0, files: int = 0) -> bytes:
    """struct fuse_statfs_out; overlayfs refuses a layer that does not answer STATFS."""
    return struct.pack("<5Q4I24x", blocks, 0, 0, files, 0, 4096, 255, 4096, 0)


def xattr_out(value: bytes, size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR: the value, or its size if SIZE is 0.  Raises OSError."""
    if not size:
        return struct.pack("<II", len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "value does not fit")
    return value


class FileSystem:
    """What a server asks.  Numbers of nodes in; errors are OSError with the errno that the kernel is to see."""

    flags = 0
    """Of INIT, beside those of every server."""

    def lookup(self, node: int, name: bytes) -> bytes:
        """struct fuse_entry_out."""
        raise NotImplementedError

    def getattr(self, node: int) -> bytes:
        """struct fuse_attr."""
        raise NotImplementedError

    def read_ready(self, node: int, offset: int, size: int) -> Buffer | None:
        """What is at hand, None if `read` is to be asked."""
        raise NotImplementedError

    def read(self, node: int, offset: int, size: int) -> Buffer:
        """May wait."""
        raise NotImplementedError

    def is_near(self, node: int) -> bool:
        """Whether `read` asks nobody far away: such reads do not stand behind those that do."""
        return False

    def statfs(self) -> bytes:
        """struct fuse_statfs_out."""
        return statfs_out()

    def readdir(self, node: int, offset: int, size: int, *, is_plus: bool) -> Buffer:
        """Records of struct fuse_dirent, or fuse_direntplus."""
        return b""

    def readlink(self, node: int) -> bytes:
        raise OSError(errno.EINVAL, "not a link")

    def xattr(self, node: int, name: bytes) -> bytes:
        """The value."""
        raise OSError(errno.ENOSYS, "no attributes")

    def xattr_names(self, node: int) -> list[bytes]:
        raise OSError(errno.ENOSYS, "no attributes")

    def describe(self, node: int) -> str:
        """For the log."""
        return f"node {node}"


class Server:
    """Answers requests until the file system is unmounted or `stop` is called.

    fd: of /dev/fuse.  limit_s: after so long a READ that waits for a store ends in EIO.  What is ready is answered at once, by
    the thread that took the request; what may wait, by one of many others.  files: None to answer EIO, for now, to everything
    that can be answered so: an empty list or 'no such thing' would be remembered by the kernel.
    """

    def __init__(self, fd: int, files: FileSystem | None, limit_s: float) -> None:
        self.fd = fd
        self.is_broken = files is None
        self.files = files or FileSystem()
        self.limit_s = limit_s
        self._pending: dict[int, tuple[float, int, int]] = {}  # request -> deadline, node, process
        self._lock = threading.Lock()
        self._interrupted: dict[int, float] = {}  # request -> until when it is looked after
        self._far, self._near = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(_NEAR_THREADS)
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        os.set_blocking(fd, False)  # one that is woken may find that another has taken the request

    def take_over(self) -> None:
        """Have the requests sent again that another server of this descriptor had taken and not answered."""
        try:
            os.write(self.fd, _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _log.warning("this kernel (before 6.9) sends no request again: what the old server had taken is not answered")

    def serve(self) -> None:
        """Returns once the file system is unmounted, or all that was taken is answered after `stop`."""
        readers = [threading.Thread(target=self._read_requests, daemon=True) for _ in range(_READERS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            while reader.is_alive():
                self._expire()
                reader.join(_TICK_S)
        deadline = time.monotonic() + min(self.limit_s, _DRAIN_S)
        while self._stopping and self._pending and time.monotonic() < deadline:
            self._expire()
            time.sleep(0.01)

    def stop(self) -> None:
        """Take no more requests.  May be called by a signal handler."""
        self._stopping = True
        os.write(self._waker, b"x")

    def _expire(self) -> None:
        """EIO for those that have waited too long: a server that hangs hangs its users."""
        now = time.monotonic()
        for unique, (deadline, node, _) in list(self._pending.items()):
            if deadline < now:
                _log.error("reading %s: no answer within %g s", self.files.describe(node), self.limit_s)
                self._finish(unique, -errno.EIO)
        self._end_dying()

    def _read_requests(self) -> None:
        buffer = bytearray(_MAX_WRITE + 4096)
        poll = select.epoll()
        poll.register(self.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)  # one request wakes one reader
        poll.register(self._wake, select.EPOLLIN)
        while not self._stopping:
            poll.poll()
            if self._stopping:
                return
            try:
                size = os.readv(self.fd, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                if error.errno != errno.ENODEV:
                    _log.error("cannot read from /dev/fuse: %s", error.strerror)
                self.stop()
                return
            self._handle(bytes(buffer[:size]))

    def _handle(self, request: bytes) -> None:
        _, operation, unique, node, _, _, pid, _, _ = _IN.unpack_from(request)
        body = request[_IN.size :]
        if operation in (FORGET, BATCH_FORGET):
            return
        if operation == INTERRUPT:
            self._interrupt(int.from_bytes(body[:8], "little"))
            return
        if self.is_broken:
            if operation != INIT:  # which waits for a real server
                self._reply(unique, -errno.EIO)
            return
        answer: Buffer | int | None
        try:
            answer = self._read(unique, node, pid, body) if operation == READ else self._answer(operation, node, body)
        except OSError as error:
            answer = -(error.errno or errno.EIO)
        except Exception:
            _log.exception("request %d of node %d failed", operation, node)
            answer = -errno.EIO
        if answer is not None:
            self._reply(unique, answer)

    def _answer(self, operation: int, node: int, body: bytes) -> Buffer | int:
        if operation == LOOKUP:
            return self.files.lookup(node, body.rstrip(b"\0"))
        if operation == GETATTR:
            return attr_out(self.files.getattr(node))
        if operation in (READDIR, READDIRPLUS):
            offset, size = struct.unpack_from("<8xQI", body)
            return self.files.readdir(node, offset, size, is_plus=operation == READDIRPLUS)
        if operation == READLINK:
            return self.files.readlink(node)
        if operation == GETXATTR:
            return xattr_out(self.files.xattr(node, body[8:].rstrip(b"\0")), int.from_bytes(body[:4], "little"))
        if operation == LISTXATTR:
            names = b"".join(name + b"\0" for name in self.files.xattr_names(node))
            return xattr_out(names, int.from_bytes(body[:4], "little"))
        if operation == STATFS:
            return self.files.statfs()
        if operation == INIT:
            return _init(body, self.files.flags)
        if operation in (RELEASE, RELEASEDIR, DESTROY):
            return b""
        return -errno.ENOSYS  # OPEN, OPENDIR, FLUSH, ACCESS: the kernel will not ask again

    def _read(self, unique: int, node: int, pid: int, body: bytes) -> Buffer | None:
        offset, size = struct.unpack_from("<8xQI", body)
        data = self.files.read_ready(node, offset, size)
        if data is None:
            with self._lock:
                self._pending[unique] = time.monotonic() + self.limit_s, node, pid
            pool = self._near if self.files.is_near(node) else self._far
            pool.submit(self._read_later, unique, node, offset, size)
        return data

    def _read_later(self, unique: int, node: int, offset: int, size: int) -> None:
        if unique not in self._pending:
            return  # it was interrupted, or has waited too long
        answer: Buffer | int
        try:
            answer = self.files.read(node, offset, size)
        except OSError as error:
            answer = -(error.errno or errno.EIO)
        except Exception as error:
            _log.error("reading %s: %s", self.files.describe(node), error)
            answer = -errno.EIO
        self._finish(unique, answer)

    def _interrupt(self, unique: int) -> None:
        """A process that is waiting got a signal: only one that is to die does not get its answer.

        The kernel says so once, maybe before the request is noted here, and not again for a later signal that does kill.
        """
        self._interrupted[unique] = time.monotonic() + _INTERRUPT_S
        self._end_dying()

    def _end_dying(self) -> None:
        now = time.monotonic()
        for unique, until in list(self._interrupted.items()):
            pid = self._pending.get(unique, (0.0, 0, 0))[2]
            if pid and _is_dying(pid):
                self._finish(unique, -errno.EINTR)
            if unique not in self._pending and now > until:
                self._interrupted.pop(unique, None)

    def _finish(self, unique: int, answer: Buffer | int) -> None:
        """Answer a request that waits; only the first answer counts."""
        with self._lock:
            is_first = self._pending.pop(unique, None) is not None
        if is_first:
            self._reply(unique, answer)

    def _reply(self, unique: int, answer: Buffer | int) -> None:
        try:
            if isinstance(answer, int):
                os.write(self.fd, _OUT.pack(_OUT.size, answer, unique))
            else:
                size = _OUT.size + memoryview(answer).nbytes
                os.writev(self.fd, [_OUT.pack(size, 0, unique), answer])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EBADF):  # it is not waited for any more
                _log.error("cannot answer a request: %s", error.strerror)


def _is_dying(pid: int) -> bool:
    """Whether SIGKILL, or what amounts to it, is pending for a process or thread (proc_pid_status(5))."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return True
    pending = [int(line.split()[1], 16) for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    return any(mask & 1 << (signal.SIGKILL - 1) for mask in pending)


def _init(body: bytes, more: int) -> bytes:
    _, minor, _, flags, flags2 = _INIT_IN.unpack_from(body.ljust(_INIT_IN.size, b"\0"))
    wanted = flags & (_FLAGS | more)
    wanted2 = flags2 & _HAS_RESEND if flags & _INIT_EXT else 0
    return _INIT_OUT.pack(7, min(minor, 40), READAHEAD, wanted, 64, 48, _MAX_WRITE, 1, _PAGES, 0, wanted2, 0, 0)
