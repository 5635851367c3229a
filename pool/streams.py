"""Many streams over one channel: how the readers of a lent store on a worker reach it.  cpool-agent(7), STORE.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN, DATA, CREDIT, CLOSE = 1, 2, 3, 4
WINDOW = 1 << 20
"""Bytes that may be on their way to a reader that has not read them."""

PIECE = 64 << 10
MANY = 64
"""Streams at once."""

PLACE = "store"
"""Directory, in that of the agent, of the socket at which the store is read."""

_HEAD = struct.Struct(">IBI")


def frame(stream: int, kind: int, data: bytes = b"", number: int = 0) -> bytes:
    """Of DATA the number is its length, of CREDIT how many bytes were read."""
    return _HEAD.pack(stream, kind, len(data) if kind == DATA else number) + data


class Reader:
    """Frames of what was received."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes, int]]:
        """(stream, kind, data, number) of all that is there as a whole.  Raises ValueError."""
        self._held += data
        while len(self._held) >= _HEAD.size:
            stream, kind, number = _HEAD.unpack_from(self._held)
            size = number if kind == DATA else 0
            if kind not in (OPEN, DATA, CREDIT, CLOSE) or size > PIECE:
                raise ValueError("not of this protocol")
            if len(self._held) < _HEAD.size + size:
                return
            body = bytes(self._held[_HEAD.size : _HEAD.size + size])
            del self._held[: _HEAD.size + size]
            yield stream, kind, body, number
