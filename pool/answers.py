"""Answers that the router keeps, for whoever asks again; and large ones, which callers fetch in pieces.  cpool-function(7)."""

from __future__ import annotations

from collections import Counter, OrderedDict

from pool import calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.callers import Caller
    from pool.hostlinks import HostLink
    from pool.loop import Loop

_DONE_BYTES, _DONE_MANY = 64 << 20, 100_000
_ABSENT = "its answer is not kept any more"
_WANTS_MAX = 256
"""Pieces that one caller may ask for at once."""


class Done:
    """An answer that is kept.  link: of the host that has its value, if that is large; takers: callers who fetch that."""

    __slots__ = ("at", "frame", "link", "takers", "tenant")

    def __init__(self, frame: bytes, at: float, link: HostLink | None, tenant: str, takers: int) -> None:
        self.frame, self.at, self.link, self.tenant, self.takers = frame, at, link, tenant, takers


class Answers:
    """All of them, the oldest first."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.done: OrderedDict[bytes, Done] = OrderedDict()
        self._done_bytes = 0
        self._large: Counter[HostLink] = Counter()
        """How many of them a host has the value of."""

        self.gone: OrderedDict[bytes, None] = OrderedDict()
        """Calls whose answers have gone before their time."""

        self.wants: dict[tuple[bytes, int], list[Caller]] = {}
        """Who waits for which piece."""

    def keep(self, call: bytes, frame: bytes, link: HostLink | None, tenant: str, takers: int) -> None:
        self._forget(call)
        self.done[call] = Done(frame, self._loop.now, link, tenant, takers)
        self._done_bytes += len(frame)
        if link:
            self._large[link] += 1
        while self._done_bytes > _DONE_BYTES or len(self.done) > _DONE_MANY:
            oldest = next(iter(self.done))
            self._forget(oldest)
            self.gone[oldest] = None
            if len(self.gone) > _DONE_MANY:
                self.gone.popitem(last=False)

    def _forget(self, call: bytes) -> None:
        """If it is there."""
        done = self.done.pop(call, None)
        if done is None:
            return
        self._done_bytes -= len(done.frame)
        if done.link:
            self._large[done.link] -= 1
            if not self._large[done.link]:
                del self._large[done.link]

    def has_large(self, link: HostLink) -> bool:
        """Whether a value may still be asked for that a host has."""
        return link in self._large

    def _no_piece(self, call: bytes, piece: int) -> None:
        for caller in self.wants.pop((call, piece), []):
            caller.wants -= 1
            caller.wire.say(calls.failed(call, "unknown", _ABSENT))

    def fetch(self, caller: Caller, kind: int, call: bytes, piece: int) -> None:
        """A piece of a large answer; or one that has it, or does not want it."""
        done = self.done.get(call)
        if done is None or done.link is None or not (caller.is_owner or done.tenant == caller.tenant):
            if kind == calls.WANT:
                caller.wire.say(calls.failed(call, "unknown", _ABSENT))
            return
        if kind == calls.FORGET:
            done.takers -= 1
            if done.takers <= 0:
                done.link.say(calls.frame(kind, call))
                self._forget(call)
            return
        caller.wants += 1
        if caller.wants > _WANTS_MAX:
            return caller.wire.close("it asks for too much at once")
        waiting = self.wants.setdefault((call, piece), [])
        waiting.append(caller)
        if len(waiting) == 1:
            done.link.say(calls.frame(kind, call, a=piece))

    def ask_again(self, link: HostLink) -> None:
        """For what was under way when the connection to a host was lost."""
        for call, piece in self.wants:
            done = self.done.get(call)
            if done and done.link is link:
                link.say(calls.frame(calls.WANT, call, a=piece))

    def lose(self, link: HostLink) -> None:
        """A host is no more."""
        for call, piece in list(self.wants):
            done = self.done.get(call)
            if done is None or done.link is link:
                self._no_piece(call, piece)

    def came(self, call: bytes, piece: int, frame: bytes) -> None:
        """A piece has."""
        for caller in self.wants.pop((call, piece), []):
            caller.wants -= 1
            caller.wire.say(frame)

    def absent(self, call: bytes) -> None:
        """Its host has it no more."""
        for at in [at for at in self.wants if at[0] == call]:
            self._no_piece(*at)

    def expire(self, now: float) -> None:
        """What is too old is forgotten."""
        while self.done and next(iter(self.done.values())).at < now - calls.KEPT_S:
            self._forget(next(iter(self.done)))
