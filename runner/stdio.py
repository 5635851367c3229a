"""Standard streams of a container that runs detached from its runtime.

Nothing that our caller has is passed to it: what a command has it can open anew through /proc, and so read what others write
into the caller's pipe, or write what others read from it; and the runtime would chown it.  All goes through pipes and threads.

With -t the command gets a terminal of its own, whose other end runc hands us over a socket.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import struct
import termios
from functools import partial

from cafs import atomic, stopping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread
    from typing import TypeVar

    from runner.joining import Detacher
    from runner.logs import Log

    _Result = TypeVar("_Result")

_PIECE = 1 << 16
_UNSENT_MAX = 1 << 20
_PIPE = 1 << 20


def _widen(fd: int) -> None:
    """Let a pipe hold 1 MiB, not 64 KiB: what is carried takes fewer turns.  pipe(7), Pipe capacity."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < _PIPE:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError:
        pass  # it is no pipe; or the user has too many


class Given:
    """What runc gets as 0, 1, 2.  child: the descriptors."""

    def __init__(self) -> None:
        self.child: list[int] = []
        self._owned: list[int] = []

    def _own(self, fd: int) -> int:
        self._owned.append(fd)
        return fd

    def started(self) -> None:
        """Close our copies of what the container has now."""
        for fd in self._owned:
            os.close(fd)
        self._owned = []


class Streams(Given):
    """Pipes, and the threads that carry between them and ours."""

    def __init__(self, interactive: bool, log: Log | None = None, owner: int = -1) -> None:
        """log: where what it prints is kept; then it is always carried.  owner: who may open the pipes anew, as /dev/stdout.

        The runtime would see to that, but not in a user namespace, where the pipes' owner is nobody.
        """
        from threading import Lock

        super().__init__()
        self._owner = owner
        self._log = log
        self._lock = Lock()
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._outputs: list[Thread] = []
        self._failures: list[OSError] = []
        for fd in (0, 1, 2):
            if fd == 0 and not interactive:
                self.child.append(self._own(_nothing()))
            elif fd == 2 and log is None and _is_same(1, 2):
                self.child.append(self.child[1])  # in the order in which it is written
            else:
                self.child.append(self._relay(fd))

    def _relay(self, fd: int) -> int:
        from threading import Thread

        reader, writer = os.pipe2(os.O_CLOEXEC)
        for pipe in (reader, fd):
            _widen(pipe)
        _give(reader, self._owner)
        if fd == 0:
            Thread(target=_copy, args=(0, writer, True, [], None), daemon=True).start()
            return self._own(reader)
        write = None if self._log is None else partial(self._note, "stderr" if fd == 2 else "stdout")
        thread = Thread(target=_copy, args=(reader, fd, False, self._failures, write, self._ended), daemon=True)
        thread.start()
        self._outputs.append(thread)
        return self._own(writer)

    def _note(self, stream: str, data: bytes) -> None:
        assert self._log
        with self._lock:  # both streams share the file, and its rotation
            self._log.write(stream, data)

    def drain(self) -> None:
        """After the command's end: wait until all that it wrote is written.  Raises OSError if it could not be.

        Nothing else is waited for: a process that it left in the background may hold the pipes for ever.
        """
        os.eventfd_write(self._ended, 1)
        for thread in self._outputs:
            thread.join()
        os.close(self._ended)
        for error in self._failures:
            raise error


