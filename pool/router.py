"""The router: a process that takes calls from whoever may make them to instances, and brings their answers.  cpool-function(7).

It holds what is short-lived, in memory alone.  What is to last (functions, jobs) is the controller's; the router asks it for
instances, which are jobs, and goes on without it with those that there are.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

from cafs import linux
from pool import calls, single
from pool.address import Pool
from pool.answers import Answers
from pool.callers import PLACE, Callers
from pool.hostlinks import HostLink
from pool.instances import Instances
from pool.loop import Loop, waker
from pool.routed import Call, Instance, Routed
from pool.spawned import Spawned
from pool.tenants import OWNER

_TICK_S = 0.2
_BEGIN_S = 10.0
_TRIES_MAX = 3
_ITEMS_MAX = 1 << 20


class Items:
    """What a spawned call has given so far.  size: bytes.  is_too_much: to be kept."""

    __slots__ = ("all", "is_too_much", "size")

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self.size, self.is_too_much = 0, False


class Router:
    """directory: of the pool."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.loop = Loop()
        self.wake = waker(self.loop)
        self.pool = Pool(directory, "")
        self.links: dict[str, HostLink] = {}
        self.calls: dict[bytes, Call] = {}
        self._items: dict[bytes, Items] = {}
        self.began = self._used = time.monotonic()
        self.answers = Answers(self.loop)
        self.spawned = Spawned(os.path.join(directory, PLACE))
        self._unsure: list[Call] = []
        """Accepted by a router before us and given to a host, of which is not known what that says."""

        self._given: list[tuple[Call, Instance, bytes]] = []
        """What hosts are told of spawned calls once it is on disk that they have them."""

        self.loop.before_sending = self._commit
        self.callers = Callers(self)
        self.instances = Instances(self)

    def run(self) -> None:
        """Until nothing is deployed any more, or for a long time nobody is there."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.end())
        self.instances.controller.open()
        self._tick()
        self.loop.run()
        for link in self.links.values():
            link.close()

    def end(self) -> None:
        self.loop.is_over = True
        self.wake()

    def link(self, worker: str, address: str) -> HostLink:
        link = self.links.get(worker)
        if link is None or link.address != address:
            if link:
                link.give_up()
            link = self.links[worker] = HostLink(self, worker, address)
        return link

    def _commit(self) -> None:
        """What was accepted in this turn is on disk before its caller hears so, and before it is begun."""
        for _ in range(2):  # what is accepted may be given to a host at once, which is to be noted too
            accepted, problem = self.spawned.commit()
            if not problem:
                given, self._given = self._given, []
                for call, one, frame in given:
                    if call.instance is one and one.link:  # else it was taken back meanwhile
                        one.link.say(frame)
            for call, wire in accepted:
                if problem:
                    call.flags &= ~calls.SPAWN
                    call.callers = [wire]
                    self.fail(call, "full", f"the call cannot be noted: {problem}")
                else:
                    wire.say(calls.frame(calls.BEGUN, call.id))
                    self.callers.begin(call)
            if not accepted:
                return

    def take_up(self) -> None:
        """What routers before us have accepted, and nobody has answered."""
        now = time.monotonic()
        for one in self.spawned.without_answer():
            fn = self.instances.functions.get((one.tenant, one.name))
            if fn is None:
                frame = calls.failed(one.id, "function", f"function {one.name} was removed")
                self.spawned.answered(one.id, one.tenant, one.name, one.flags, frame)
                continue
            call = self.calls[one.id] = Call(one.id, fn, one.flags, one.body, now, now + one.ms / 1000 if one.ms else 0.0)
            self.callers.usage[one.tenant] += 1
            if one.worker:
                self._unsure.append(call)
            else:
                fn.queue.put(call)
                self.instances.active[fn] = None

    def _mind_unsure(self, now: float) -> None:
        """Of calls that were given to hosts: what these say, or that nobody says anything."""
        is_over = all(link.has_ever_greeted for link in self.links.values()) or now > self.began + self.callers.lost_s
        unsure, self._unsure = self._unsure, []
        for call in unsure:
            link = next((link for link in self.links.values() if call.id in link.known), None)
            if link:
                self.callers.take_up(call, link)
            elif is_over:
                self.lost(call)
            else:
                self._unsure.append(call)

    def greeted(self, link: HostLink) -> None:
        """A host has said what it knows; what was under way when the connection was lost is asked for again."""
        for one in self.calls.values():
            if one.link is link and one.instance is None:
                link.say(calls.frame(calls.ASK, one.id))
        self.callers.ask_again(link)
        self.answers.ask_again(link)

    def lost_link(self, link: HostLink) -> None:
        """A host is no more."""
        for one in [one for one in self.calls.values() if one.link is link and one.instance is None]:
            self.lost(one)
        self.callers.lose(link)
        self.answers.lose(link)

    def answered(self, link: HostLink, flags: int, call: bytes, items: int, body: bytes) -> None:
        """An answer has come from a host.  items: how many came before it."""
        found = self.calls.pop(call, None)
        now = self.loop.now
        if found is None:
            return self._answered_before(link, flags, call, items, body)
        one, fn = found.instance, found.function
        if one:
            fn.answered(found, flags, now)
            one.calls.pop(call, None)
            one.used = now
            one.busy += bool(flags & calls.BUSY)
            self.instances.forget_if_over(one)
        kept = self._items.pop(call, None)
        if kept and kept.is_too_much:
            flags = calls.ERROR
            body = calls.error("protocol", "the values of a spawned call are no bytes, and 1 MiB at most together")
        if flags & calls.STREAM and found.flags & calls.SPAWN and not flags & calls.ERROR:
            given = kept.all if kept else []
            if len(given) == items:
                body, flags = b"[" + b",".join(given) + b"]", 0
            else:
                body, flags = calls.error("unknown", "some of its values were lost"), calls.ERROR
        self._deliver(found, flags & ~calls.BUSY, body, link if flags & calls.REFERENCE else None, items)
        if fn.queue:
            self.dispatch(fn)
        elif one and not one.calls:
            fn.settle(now)

    def _answered_before(self, link: HostLink, flags: int, call: bytes, items: int, body: bytes) -> None:
        """Of a router before us, or of one that nobody knows: a piece that is not there, most likely."""
        if flags & calls.ERROR:
            self.answers.absent(call)
        known, askers = link.known.get(call), self.callers.askers.get(call)
        wires = self.callers.askers.pop(call).wires if askers and askers.link is link else []
        frame = calls.frame(calls.ANSWER, call, body, flags=flags & ~calls.BUSY, a=items)
        for wire in wires:
            wire.say(frame)
        if known is None:
            return
        fn = self.instances.function_of(link, known)
        one = link.instances.get(known[1])
        if one and known[0] == "running" and not flags & calls.BUSY:
            link.known[call] = "done", known[1], known[2]
            one.busy = max(one.busy - 1, 0)
            self.dispatch(one.function)
        self.answers.keep(call, frame, link if flags & calls.REFERENCE else None, fn.tenant if fn else OWNER, len(wires))

    def heed_call(self, link: HostLink, kind: int, flags: int, call: bytes, a: int, body: bytes) -> None:
        """What else a host says of a call."""
        if kind == calls.PIECE:
            return self.answers.came(call, a, calls.frame(calls.PIECE, call, body, flags=flags, a=a))
        found = self.calls.get(call)
        if found is None:
            return
        if kind == calls.BOUNCE:
            self.again(found, is_counted=False)
        elif kind == calls.ITEM and found.flags & calls.SPAWN:
            kept = self._items.setdefault(call, Items())
            kept.size += len(body)
            if kept.size > _ITEMS_MAX or flags & calls.BYTES:
                kept.is_too_much = True
                return link.say(calls.frame(calls.CANCEL, call))
            kept.all.append(body)
            link.say(calls.frame(calls.MORE, call, a=1))
        elif kind in (calls.ITEM, calls.WANT):
            frame = calls.frame(kind, call, body, flags=flags, a=a)
            open_ones = [wire for wire in found.callers if wire.is_open]
            for wire in open_ones if kind == calls.ITEM else open_ones[:1]:
                wire.say(frame)
            if not open_ones:
                link.say(calls.frame(calls.CANCEL, call))  # nobody takes it, or has its value

    def again(self, call: Call, *, is_counted: bool = True) -> None:
        """It waits again, before all others.  is_counted: it may have been begun, which is not tried for ever."""
        if call.instance:
            call.instance.calls.pop(call.id, None)
        call.instance = call.link = None
        if call.flags & calls.SPAWN:
            self.spawned.given(call.id, "")
        self._items.pop(call.id, None)
        call.tries += is_counted
        fn = call.function
        if fn.is_gone or call.tries > _TRIES_MAX:
            return self.fail(call, "unknown" if not fn.is_gone else "function", f"function {fn.name} has lost its instances")
        fn.queue.put(call, is_first=True)
        self.instances.active[fn] = None
        self.dispatch(fn)

    def lost(self, call: Call) -> None:
        """Where it was nobody answers any more."""
        if call.flags & calls.IDEMPOTENT:
            return self.again(call)
        if call.instance:
            call.instance.calls.pop(call.id, None)
        self.fail(call, "unknown", "outcome unknown: its worker was lost in the call")

    def fail(self, call: Call, kind: str, message: str) -> None:
        self.calls.pop(call.id, None)
        self._items.pop(call.id, None)
        call.function.count += 1
        call.function.errors += 1
        self._deliver(call, calls.ERROR, calls.error(kind, message), None, 0)

    def _deliver(self, call: Call, flags: int, body: bytes, link: HostLink | None, items: int) -> None:
        frame = calls.frame(calls.ANSWER, call.id, body, flags=flags, a=items)
        self.callers.usage[call.function.tenant] -= 1
        if call.flags & calls.SPAWN:
            self.spawned.answered(call.id, call.function.tenant, call.function.name, call.flags, frame)
        self.answers.keep(call.id, frame, link, call.function.tenant, len(call.callers))
        for wire in call.callers:
            wire.say(frame)

    def dispatch(self, fn: Routed) -> None:
        """Give what waits to those that have room."""
        while fn.queue:
            one = fn.pick()
            if one is None:
                return
            call = fn.queue.pop()
            self.give(call, one)

    def give(self, call: Call, one: Instance) -> None:
        now = self.loop.now
        call.instance, call.begun = one, now
        one.calls[call.id] = call
        ms = max(int((call.deadline - now) * 1000), 1) if call.deadline else 0
        assert one.link
        frame = calls.frame(calls.CALL, call.id, call.body, flags=call.flags & ~calls.SPAWN, a=one.number, b=ms)
        if not call.flags & calls.SPAWN:
            return one.link.say(frame)
        self.spawned.given(call.id, one.link.worker)
        self._given.append((call, one, frame))

    def _tick(self) -> None:
        now = time.monotonic()
        self.loop.at(now + _TICK_S, self._tick)
        for link in list(self.links.values()):
            link.take_opened()
            link.mind()
        self.callers.mind_listening(now)
        self._mind_unsure(now)
        for fn in list(self.instances.active):
            self.instances.mind(fn, now)
        self.callers.mind_held(now)
        self.instances.mind_starts(now)
        self.instances.mind_ends(now)
        self.answers.expire(now)
        self._mind_links(now)
        self.instances.make_room(now)
        if self.instances.jobs or self.calls or (self.instances.controller.is_open and self.instances.functions):
            self._used = now
        elif now > self._used + _BEGIN_S:
            self.loop.is_over = True
        if not self.instances.is_asked and now > self.began + _BEGIN_S:
            self.loop.is_over = True  # without a controller nobody knows what there is to do

    def _mind_links(self, now: float) -> None:
        """Close those that are not needed, at once if broken, else later.

        Where a host knows of many calls, to greet it anew takes as long as a container's start.
        """
        wanted = {one.link for one in self.instances.jobs.values()} | {call.host for call in self.calls.values()}
        wanted |= self.callers.asked()
        for link in list(self.links.values()):
            if link in wanted or self.answers.has_large(link):
                link.used = now
            elif now > link.used + self._stays_s(link):
                self.links.pop(link.worker).close()

    def _stays_s(self, link: HostLink) -> float:
        """How long, when it is not needed."""
        if link.wire or link.known:
            return calls.KEPT_S
        return 0.0 if link.has_ever_greeted else self.callers.lost_s  # what it knows is still to be heard


def main(directory: str) -> int:
    """Be the router of a pool, if there is none."""
    place = os.path.join(directory, PLACE)
    if not single.be(place):
        return 0
    linux.raise_descriptor_limit()
    try:
        Router(directory).run()
    finally:
        with suppress(FileNotFoundError):  # it has not begun to listen
            os.unlink(os.path.join(place, "socket"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
