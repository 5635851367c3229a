"""On a worker: a socket at which the controller's store is read, carried over our standard streams.  cpool-agent(7), STORE.

Part of the agent's program: standard library only, Python 3.9.  It ends with the connection that it is carried by.
"""

from __future__ import annotations

import os
import selectors
import socket

from pool import frames, sockets, streams

_PIECE = 1 << 16


class Carrier:
    """directory: of the socket.  reads, writes: descriptors of the way to the controller."""

    def __init__(self, directory: str, reads: int, writes: int) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._writes = writes
        self._selector = selectors.DefaultSelector()
        self._open: dict[int, tuple[socket.socket, bytearray]] = {}
        self._next = 1
        self._frames = streams.Reader()
        self._listener = sockets.listen(directory)
        self._selector.register(self._listener, selectors.EVENT_READ, lambda _: self._accept())
        self._selector.register(reads, selectors.EVENT_READ, lambda _: self._hear(reads))
        self._is_over = False

    def run(self) -> None:
        """Until the controller is gone; its readers then see the end of their connections.  Raises ValueError."""
        try:
            os.write(self._writes, frames.GREETING)
            while not self._is_over:
                for key, events in self._selector.select():
                    if self._selector.get_map().get(key.fd) is key:
                        key.data(events)  # else it was closed by what another event brought
        except OSError:
            pass  # the way to the controller is no more
        finally:
            self._listener.close()
            for number in list(self._open):
                self._close(number)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        if len(self._open) >= streams.MANY:
            connection.close()  # the reader tries again
            return
        number = self._next
        self._next = self._next % 0xFFFFFFFF + 1
        connection.setblocking(False)
        self._open[number] = connection, bytearray()
        self._selector.register(connection, selectors.EVENT_READ, lambda events: self._serve(number, events))
        self._say(streams.frame(number, streams.OPEN))

    def _serve(self, number: int, events: int) -> None:
        """A reader has asked for something, or takes more."""
        connection = self._open[number][0]
        try:
            if events & selectors.EVENT_WRITE:
                self._send(number)
            if events & selectors.EVENT_READ:
                data = connection.recv(_PIECE)
                if not data:
                    raise ConnectionResetError
                self._say(streams.frame(number, streams.DATA, data))
        except BlockingIOError:
            pass
        except OSError:
            self._say(streams.frame(number, streams.CLOSE))
            self._close(number)

    def _send(self, number: int) -> None:
        connection, unsent = self._open[number]
        before = len(unsent)
        sockets.send(self._selector, connection, unsent)
        if len(unsent) < before:
            self._say(streams.frame(number, streams.CREDIT, number=before - len(unsent)))

    def _hear(self, reads: int) -> None:
        data = os.read(reads, _PIECE)
        self._is_over = not data
        for number, kind, body, _ in self._frames.feed(data):
            if number not in self._open:
                continue  # its reader has left
            if kind == streams.CLOSE:
                self._finish(number)
            elif kind == streams.DATA:
                unsent = self._open[number][1]
                unsent += body
                if len(unsent) > streams.WINDOW:
                    raise ValueError("more than was asked for")
                try:
                    self._send(number)
                except OSError:
                    self._say(streams.frame(number, streams.CLOSE))
                    self._close(number)

    def _finish(self, number: int) -> None:
        """The other side has ended it: what is here still goes to the reader."""
        connection, unsent = self._open[number]
        try:
            connection.setblocking(True)
            connection.settimeout(1)
            connection.sendall(unsent)
        except OSError:
            pass
        self._close(number)

    def _close(self, number: int) -> None:
        connection, _ = self._open.pop(number)
        self._selector.unregister(connection)
        connection.close()

    def _say(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._writes, data) :]


def main(directory: str) -> int:
    """directory: of the agent."""
    place = os.path.join(directory, streams.PLACE)
    Carrier(place, 0, 1).run()
    return 0
