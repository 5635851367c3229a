"""Frames that carry calls: a head of 32 bytes and a body.  cpool-function(7), FRAMES.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import re
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PROTOCOL = 1
CONTROL, CALL, ANSWER, ITEM, MORE, CANCEL, WANT, PIECE, BEGUN, BOUNCE, FORGET, ASK = range(1, 13)
IDEMPOTENT, SPAWN, REFERENCE, BYTES, STREAM, ERROR, LAST, BUSY = 1, 2, 4, 8, 16, 32, 64, 128
HEAD = struct.Struct(">IBBH16sII")
SIZE_MAX = 5 << 18
VALUE_MAX = 1 << 20
"""A larger one goes by reference."""

MS_MAX = (1 << 32) - 1
PIECE_SIZE = 256 << 10
ITEMS_AHEAD = 16
KEPT_S = 600.0
NOBODY = bytes(16)
GREETING = b"cpool-calls 1\n"


def frame(kind: int, call: bytes = NOBODY, body: bytes = b"", *, flags: int = 0, a: int = 0, b: int = 0) -> bytes:
    """One."""
    return HEAD.pack(len(body), kind, flags, 0, call, a, b) + body


def control(what: str, **fields: Any) -> bytes:
    """A frame of an object that says what it is."""
    return frame(CONTROL, body=json.dumps({"is": what, **fields}, separators=(",", ":")).encode())


def error(kind: str, message: str, name: str = "", traceback: str = "") -> bytes:
    """The body of an answer that is an error."""
    found = {"kind": kind, "type": name, "message": message, "traceback": traceback}
    return json.dumps({"error": found}, separators=(",", ":")).encode()


def failed(call: bytes, kind: str, message: str, *, flags: int = 0) -> bytes:
    """An answer that is an error of ours."""
    return frame(ANSWER, call, error(kind, message), flags=ERROR | flags)


def loads(body: bytes) -> Any:
    """JSON of a stranger.  Raises ValueError, also for what is too deep."""
    try:
        return json.loads(body)
    except RecursionError as problem:
        raise ValueError("too deep") from problem


_STRING = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")')


def checked(text: bytes) -> Any:
    """The value of JSON, as RFC 8259 has it: UTF-8, no NaN; numbers, of any length, are left as text.  Raises ValueError."""
    try:
        return json.loads(text.decode(), parse_int=str, parse_float=str, parse_constant=_refuse)
    except RecursionError as problem:
        raise ValueError("too deep") from problem


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def compact(text: bytes) -> bytes:
    """JSON without the space between its parts, and otherwise as it is: numbers keep their digits."""
    parts = _STRING.split(text)  # every other one is a string
    for at in range(0, len(parts), 2):
        if len(parts[at]) > 1 or parts[at].isspace():
            parts[at] = parts[at].translate(None, b" \t\r\n")
    return b"".join(parts)


def said(body: bytes) -> dict[str, Any]:
    """The object of a control frame.  Raises ValueError."""
    found = loads(body)
    if not isinstance(found, dict) or not isinstance(found.get("is"), str):
        raise ValueError("a control frame says not what it is")
    return found


class Reader:
    """Takes bytes as they come, gives frames."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes, int, int, bytes]]:
        """(kind, flags, id, a, b, body).  Raises ValueError."""
        held = self._held + data if self._held else data
        at, end = 0, len(held)
        try:
            while end - at >= 32:
                size, kind, flags, _, call, a, b = HEAD.unpack_from(held, at)
                if size > SIZE_MAX or not 1 <= kind <= 12:
                    raise ValueError("no frame begins so")
                if end - at - 32 < size:
                    break
                body = held[at + 32 : at + 32 + size]
                at += 32 + size
                yield kind, flags, call, a, b, body
        finally:
            self._held = held[at:] if at else held
