"""Sockets in a directory, however long its path is, and what waits to be sent.  Standard library only, Python 3.9."""

from __future__ import annotations

import os
import selectors
import socket
import time
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SENT_AT_ONCE = 1 << 20


def listen(directory: str, *, mode: int = 0o600) -> socket.socket:
    """At 'socket' in it, for its owner alone unless MODE says so; does not block.  Raises OSError."""
    listener = socket.socket(socket.AF_UNIX)
    with _path(directory) as path:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        if mode != 0o600:
            os.chmod(path, mode)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def connect(directory: str) -> socket.socket:
    """Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _path(directory) as path:
            connection.connect(path)
        return connection
    except OSError:
        connection.close()
        raise


def connect_within(directory: str, seconds: float) -> socket.socket:
    """The same; for so long it is tried again.  Raises OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return connect(directory)
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


@contextmanager
def _path(directory: str) -> Iterator[str]:
    """A short one: sun_path has 108 bytes, unix(7)."""
    here = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # also where others may not list it
    try:
        yield f"/proc/self/fd/{here}/socket"
    finally:
        os.close(here)


def send(selector: selectors.BaseSelector, connection: socket.socket, unsent: bytearray) -> None:
    """What it takes now; for the rest, its handler is called when it takes more.  Raises OSError."""
    try:
        sent = connection.send(unsent[:_SENT_AT_ONCE])
        del unsent[:sent]
    except BlockingIOError:
        pass
    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
    key = selector.get_key(connection)
    if key.events != wanted:
        selector.modify(connection, wanted, key.data)
