"""The controller's connections to agents: opened in threads, read and written by the loop, opened anew when they break."""

from __future__ import annotations

import os
import queue
import selectors
import socket
import threading
import time

from pool import frames, links, program, sockets
from pool.address import Pool
from pool.workers import Remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PIECE = 1 << 18
_SETUP_S, _SETUP_MAX_S = 120.0, 1800.0


class Wires:
    """pool: as of links.open_link.  heed: what is done with an object that an agent says; answered: with bytes;
    lost: when a connection has ended."""

    def __init__(
        self,
        pool: Pool,
        epoch: int,
        selector: selectors.DefaultSelector,
        heed: Callable[[Remote, dict[str, Any]], None],
        answered: Callable[[Remote, int, int, bytes], None],
        lost: Callable[[Remote], None],
    ) -> None:
        self._pool, self._epoch, self._selector = pool, epoch, selector
        self._heed, self._answered, self._lost = heed, answered, lost
        self._opened: queue.SimpleQueue[tuple[Remote, socket.socket | None, str]] = queue.SimpleQueue()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        selector.register(self._wake, selectors.EVENT_READ, lambda _: self._take_opened())

    def wake(self) -> None:
        """Let the loop turn at once.  May be called by threads and signal handlers."""
        try:
            os.write(self._waker, b"x")
        except BlockingIOError:
            pass  # it will

    def open(self, remote: Remote) -> None:
        """Begin to connect, if it is time for that."""
        if remote.link is None and not remote.is_opening and time.monotonic() >= remote.try_after:
            remote.is_opening = True
            threading.Thread(target=self._open, args=(remote,), daemon=True).start()

    def _open(self, remote: Remote) -> None:
        """In a thread."""
        try:
            link = links.open_link(self._pool, remote.name, remote.address)
            self._opened.put((remote, link, ""))
        except Exception as error:  # whatever a library raises: it is tried again
            self._opened.put((remote, None, str(error) or type(error).__name__))
        self.wake()

    def set_up(self, remote: Remote, *, for_s3: bool) -> None:
        """Bring what runs images; its agent says when it is there, else it is tried again, later each time."""
        remote.setup_after = time.monotonic() + min(_SETUP_S * 2**remote.setup_failures, _SETUP_MAX_S)
        threading.Thread(target=self._set_up, args=(remote, for_s3), daemon=True).start()

    def _set_up(self, remote: Remote, for_s3: bool) -> None:
        """In a thread."""
        from pool import toolkit

        try:
            toolkit.setup(self._pool, remote.name, remote.address, for_s3=for_s3)
            remote.setup_problem, remote.setup_failures = "", 0
        except Exception as error:  # whatever a library raises: jobs without images run there all the same
            remote.setup_problem = str(error) or type(error).__name__
            remote.setup_failures += 1

    def _take_opened(self) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        while not self._opened.empty():
            remote, link, problem = self._opened.get()
            if link is None or remote.is_gone or remote.link:
                remote.failed(problem)
                link.close() if link else None
                continue
            remote.connected(link)
            self._selector.register(link, selectors.EVENT_READ, lambda events, remote=remote: self._hear(remote, events))
            hello = {
                "protocol": frames.PROTOCOL,
                "build": program.make()[0],
                "pool": self._pool.id,
                "worker": remote.name,
                "epoch": self._epoch,
            }
            self.write(remote, frames.message("hello", **hello))

    def drop(self, remote: Remote, problem: str) -> None:
        """End a connection; it is tried again."""
        if remote.link:
            self._selector.unregister(remote.link)
        remote.failed(problem)
        self._lost(remote)

    def write(self, remote: Remote, frame: bytes) -> None:
        """Now, or as soon as it takes more."""
        if remote.link is None:
            return
        remote.unsent += frame
        try:
            sockets.send(self._selector, remote.link, remote.unsent)
        except OSError as error:
            self.drop(remote, str(error))

    def _hear(self, remote: Remote, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self.write(remote, b"")
        if remote.link is None or not events & selectors.EVENT_READ:
            return
        try:
            data = remote.link.recv(_PIECE)
            if not data:
                raise ConnectionResetError("the connection has ended")
            for kind, body in remote.reader.feed(data):
                if kind == frames.BYTES:
                    self._answered(remote, *body)
                else:
                    self._heed(remote, body)
        except BlockingIOError:
            pass
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            self.drop(remote, str(error))

    def close(self) -> None:
        """All of them; and whoever opens one in a thread ends with the process."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        links.finish()
