"""A loop over descriptors that sends, after each turn, what was said in it.

Part of the agent's program: standard library only, Python 3.9.
Thousands of small frames a second go through it: what is said in a turn goes out together.  epoll(7).
"""

from __future__ import annotations

import heapq
import os
import select
import socket
import struct
import time
from itertools import count

from pool import calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PIECE = 1 << 18
_READ_MAX = 4
"""Pieces read from one connection in a turn, so that no other has to wait for it."""

_UNSENT_MAX, _SHARED_MAX = 64 << 20, 1 << 30
"""Of a connection that one uses, or many: what these may have under way is bounded for each."""


class Loop:
    """Descriptors, times, and connections that have something to send."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._times: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.to_send: dict[Wire, None] = {}
        self.before_sending: Callable[[], None] = lambda: None
        self.is_over = False
        self.now = time.monotonic()

    def add(self, fd: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """handler: is given what of EPOLLIN, EPOLLOUT, EPOLLHUP is so."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """What is waited for."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Before it is closed."""
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do it at a time of time.monotonic()."""
        heapq.heappush(self._times, (when, next(self._order), what))

    def run(self) -> None:
        """Until `is_over`."""
        while not self.is_over:
            self.turn()

    def turn(self, wait_s: float = 60.0) -> None:
        """Wait, do what is due, send what was said."""
        if self._times:
            wait_s = min(max(self._times[0][0] - time.monotonic(), 0.0), wait_s)
        ready = self._epoll.poll(wait_s)
        self.now = time.monotonic()
        for fd, events in ready:
            handler = self._handlers.get(fd)
            if handler:
                handler(events)
        while self._times and self._times[0][0] <= self.now:
            heapq.heappop(self._times)[2]()
        self.before_sending()
        self.flush()

    def flush(self) -> None:
        """What was said."""
        while self.to_send:
            wires, self.to_send = self.to_send, {}
            for wire in wires:
                wire.flush()


class Wire:
    """A connection that carries frames.  heed: is given each frame's fields; lost: is called once, when it has ended.

    is_shared: calls of many go through it.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        heed: Callable[[int, int, bytes, int, int, bytes], None],
        lost: Callable[[str], None],
        *,
        is_shared: bool = False,
    ) -> None:
        connection.setblocking(False)
        self._unsent_max = _SHARED_MAX if is_shared else _UNSENT_MAX
        self._loop, self.socket, self._heed, self._lost = loop, connection, heed, lost
        self._fd = connection.fileno()
        self._reader = calls.Reader()
        self._unsent = bytearray()
        self._is_writing = False
        self.is_open = True
        loop.add(self._fd, self._serve)

    def say(self, frame: bytes) -> None:
        """At the end of this turn.  To one that reads nothing, too much is not said: it is closed."""
        if not self.is_open:
            return
        self._unsent += frame
        if not self._is_writing:
            self._loop.to_send[self] = None
        if len(self._unsent) > self._unsent_max:
            self.close("it takes nothing")

    def flush(self) -> None:
        """As much as it takes."""
        if not self.is_open:
            return
        try:
            while self._unsent:
                sent = self.socket.send(memoryview(self._unsent)[: _PIECE * _READ_MAX])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            return self.close(error.strerror or "lost")
        if bool(self._unsent) != self._is_writing:
            self._is_writing = bool(self._unsent)
            self._loop.change(self._fd, select.EPOLLIN | (select.EPOLLOUT if self._is_writing else 0))

    def _serve(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if not events & ~select.EPOLLOUT:
            return
        try:
            for _ in range(_READ_MAX):
                if not self.is_open:
                    return
                data = self.socket.recv(_PIECE)
                if not data:
                    return self.close("it has ended")
                for one in self._reader.feed(data):
                    self._heed(*one)
                    if not self.is_open:
                        return
                if len(data) < _PIECE:
                    return
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(error.strerror or "lost")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
            self.close(f"it says what is not of this protocol: {error}")

    def close(self, why: str = "closed", *, is_quiet: bool = False) -> None:
        """What was not sent is lost.  is_quiet: nobody is told."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove(self._fd)
        self._loop.to_send.pop(self, None)
        self._reader, self._unsent = calls.Reader(), bytearray()  # whoever still has us has nothing of that
        self.socket.close()
        if not is_quiet:
            self._lost(why)

    def finish(self) -> None:
        """Send what was said, if it takes it at once, then close."""
        self.flush()
        self.close(is_quiet=True)


def listen(loop: Loop, listener: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
    """Give each connection to ACCEPTED."""

    def accept(_: int) -> None:
        try:
            accepted(listener.accept()[0])
        except OSError:
            pass  # too many files are open, or it has gone: it is tried again

    loop.add(listener.fileno(), accept)


def waker(loop: Loop) -> Callable[[], None]:
    """What other threads, and signal handlers, call so that a turn begins."""
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def drain(_: int) -> None:
        try:
            os.read(reads, 4096)
        except BlockingIOError:
            pass

    def wake() -> None:
        try:
            os.write(writes, b"x")
        except BlockingIOError:
            pass

    loop.add(reads, drain)
    return wake
