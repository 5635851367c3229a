"""What a caller says to the router and hears from it, whatever carries the bytes.  cpool-function(7), FRAMES."""

from __future__ import annotations

import base64
import hashlib
import json
import os

from cafs.errors import BUSY, FAILED, NO_SUCH, REMOTE, CafsError
from pool import calls, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_AHEAD = 16
_TIMED_OUT = 124
_CODES = {"function": NO_SUCH, "full": BUSY, "unknown": REMOTE, "timeout": _TIMED_OUT}


class Json:
    """A value as text of JSON, as it came: read as Python's numbers it would lose digits.  Raises ValueError."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        calls.checked(text)
        self.text = text


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def as_json(answer: Any) -> bytes:
    """What a handler gave, compact; bytes as {"$bytes": BASE64}."""
    if isinstance(answer, Json):
        return calls.compact(answer.text)
    if isinstance(answer, list):
        return b"[" + b",".join(map(as_json, answer)) + b"]"
    return json.dumps(answer, separators=(",", ":"), default=_bytes).encode()


def _bytes(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    raise TypeError(type(value).__name__)


class CallError(CafsError):
    """A call that failed.  kind: as in cpool-function(7), ERRORS; type, traceback: of the handler's exception."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.kind = str(error.get("kind", "raised"))
        self.type, self.message = str(error.get("type", "")), str(error.get("message", ""))
        self.traceback = str(error.get("traceback", ""))
        self.call = ""
        """Its id, in hexadecimal, if it was a call at all."""

        super().__init__(f"{self.type}: {self.message}" if self.type else self.message)
        self.exit_code = _CODES.get(self.kind, FAILED)

    def shown(self) -> dict[str, Any]:
        """As `cpool fn map` writes it."""
        shown = {name: getattr(self, name) for name in ("kind", "type", "message", "traceback")}
        return {"error": {**shown, **({"call": self.call} if self.call else {})}}


class Pending:
    """A call that has no answer yet.  frame: to be sent again to another router; data: its value, if that is large."""

    __slots__ = (
        "answer",
        "data",
        "error",
        "following",
        "frame",
        "is_bytes",
        "is_done",
        "items",
        "missing",
        "parts",
        "size",
        "takes",
    )

    def __init__(self, frame: bytes, data: bytes) -> None:
        self.frame, self.data = frame, data
        self.items: list[Any] = []
        self.takes = True
        """Whether items are acknowledged as they come."""

        self.answer: Any = None
        self.error: CafsError | None = None
        self.is_done = self.is_bytes = False
        self.parts: bytearray | None = None
        self.size = self.following = 0
        self.missing: set[int] = set()

    def finish(self, data: bytes, read: Callable[[bytes], Any]) -> None:
        """All of the answer is there."""
        self.is_done = True
        try:
            self.answer = data if self.is_bytes else read(data)
        except (ValueError, RecursionError) as error:
            self.error = CallError({"kind": "protocol", "message": f"the answer is no JSON: {error}"})


