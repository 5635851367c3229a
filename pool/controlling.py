"""The router's connection to the controller: what functions there are, what becomes of instances, and asking for more."""

from __future__ import annotations

import json
import select
import socket
import time

from pool import sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pool.loop import Loop

_AGAIN_S = 0.2
_PIECE = 1 << 18


class ControllerLink:
    """heed: is given what the controller says by itself; begun: called when there is a connection.  Never blocks."""

    def __init__(self, loop: Loop, directory: str, heed: Callable[[dict[str, Any]], None], begun: Callable[[], None]) -> None:
        self._loop, self._directory, self._heed, self._begun = loop, directory, heed, begun
        self._socket: socket.socket | None = None
        self._held, self._unsent = b"", b""
        self._tag = 0
        self._answers: dict[int, Callable[[dict[str, Any]], None]] = {}
        self.lost_at = time.monotonic()

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def open(self) -> None:
        """Now, or as soon as there is a controller."""
        if self._socket:
            return
        try:
            self._socket = sockets.connect(self._directory)
        except OSError:
            return self._loop.at(time.monotonic() + _AGAIN_S, self.open)
        self._socket.setblocking(False)
        self._held, self._unsent = b"", b""
        self._loop.add(self._socket.fileno(), self._serve)
        self._begun()

    def ask(self, do: str, then: Callable[[dict[str, Any]], None], **fields: Any) -> None:
        """then: is given the answer, which may be {"error": TEXT}; also if there is no controller."""
        if not self._socket:
            return then({"error": "no controller runs for this pool"})
        self._tag += 1
        self._answers[self._tag] = then
        self._unsent += json.dumps({"do": do, "tag": self._tag, **fields}).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        assert self._socket
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            return self._lost()
        self._loop.change(self._socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))

    def _serve(self, events: int) -> None:
        assert self._socket
        if events & select.EPOLLOUT:
            self._flush()
        if not self._socket or not events & ~select.EPOLLOUT:
            return
        try:
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._lost()
        self._held += data
        *lines, self._held = self._held.split(b"\n")
        for line in lines:
            said = json.loads(line)
            then = self._answers.pop(said.get("tag") or 0, None)
            if then:
                then(said)
            elif said.get("tag") is None:
                self._heed(said)

    def _lost(self) -> None:
        assert self._socket
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self.lost_at = time.monotonic()
        answers, self._answers = self._answers, {}
        for then in answers.values():
            then({"error": "the controller has ended"})
        self.open()
