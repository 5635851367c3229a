"""Taking part in a container in the background: the other side of its monitor's socket, and the keys that end it."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time

from cafs import atomic, stopping
from cafs.errors import CafsError, UsageError, quote
from runner.attachment import frame, frames
from runner.stdio import raw_terminal, window_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_PIECE = 1 << 16
_BEGIN_S = 2.0
DEFAULT_KEYS = "ctrl-p,ctrl-q"


def keys(text: str | None) -> bytes:
    """The bytes of ctrl-p,ctrl-q.  Raises UsageError."""
    found = b""
    for word in (DEFAULT_KEYS if text is None else text).split(",") if text != "" else []:
        if len(word) == 1:
            found += word.encode()
        elif word.startswith("ctrl-") and len(word) == 6 and 0x40 <= ord(word[5].upper()) <= 0x5F:
            found += bytes([ord(word[5].upper()) - 0x40])
        else:
            raise UsageError(f"{quote(word)} is not a key", hint=DEFAULT_KEYS)
    return found


class Detacher:
    """Finds the keys in what is typed."""

    def __init__(self, wanted: bytes) -> None:
        self._wanted = wanted
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be passed on, and whether the keys were typed."""
        passed = b""
        for byte in data:
            self._held += bytes([byte])
            if self._wanted and self._held == self._wanted:
                return passed, True
            while self._held and not self._wanted.startswith(self._held):
                passed += self._held[:1]
                self._held = self._held[1:]
        return passed, False


def connect(container: Container) -> socket.socket:
    """Raises CafsError if it does not run."""
    deadline = time.monotonic() + _BEGIN_S
    while True:
        fd = os.open(container.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{fd}/attach")
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline or not container.is_running():
                raise CafsError(f"cannot attach to container {quote(container.name)}: it does not run") from None
            time.sleep(0.02)
        finally:
            os.close(fd)


def join(container: Container, connection: socket.socket, *, with_input: bool, detach: bytes) -> int | None:
    """Carry input and output until it ends; its exit code, None after the keys were typed, or if nobody knows."""
    has_terminal = container.has("tty")
    is_typed = with_input and os.isatty(0)
    restore = raw_terminal(0) if has_terminal and is_typed else None
    detacher = Detacher(detach if has_terminal and is_typed else b"")
    poll = select.poll()
    resized = stopping.note([signal.SIGWINCH] if has_terminal else [])
    poll.register(resized, select.POLLIN)
    if has_terminal:
        _send_size(connection)
    poll.register(connection, select.POLLIN)
    if with_input:
        poll.register(0, select.POLLIN | select.POLLHUP)
    received = bytearray()
    try:
        while True:
            for fd, _ in poll.poll():
                if fd == connection.fileno():
                    try:
                        data = connection.recv(_PIECE)
                    except OSError:
                        data = b""
                    if not data:
                        return _code(container)
                    received += data
                    code = _take(received)
                    if code is not None:
                        return int(code) if code else None
                elif fd == resized:
                    os.read(resized, 64)
                    _send_size(connection)
                elif not _pass_input(connection, detacher, poll):
                    return None
    finally:
        if restore:
            restore()


def _take(received: bytearray) -> bytes | None:
    """Print the frames that are whole; what the last one says, None if it has not come."""
    for kind, body in frames(received):
        if kind == b"q":
            return body
        atomic.write_all(2 if kind == b"x" else 1, body)
    return None


def _pass_input(connection: socket.socket, detacher: Detacher, poll: select.poll) -> bool:
    """Whether to go on."""
    try:
        data = os.read(0, _PIECE)
    except OSError:
        data = b""
    passed, is_over = detacher.feed(data)
    try:
        if passed:
            connection.sendall(frame(b"i", passed))
        if not data:
            poll.unregister(0)
            connection.sendall(frame(b"e"))
    except OSError:
        if data:
            poll.unregister(0)  # it has ended; what it has said last is still to be read
    return not is_over


def _send_size(connection: socket.socket) -> None:
    size = window_size()
    if size:
        try:
            connection.sendall(frame(b"r", struct.pack(">HH", *size)))
        except OSError:
            pass  # it has ended, as the reader will see


def follow(container: Container, since_ns: int) -> int:
    """Print what it logs from then on, to its end; its exit code.  Nothing is missed, however short it is."""
    from runner import alive, logs

    for when, stream, data in logs.follow(container.path("log"), lambda: not alive.is_watched(container.id)):
        if when >= since_ns:
            atomic.write_all(2 if stream == "stderr" else 1, data)
    if lost := int(container.state().get("log_lost", 0)):
        logs.say_lost(container, lost)
    return _code(container) or 0


def feed_and_follow(container: Container, since_ns: int) -> int:
    """The same, while a child passes our standard input."""
    child = os.fork()
    if not child:
        try:
            connection = connect(container)
            while data := os.read(0, _PIECE):
                connection.sendall(frame(b"i", data))
            connection.sendall(frame(b"e"))
            while connection.recv(_PIECE):  # so that it stays attached until the end
                pass
        except (OSError, CafsError):
            pass  # it has ended
        finally:
            os._exit(0)
    try:
        return follow(container, since_ns)
    finally:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)


def _code(container: Container) -> int | None:
    """Its exit code once its watcher has noted it; None if nobody knows."""
    from runner import control

    text = control.wait(container)
    return int(text) if text.isdigit() else None