class Session:
    """The calls over one connection.  out: bytes to be sent; as_text: answers that are JSON are Json, not Python's values."""

    def __init__(self, *, as_text: bool = False) -> None:
        self._read: Callable[[bytes], Any] = Json if as_text else json.loads
        self.out = bytearray()
        self.pending: dict[bytes, Pending] = {}
        self.replies: dict[int, dict[str, Any]] = {}
        self.begun: set[bytes] = set()
        self._tag = 0
        self._reader = calls.Reader()

    def ask(self, what: str, **fields: Any) -> int:
        """A control; its answer comes into `replies` with this tag."""
        self._tag += 1
        self.out += calls.control(what, tag=self._tag, **fields)
        return self._tag

    def begin(self, number: int, value: Any, *, call: bytes | None = None, ms: int = 0, flags: int = 0) -> bytes:
        """Its id.  number: of the function, as the router has said.  Raises CafsError."""
        call = call or os.urandom(16)
        if isinstance(value, Json):
            body = value.text
        elif isinstance(value, bytes | bytearray | memoryview):
            body, flags = bytes(value), flags | calls.BYTES
        else:
            try:
                body = _encode(value).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise CafsError(f"the value is no JSON: {error}") from None
        data = b""
        if len(body) > calls.VALUE_MAX:
            data, flags = body, flags | calls.REFERENCE
            body = _encode({"$ref": call.hex(), "size": len(data)}).encode()
        frame = calls.frame(calls.CALL, call, body, flags=flags, a=number, b=ms)
        self.pending[call] = Pending(frame, data)
        self.out += frame
        return call

    def await_answer(self, call: bytes, tenant: str = "", *, is_to_wait: bool) -> None:
        """Ask for the answer of a call that was made before.  tenant: whose alone, for the pool's owner."""
        self.pending[call] = Pending(calls.frame(calls.ASK, call, tenant.encode(), a=int(is_to_wait)), b"")
        self.out += self.pending[call].frame

    def cancel(self, call: bytes) -> None:
        """It is not wanted any more."""
        self.out += calls.frame(calls.CANCEL, call)

    def renew(self) -> None:
        """There is another connection."""
        self._reader = calls.Reader()
        self.out = bytearray()

    def again(self, numbers: dict[int, int]) -> None:
        """Send again what has no answer; it is not done twice.  numbers: of functions, before and now."""
        for one in self.pending.values():
            if one.is_done:
                continue
            _, kind, flags, _, call, number, b = calls.HEAD.unpack_from(one.frame)
            if kind == calls.CALL:
                one.frame = calls.frame(
                    kind, call, one.frame[calls.HEAD.size :], flags=flags | calls.LAST, a=numbers[number], b=b
                )
            one.items, one.parts = [], None
            self.out += one.frame

    def feed(self, data: bytes) -> list[bytes]:
        """The calls that are done by that.  Raises CafsError."""
        done: list[bytes] = []
        try:
            for kind, flags, call, a, _, body in self._reader.feed(data):
                one = self.pending.get(call)
                if one and one.is_done:
                    continue  # a second answer, or what was under way of a value that has failed
                if kind == calls.ANSWER and one:
                    self._answered(call, one, flags, a, body)
                    if one.is_done:
                        done.append(call)
                elif kind == calls.CONTROL:
                    said = calls.said(body)
                    if said["is"] == "state":
                        done.append(self._is_in_state(said))
                    else:
                        self._replied(int(said.get("tag") or 0), said)
                elif kind == calls.BEGUN:
                    self.begun.add(call)
                elif one:
                    self._heed(call, one, kind, flags, a, body)
                    if one.is_done:
                        done.append(call)
        except (ValueError, LookupError, TypeError) as error:
            raise CafsError(f"the router says what is not of its protocol: {error}") from None
        return done

    def _replied(self, tag: int, said: dict[str, Any]) -> None:
        """One that comes in several pieces is one, as far as it is there."""
        before = self.replies.get(tag, {})
        if said["is"] == "stats":
            said["functions"] = before.get("functions", []) + said["functions"]
        self.replies[tag] = said

    def _is_in_state(self, said: dict[str, Any]) -> bytes:
        call = bytes.fromhex(said["call"])
        one = self.pending[call]
        one.is_done = True
        one.error = StateOfCall(str(said["state"]))
        return call

    def _answered(self, call: bytes, one: Pending, flags: int, items: int, body: bytes) -> None:
        if flags & calls.ERROR:
            one.error, one.is_done = CallError(json.loads(body)["error"]), True
        elif flags & calls.REFERENCE:
            one.size, one.is_bytes = values.size_of(body), bool(flags & calls.BYTES)
            one.parts = bytearray(one.size)
            many = -(-one.size // calls.PIECE_SIZE)
            one.missing, one.following = set(range(many)), min(many, _AHEAD)
            for piece in range(one.following):
                self.out += calls.frame(calls.WANT, call, a=piece)
        else:
            one.is_bytes = bool(flags & calls.BYTES)
            one.finish(body, self._read)
            if flags & calls.STREAM:
                one.answer = one.items
                if len(one.items) != items:  # it was asked for by a key, or another router has brought it
                    one.error = CallError({"kind": "unknown", "message": "some of its values were lost"})

    def _heed(self, call: bytes, one: Pending, kind: int, flags: int, a: int, body: bytes) -> None:
        if kind == calls.ITEM:
            one.items.append(body if flags & calls.BYTES else self._read(body))
            if one.takes:
                self.out += calls.frame(calls.MORE, call, a=1)
        elif kind == calls.WANT:
            data = memoryview(one.data)[a * calls.PIECE_SIZE : (a + 1) * calls.PIECE_SIZE]
            self.out += values.piece_of(call, a, bytes(data), len(one.data))
        elif kind == calls.PIECE and one.parts is not None:
            at = a * calls.PIECE_SIZE
            if at + len(body) > one.size or (len(body) < calls.PIECE_SIZE and at + len(body) != one.size):
                raise ValueError("a piece that does not fit")
            if a in one.missing:
                one.parts[at : at + len(body)] = body
                one.missing.discard(a)
                self._next_piece(call, one)

    def _next_piece(self, call: bytes, one: Pending) -> None:
        many = -(-one.size // calls.PIECE_SIZE)
        if one.following < many:
            self.out += calls.frame(calls.WANT, call, a=one.following)
            one.following += 1
        elif not one.missing:
            self.out += calls.frame(calls.FORGET, call)
            assert one.parts is not None
            parts, one.parts = one.parts, None
            one.finish(bytes(parts), self._read)

    def take(self, call: bytes) -> Any:
        """The answer of one that is done.  Raises CafsError."""
        one = self.pending.pop(call)
        if one.error:
            if isinstance(one.error, CallError):
                one.error.call = call.hex()
            raise one.error
        return one.answer


class StateOfCall(CafsError):
    """A call has no answer yet, or nobody knows it.  state: queued, running, unknown."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the call is {state}" if state != "unknown" else "no such call, or its answer is not kept any more")
        self.state = state
        self.exit_code = NO_SUCH if state == "unknown" else BUSY


def id_of(tenant: str, name: str, key: str) -> bytes:
    """Of a call that is made once, however often it is sent."""
    return hashlib.sha256(b"".join(one.encode("utf-8", "surrogateescape") + b"\0" for one in (tenant, name, key))).digest()[:16]
