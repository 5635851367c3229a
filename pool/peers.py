"""The agent's socket, and who is connected to it.  Part of the agent's program: standard library only, Python 3.9."""

from __future__ import annotations

import os
import selectors
import socket
import time

from pool import frames, sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PIECE = 1 << 18
_UNSENT_MAX = 32 << 20


def log(text: str) -> None:
    """In the agent's, if there is room."""
    try:
        os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:
        pass


class Peer:
    """A connection.  is_trusted: it has said hello, and may command."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.reader = frames.Reader()
        self.unsent = bytearray()
        self.is_trusted = False


class Peers:
    """All of them.  obey: what is done with an object that one says."""

    def __init__(
        self, directory: str, selector: selectors.DefaultSelector, obey: Callable[[Peer, dict[str, Any]], None]
    ) -> None:
        self._selector = selector
        self._obey = obey
        self.all: list[Peer] = []
        self._heard_s = time.monotonic()
        listener = sockets.listen(directory)
        selector.register(listener, selectors.EVENT_READ, lambda _: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # too many files are open: it is tried again
        connection.setblocking(False)
        peer = Peer(connection)
        self.all.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda events: self._serve(peer, events))

    def _serve(self, peer: Peer, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self.send(peer, b"")
            if events & selectors.EVENT_READ and peer in self.all:
                data = peer.socket.recv(_PIECE)
                if not data:
                    raise ConnectionResetError
                self._heard_s = time.monotonic() if peer.is_trusted else self._heard_s
                for kind, body in peer.reader.feed(data):
                    if kind == frames.JSON:
                        self._obey(peer, body)
        except BlockingIOError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, ConnectionError):
                log(f"what a controller said cannot be done: {error!r}")
            self.drop(peer)

    @property
    def heard(self) -> float:
        """When somebody who commands was heard last: a connection may be up long after its other end was cut off."""
        return self._heard_s

    def drop(self, peer: Peer) -> None:
        """Let it go.  May be done twice."""
        if peer in self.all:
            self.all.remove(peer)
            self._selector.unregister(peer.socket)
            peer.socket.close()

    def drop_trusted(self) -> None:
        """All who command."""
        for peer in [one for one in self.all if one.is_trusted]:
            self.drop(peer)

    def say(self, kind: str, **fields: Any) -> None:
        """To all who command."""
        frame = frames.message(kind, **fields)
        for peer in [one for one in self.all if one.is_trusted]:
            self.send(peer, frame)

    def send(self, peer: Peer, frame: bytes) -> None:
        """Now, or as soon as it takes more; who takes nothing is let go."""
        peer.unsent += frame
        try:
            sockets.send(self._selector, peer.socket, peer.unsent)
        except OSError:
            return self.drop(peer)
        if len(peer.unsent) > _UNSENT_MAX:
            self.drop(peer)
