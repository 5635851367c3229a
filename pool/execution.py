"""Calls at a function host: their values come, they are given to an instance, and answered once.

Part of the agent's program: standard library only, Python 3.9.  cpool-function(7), FUNCTION HOST.
"""

from __future__ import annotations

import os
import signal

from pool import calls, loop, values
from pool.hosted import PLACE, Call
from pool.known import Known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pool.hosted import Instance


class Execution:
    """directory: of the agent.  say: a frame to the router, if there is one."""

    def __init__(self, directory: str, at: loop.Loop, say: Callable[[bytes], None]) -> None:
        self.known = Known()
        self._loop, self._say = at, say
        self._kept = os.path.join(directory, PLACE, "kept")
        values.clear(self._kept)

    # The router.

    def begin(self, call: bytes, one: Instance | None, flags: int, ms: int, body: bytes) -> None:
        """Once, however often it is said.  one: who is to do it, if it is there; ms: within."""
        known = self.known.get(call)
        if known:
            if known.done:
                self._say(known.answer)
            return
        if self.known.was_done(call):
            return self._say(calls.failed(call, "unknown", "it was done, and its answer is not kept any more"))
        if one is None or one.is_leaving:
            return self._say(calls.frame(calls.BOUNCE, call))
        limit_s = ms / 1000 if ms else one.timeout_s
        found = Call(call, one, self._loop.now + limit_s, 0.0 if ms else one.timeout_s)
        self.known.add(found)
        one.calls[call] = found
        if flags & calls.REFERENCE:
            return self._ask_for_value(found, flags, body)
        found.has_begun = True
        one.wire.say(calls.frame(calls.CALL, call, body, flags=flags, b=min(int(limit_s * 1000), calls.MS_MAX)))

    def heed(self, wire: loop.Wire, kind: int, call: bytes, a: int, body: bytes) -> None:
        """What a router says of a call that was given before."""
        found = self.known.get(call)
        if kind == calls.ASK:
            self._tell(wire, call)
        elif kind == calls.WANT:
            wire.say(self._piece(call, a))
        elif found and found.done:
            if kind == calls.FORGET:
                self.known.forget(found)
        elif found and kind == calls.CANCEL:
            self.give_up(found, "cancelled", "the call was cancelled")
        elif found and kind == calls.PIECE and found.pull:
            self._pulled(found, a, body)
        elif found and kind == calls.MORE:
            found.credit += a
            found.instance.wire.say(calls.frame(calls.MORE, call, a=a))

    def resume(self) -> None:
        """There is another router, or connection: ask again for what was under way."""
        for call in self.known.all():
            self._ask_again(call)

    def _tell(self, wire: loop.Wire, call: bytes) -> None:
        found = self.known.get(call)
        if found is None:
            wire.say(calls.failed(call, "unknown", "outcome unknown: nothing is known of it any more"))
        elif found.done:
            wire.say(found.answer)
        else:
            self._ask_again(found)

    def _piece(self, call: bytes, number: int) -> bytes:
        found = self.known.get(call)
        try:
            if found and found.result:
                return found.result.piece(call, number)
        except OSError:
            pass
        return calls.failed(call, "unknown", "its answer is not kept any more")

    # Values.

    def _ask_for_value(self, call: Call, flags: int, body: bytes) -> None:
        try:
            call.pull = values.Pull(os.path.join(call.instance.directory, "in"), call.id.hex(), body, flags)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return self._refuse_value(call, error)
        for piece in call.pull.first():
            self._say(calls.frame(calls.WANT, call.id, a=piece))
        if call.pull.is_whole:
            self._whole(call)

    def _ask_again(self, call: Call) -> None:
        for piece in call.pull.asked() if call.pull else ():
            self._say(calls.frame(calls.WANT, call.id, a=piece))

    def _pulled(self, call: Call, piece: int, data: bytes) -> None:
        """A piece of its value has come."""
        assert call.pull
        try:
            following = call.pull.take(piece, data)
        except (OSError, ValueError) as error:
            return self._refuse_value(call, error)
        if call.limit_s:
            call.deadline = self._loop.now + call.limit_s  # it is not begun yet
        if following is not None:
            self._say(calls.frame(calls.WANT, call.id, a=following))
        elif call.pull.is_whole:
            self._whole(call)

    def _refuse_value(self, call: Call, error: Exception) -> None:
        self.answer(call, calls.ERROR, calls.error("raised", f"the value cannot be taken: {error}", "OSError"))

    def _whole(self, call: Call) -> None:
        """Its value is there."""
        assert call.pull
        ms = min(max(int((call.deadline - self._loop.now) * 1000), 1), calls.MS_MAX)
        call.instance.wire.say(calls.frame(calls.CALL, call.id, call.pull.reference(), flags=call.pull.flags, b=ms))
        call.has_begun = True
        call.instance.calls.move_to_end(call.id)  # they are in the order in which they were given

    # Answers.

    def answered(self, one: Instance, call: bytes, flags: int, body: bytes) -> None:
        """An instance has an answer."""
        found = one.calls.get(call)
        if found is None:
            return  # it was never asked for
        one.has_answered = True
        if found.given_up:
            del one.calls[call]
            one.used = self._loop.now
            return self._say(calls.control("freed", instance=one.number))
        if not flags & calls.REFERENCE:
            return self.answer(found, flags & (calls.ERROR | calls.BYTES | calls.STREAM), body)
        try:
            found.result = values.Kept(os.path.join(one.directory, "out"), self._kept, call.hex(), body)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return self.answer(found, calls.ERROR, calls.error("protocol", f"the answer cannot be taken: {error}"))
        self.answer(found, flags & (calls.BYTES | calls.REFERENCE | calls.STREAM), found.result.reference())

    def item(self, one: Instance, call: bytes, flags: int, body: bytes) -> None:
        """An instance has one more of a stream.  Raises ValueError if nobody has room for it."""
        found = one.calls.get(call)
        if found is None or found.given_up:
            return
        if flags & calls.REFERENCE or found.credit <= 0:
            raise ValueError("an item that nobody has asked for")
        found.credit -= 1
        found.items += 1
        self._say(calls.frame(calls.ITEM, call, body, flags=flags & calls.BYTES))

    def answer(self, call: Call, flags: int, body: bytes) -> None:
        """What the caller gets; it is kept for a while.  BUSY: the instance has not done with it."""
        call.answer = calls.frame(calls.ANSWER, call.id, body, flags=flags, a=call.items)
        call.done = self._loop.now
        if call.pull:
            call.pull.remove()
            call.pull = None
        if not flags & calls.BUSY:
            one = call.instance
            one.calls.pop(call.id, None)
            one.used = self._loop.now
        self.known.keep(call)
        self._say(call.answer)

    def give_up(self, call: Call, kind: str, message: str) -> None:
        """Answer for the handler, and tell it."""
        one = call.instance
        is_first = next((other.id for other in one.calls.values() if other.has_begun), b"") == call.id
        self.answer(call, calls.ERROR | (calls.BUSY if call.has_begun else 0), calls.error(kind, message))
        if not call.has_begun:
            return
        call.given_up = self._loop.now
        one.wire.say(calls.frame(calls.CANCEL, call.id))
        if one.is_serial and is_first:
            one.wire.flush()
            one.send(signal.SIGUSR1)

    def give_up_late(self, one: Instance, now: float) -> None:
        """Those that take too long.  What was sent ahead of its time is not begun yet."""
        for at, call in enumerate(list(one.calls.values())):
            if at >= one.concurrency and one.may_be_ahead and call.limit_s:
                call.deadline = now + call.limit_s
            if call.deadline <= now and not call.done:
                more = "" if one.has_answered else ": its program has written no line yet; does it flush them?"
                self.give_up(call, "timeout", "the call took too long" + more)

    def lost(self, one: Instance) -> None:
        """Its process has ended: the calls that it had begun fail, those that were sent ahead go elsewhere."""
        why = "the handler's process has ended in the call" + ": it had no memory left" * one.was_too_large()
        begun = [call.id for call in one.calls.values() if call.has_begun][: one.concurrency if one.may_be_ahead else None]
        for call in list(one.calls.values()):
            if call.done:
                one.calls.pop(call.id)
            elif call.id in begun:
                self.answer(call, calls.ERROR, calls.error("died", why))
            else:
                one.calls.pop(call.id)
                self.known.forget(call)
                self._say(calls.frame(calls.BOUNCE, call.id))
