"""Who is attached to a container in the background: a Unix socket of its monitor, and frames both ways.  cafs-container(5).

A frame is a letter, four bytes of length (big-endian) and data.  To the monitor: i (input), e (its end), r (rows and columns of
the terminal, two bytes each).  From it: o (output), x (errors), q (the exit code in decimal, or nothing).
"""

from __future__ import annotations

import os
import select
import socket
import struct

from cafs import atomic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = struct.Struct(">cI")
_FRAME_MAX = 1 << 20
_BACKLOG_MAX = 8 << 20
_PIECE = 1 << 16
_INPUT_MAX = 1 << 20


def frame(kind: bytes, body: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(kind, len(body)) + body


def frames(received: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Take out the frames that are whole: their letters and data.  Raises ValueError for one that is too long."""
    while len(received) >= _HEAD.size:
        kind, size = _HEAD.unpack_from(received)
        if size > _FRAME_MAX:
            raise ValueError("frame is too long")
        if len(received) < _HEAD.size + size:
            return
        body = bytes(received[_HEAD.size : _HEAD.size + size])
        del received[: _HEAD.size + size]
        yield kind, body


def _listen(directory: str) -> socket.socket:
    """Raises OSError."""
    found = socket.socket(socket.AF_UNIX)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        atomic.unlink_quietly(os.path.join(directory, "attach"))
        found.bind(f"/proc/self/fd/{fd}/attach")  # sun_path holds 107 bytes
    except OSError:
        found.close()
        raise
    finally:
        os.close(fd)
    found.listen(16)
    found.setblocking(False)
    return found


class Attachments:
    """The monitor's side.  input_fd: what the container reads, -1: nothing."""

    def __init__(self, directory: str, input_fd: int, is_terminal: bool) -> None:
        self._input = input_fd
        self._is_terminal = is_terminal
        self._unsent = bytearray()
        self._is_over = False
        if input_fd >= 0:
            os.set_blocking(input_fd, False)
        self._clients: dict[int, _Client] = {}
        try:
            self._socket = _listen(directory)
        except OSError:  # a full disk, most likely: nobody attaches, but the end is noted all the same
            self._socket, self._nobody = socket.socketpair()

    @property
    def are_full(self) -> bool:
        """Whether somebody reads too slowly: what the container writes then waits in its pipe."""
        return any(len(one.unsent) > _BACKLOG_MAX for one in self._clients.values())

    def register(self, poll: select.poll) -> None:
        """What to wait for."""
        poll.register(self._socket, select.POLLIN)
        takes_input = len(self._unsent) < _INPUT_MAX  # what the container does not read waits with who sends it
        for fd, one in self._clients.items():
            poll.register(fd, (select.POLLIN if takes_input else 0) | (select.POLLOUT if one.unsent else 0))

    @property
    def input_waits(self) -> int:
        """A descriptor into which there is something to be written, -1 if there is nothing."""
        return self._input if self._unsent else -1

    def feed(self) -> None:
        """Write what the container is to read, as much as goes."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._input, self._unsent[:_PIECE])]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()  # nobody reads it any more
        if self._is_over and not self._is_terminal:
            os.close(self._input)
            self._input = -1

    def serve(self, ready: dict[int, int]) -> None:
        """Accept, read and write what is ready."""
        if self._socket.fileno() in ready:
            try:
                connection, _ = self._socket.accept()
                connection.setblocking(False)
                self._clients[connection.fileno()] = _Client(connection)
            except OSError:
                pass
        for fd in [fd for fd in ready if fd in self._clients]:
            one = self._clients[fd]
            if (ready[fd] & select.POLLOUT and not one.flush()) or (ready[fd] & ~select.POLLOUT and not self._receive(one)):
                del self._clients[fd]
                one.connection.close()

    def send(self, name: str, data: bytes) -> None:
        """To all."""
        for one in self._clients.values():
            one.unsent += frame(b"x" if name == "stderr" else b"o", data)
            one.flush()

    def end(self, code: int | None) -> None:
        """The container has ended: say so to all, and wait a little for those who are slow."""
        text = b"" if code is None else str(code).encode()
        for one in self._clients.values():
            one.unsent += frame(b"q", text)
            one.connection.settimeout(2)
            try:
                one.connection.sendall(one.unsent)
            except OSError:
                pass
            one.connection.close()
        self._socket.close()

    def _receive(self, one: _Client) -> bool:
        try:
            data = one.connection.recv(_PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        one.received += data
        try:
            for kind, body in frames(one.received):
                self._take(kind, body)
        except ValueError:
            return False
        return True

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == b"r" and len(body) == 4 and self._is_terminal:
            import fcntl
            import termios

            rows, columns = struct.unpack(">HH", body)
            fcntl.ioctl(self._input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        elif self._input >= 0 and not self._is_over and kind in (b"i", b"e"):
            self._unsent += body if kind == b"i" else b"\x04" if self._is_terminal else b""
            self._is_over = kind == b"e" and not self._is_terminal
            self.feed()


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()
        self.unsent = bytearray()

    def flush(self) -> bool:
        """Send what can be sent; whether it still listens."""
        try:
            while self.unsent:
                del self.unsent[: self.connection.send(self.unsent[:_PIECE])]
        except BlockingIOError:
            return True
        except OSError:
            self.unsent.clear()
            return False
        return True
