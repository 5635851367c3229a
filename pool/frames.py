"""Frames between controller and agent: JSON objects, and bytes that answer a request.  cpool-agent(7), FRAMES.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PROTOCOL = 1
JSON, BYTES = 1, 2
SIZE_MAX = 8 << 20
GREETING = b"cpool-agent 1\n"
GREETING_WITHIN = 64 << 10
_HEAD = struct.Struct(">IB")
_REQUEST = struct.Struct(">IQ")


class FrameError(ValueError):
    """What came is no frame."""


def message(kind: str, **fields: Any) -> bytes:
    """A frame of an object; KIND is its field 'is'."""
    body = json.dumps({"is": kind, **fields}, separators=(",", ":")).encode()
    return _HEAD.pack(len(body) + 1, JSON) + body


def answer(request: int, next_offset: int, data: bytes) -> bytes:
    """A frame of bytes.  next_offset: where what follows them is to be asked for."""
    return _HEAD.pack(len(data) + _REQUEST.size + 1, BYTES) + _REQUEST.pack(request, next_offset) + data


class Reader:
    """Takes bytes as they come, gives frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """(JSON, object with a field 'is') or (BYTES, (request, next offset, data)).  Raises FrameError."""
        self._held += data
        while len(self._held) >= _HEAD.size:
            size, kind = _HEAD.unpack_from(self._held)
            if not 1 <= size <= SIZE_MAX or kind not in (JSON, BYTES):
                raise FrameError("no frame begins so")
            if len(self._held) < _HEAD.size + size - 1:
                return
            body = bytes(self._held[_HEAD.size : _HEAD.size + size - 1])
            del self._held[: _HEAD.size + size - 1]
            yield kind, _object(body) if kind == JSON else _answered(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError("a frame is not JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("is"), str):
        raise FrameError("a frame says not what it is")
    return found


def _answered(body: bytes) -> tuple[int, int, bytes]:
    if len(body) < _REQUEST.size:
        raise FrameError("a frame of bytes answers nothing")
    request, next_offset = _REQUEST.unpack_from(body)
    return int(request), int(next_offset), body[_REQUEST.size :]