def _is_same(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


def _give(fd: int, owner: int) -> None:
    try:
        os.fchown(fd, owner, -1)
    except OSError:
        pass  # we may not


def _nothing() -> int:
    """Something to read that is at its end: a pipe, for a device would be the host's."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    return reader


def _copy(
    source: int,
    target: int,
    close_target: bool,
    failures: list[OSError],
    log: Callable[[bytes], None] | None,
    ended: int = -1,
) -> None:
    try:
        while data := _when_ready(source, select.POLLIN, lambda: _piece(source, ended)):
            if log:
                log(data)
            view = memoryview(data)
            while view:
                view = view[_when_ready(target, select.POLLOUT, partial(os.write, target, view)) :]
    except OSError as error:
        failures.append(error)
    finally:
        os.close(target if close_target else source)


def _piece(source: int, ended: int) -> bytes:
    """What can be read, b'' at the end.  ended: an event after which what cannot be read at once is the end, -1 for none."""
    if ended >= 0:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(ended, select.POLLIN)
        if source not in dict(poll.poll()):
            return b""
    return os.read(source, _PIECE)


def _when_ready(fd: int, event: int, call: Callable[[], _Result]) -> _Result:
    """What a call says that may be said to come later: whoever shares a pipe with us may have made it non-blocking."""
    while True:
        try:
            return call()
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, event)
            poll.poll()


class Fifos(Given):
    """Named pipes of a container in the background, so that another monitor finds them.  ours: our ends, by name.

    What it writes goes into pipes that are open for reading and writing, so it never finds one broken.  What it reads ends when
    nobody has our end any more.
    """

    def __init__(self, directory: str, interactive: bool, uid: int) -> None:
        super().__init__()
        self.ours: dict[str, int] = {}
        for name in ("stdin", "stdout", "stderr"):
            path = os.path.join(directory, name)
            if name == "stdin" and not interactive:
                self.child.append(self._own(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
                continue
            try:
                os.mkfifo(path, 0o600)
            except FileExistsError:
                pass
            self.ours[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            flags = os.O_RDONLY if name == "stdin" else os.O_RDWR
            self.child.append(self._own(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)))
            os.chown(path, uid, -1)
        if interactive:  # only for writing, so that it ends with us
            writer = os.open(os.path.join(directory, "stdin"), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.close(self.ours["stdin"])
            self.ours["stdin"] = writer


def reopen(directory: str) -> dict[str, int]:
    """Our ends of the pipes that `Fifos` made, in another process."""
    found = {}
    for name in ("stdin", "stdout", "stderr"):
        flags = os.O_WRONLY if name == "stdin" else os.O_RDWR
        try:
            found[name] = os.open(os.path.join(directory, name), flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
    return found


class Console:
    """The socket on which runc sends the terminal, and the copying between it and ours."""

    def __init__(self, directory: str) -> None:
        self.directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        atomic.unlink_quietly(os.path.join(directory, "console"))
        import socket  # which takes 3 ms, and most containers have no terminal

        self.socket = socket.socket(socket.AF_UNIX)
        # sun_path holds 107 bytes; a directory may be deeper, its descriptor never is
        self.socket.bind(f"/proc/self/fd/{self.directory}/console")
        self.socket.listen(1)
        self.socket.settimeout(30)

    def receive(self) -> int:
        """The master side, after runc has started (SCM_RIGHTS, unix(7))."""
        from socket import CMSG_SPACE

        connection, _ = self.socket.accept()
        with connection:
            fds = array.array("i")
            _, ancillary, _, _ = connection.recvmsg(4096, CMSG_SPACE(fds.itemsize))
            for _, _, data in ancillary:
                fds.frombytes(data[: fds.itemsize])
        self.socket.close()
        os.set_inheritable(fds[0], False)
        return fds[0]


def run_terminal(master: int, interactive: bool, log: Log | None = None, detacher: Detacher | None = None) -> bool:
    """Copy between our terminal (or pipe) and the container's until it ends; False if the keys that end this were typed."""
    restore = raw_terminal(0) if interactive and os.isatty(0) else None
    _resize(master)
    resized = stopping.note([signal.SIGWINCH])
    os.set_blocking(master, False)
    try:
        return _carry(master, resized, interactive, log, detacher)
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)
        if restore:
            restore()


def _carry(master: int, resized: int, interactive: bool, log: Log | None, detacher: Detacher | None) -> bool:
    """The two directions do not wait for each other: a command that does not read may write, and the other way round."""
    unsent, reads = bytearray(), interactive
    while True:
        poll = select.poll()
        poll.register(resized, select.POLLIN)
        poll.register(master, select.POLLIN | (select.POLLOUT if unsent else 0))
        if reads and len(unsent) < _UNSENT_MAX:
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        if resized in ready:
            os.read(resized, 64)
            _resize(master)
        if ready.get(master, 0) & select.POLLOUT:
            try:
                del unsent[: os.write(master, unsent[:_PIECE])]
            except BlockingIOError:
                pass
            except OSError:
                unsent.clear()
        if ready.get(master, 0) & ~select.POLLOUT:
            data = _read(master)
            if data == b"":
                return True
            if data:
                if log:
                    log.write("stdout", data)
                atomic.write_all(1, data)
        if 0 in ready:
            data = _read(0)
            passed, is_over = detacher.feed(data or b"") if detacher else (data or b"", False)
            unsent += passed
            if is_over:
                return False
            if data == b"":
                reads = False
                unsent += b"\x04"  # end of file, as a terminal says it


def _read(fd: int) -> bytes | None:
    """b'' at the end, None if there is nothing now."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def raw_terminal(fd: int) -> Callable[[], None]:
    """Let every key through as it is typed; returns how to undo it."""
    import tty

    saved = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)  # the default would throw away what was typed ahead
    return lambda: termios.tcsetattr(fd, termios.TCSANOW, saved)


def window_size() -> tuple[int, int] | None:
    """Rows and columns of our terminal, None if we have none."""
    for fd in (0, 1, 2):
        if os.isatty(fd):
            rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
            return rows, columns
    return None


def _resize(master: int) -> None:
    size = window_size()
    try:
        if size:
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    except OSError:
        pass  # it has ended
