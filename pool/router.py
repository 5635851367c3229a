"""The router: a process that takes calls from whoever may make them to instances, and brings their answers.  cpool-function(7).

It holds what is short-lived, in memory alone.  What is to last (functions, jobs) is the controller's; the router asks it for
instances, which are jobs, and goes on without it with those that there are.
"""

from __future__ import annotations

import base64
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from collections import Counter, OrderedDict

from cafs import linux
from pool import autoscaling, calls, links, sockets
from pool.controlling import ControllerLink
from pool.hostlinks import HostLink
from pool.loop import Loop, Wire, listen, waker
from pool.routed import Call, Instance, Routed
from pool.settings import read
from pool.tenants import OWNER, Tenants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.settings import Settings

PLACE = "router"
_TICK_S = 0.2
_SCALE_S = 0.02
_BEGIN_S = 10.0
_GREET_S = 5.0
_PLACE_S = 0.3
_DONE_BYTES, _DONE_MANY = 64 << 20, 100_000
_TRIES_MAX = 3
_ITEMS_MAX = 1 << 20
_OPENED_MAX = 10_000
_CALLERS_MAX, _WANTS_MAX = 64, 256
"""Connections of a user who is not the owner, and pieces that one of them may ask for at once."""


class Caller:
    """Somebody who makes calls.  tenant: whose functions they are."""

    __slots__ = ("is_owner", "opened", "tenant", "uid", "wants", "wire")

    def __init__(self, uid: int, tenant: str) -> None:
        self.uid, self.tenant, self.is_owner = uid, tenant, tenant == OWNER
        self.wants = 0
        """Pieces that it has asked for and not got."""

        self.opened: dict[int, Routed] = {}
        self.wire: Wire


class Done:
    """An answer that is kept.  link: of the host that has its value, if that is large; takers: callers who fetch that."""

    __slots__ = ("at", "frame", "link", "takers", "tenant")

    def __init__(self, frame: bytes, at: float, link: HostLink | None, tenant: str, takers: int) -> None:
        self.frame, self.at, self.link, self.tenant, self.takers = frame, at, link, tenant, takers


class Items:
    """What a spawned call has given so far.  size: bytes."""

    __slots__ = ("all", "size")

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self.size = 0


class Router:
    """directory: of the pool."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._is_listening = False
        self._settle(read(directory))
        self.loop = Loop()
        self.wake = waker(self.loop)
        self.pool = links.Pool(directory, "")
        self._functions: dict[tuple[str, str], Routed] = {}
        self._numbers: dict[int, Routed] = {}
        self._active: dict[Routed, None] = {}
        self._links: dict[str, HostLink] = {}
        self._jobs: dict[int, Instance] = {}
        self._calls: dict[bytes, Call] = {}
        self._items: dict[bytes, Items] = {}
        self._done: OrderedDict[bytes, Done] = OrderedDict()
        self._done_bytes = 0
        self._wants: dict[tuple[bytes, int], list[Caller]] = {}
        self._askers: dict[bytes, list[Wire]] = {}
        """Who waits for what only a host knows."""

        self._held: list[tuple[float, Caller, tuple[int, bytes, int, int, bytes]]] = []
        """Calls of before this router began, which a host that was not heard yet may know."""

        self._usage: Counter[str] = Counter()
        self._callers: set[Caller] = set()
        self._is_asked = False
        self._began = self._used = time.monotonic()
        self._controller = ControllerLink(self.loop, directory, self._heed_controller, self._watch)

    def _settle(self, settings: Settings) -> None:
        """What pool.toml says; it may have changed when there is another controller."""
        self._tenants, self.lost_s = Tenants(settings.tenants), settings.lost_s
        if self._is_listening:
            self._share()

    def _share(self) -> None:
        """Whether others reach the socket."""
        place = os.path.join(self._directory, PLACE)
        is_shared = bool(self._tenants.all)
        os.chmod(place, 0o711 if is_shared else 0o700)
        os.chmod(os.path.join(place, "socket"), 0o666 if is_shared else 0o600)

    def run(self) -> None:
        """Until nothing is deployed any more, or for a long time nobody is there."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        self._controller.open()
        self._tick()
        self.loop.run()
        for link in self._links.values():
            link.close()

    def _end(self) -> None:
        self.loop.is_over = True
        self.wake()

    # The controller.

    def _watch(self) -> None:
        self._controller.ask("watch", self._watched)

    def _watched(self, said: dict[str, Any]) -> None:
        """All that there is: at the beginning, and when there is a controller again."""
        if "error" in said:
            return
        self.pool.id = said["pool"]
        self._settle(read(self._directory))
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in self._functions}
        for row in said["functions"]:
            rows.setdefault((row["tenant"], row["name"]), []).append(row)
        for (tenant, name), found in rows.items():
            self._set_function(tenant, name, found)
        there = {one["id"] for one in said["jobs"]}
        for job in set(self._jobs) - there:
            self._job({"id": job, "state": "finished", "code": None, "reason": "its job has ended"})
        for one in said["jobs"]:
            self._job(one)
        self._is_asked = True
        for fn in self._functions.values():
            self._try_again(fn)

    def _try_again(self, fn: Routed) -> None:
        """A version that is tried, while there was no controller: how its first instance has done, or another one."""
        if not fn.trying:
            return
        first = [one for one in self._jobs.values() if one.function is fn and one.version == fn.trying]
        if any(one.is_ready for one in first):
            self._tried(fn, fn.trying, "")
        elif not first and not fn.submitting:
            self._submit(fn, fn.trying, is_first=True)

    def _heed_controller(self, said: dict[str, Any]) -> None:
        kind = said.get("watch")
        if kind == "function":
            self._set_function(said["tenant"], said["name"], said["rows"])
        elif kind == "job":
            self._job(said)
        elif kind == "end":
            self._end()

    def _set_function(self, tenant: str, name: str, rows: list[dict[str, Any]]) -> None:
        """What versions of it there are; none: it is removed."""
        key = tenant, name
        fn = self._functions.get(key)
        if not rows:
            return self._remove(key) if fn else None
        if fn is None:
            number = len(self._numbers) + 1
            fn = self._functions[key] = self._numbers[number] = Routed(tenant, name, number)
        fn.specs = {row["version"]: row["spec"] for row in rows}
        current = next((row["version"] for row in rows if row["state"] == "current"), 0)
        trying = next((row["version"] for row in rows if row["state"] == "trying"), 0)
        if fn.identity and fn.identity != fn.identity_of(fn.version):  # it was removed, and is another now
            fn.version, fn.identity = 0, ""
            for one in [one for one in self._jobs.values() if one.function is fn]:
                self._retire(one)
            fn.ready = []
        if current and current != fn.version:
            self._switch(fn, current)
        if trying and trying != fn.trying:
            self._submit(fn, trying, is_first=True)
        fn.trying = trying
        while fn.queue and not current and not trying:
            self._fail(fn.queue.pop(), "start", "its first instance has not started")
        if fn.bounds.least:
            self._active[fn] = None

    def _switch(self, fn: Routed, version: int) -> None:
        """Calls go to that version from now on; what runs on the one before may end."""
        fn.set_version(version)
        old = fn.ready + [one for one in fn.starting.values() if one.identity != fn.identity]
        fn.ready = []
        for one in old:
            self._retire(one)
        for one in self._jobs.values():
            is_right = one.function is fn and one.identity == fn.identity and one.is_ready and not one.is_leaving
            if is_right and one not in fn.ready:
                fn.ready.append(one)
        self._active[fn] = None
        self._dispatch(fn)

    def _remove(self, key: tuple[str, str]) -> None:
        fn = self._functions.pop(key)
        fn.is_gone = True
        while fn.queue:
            self._fail(fn.queue.pop(), "function", f"function {fn.name} was removed")
        for one in [one for one in self._jobs.values() if one.function is fn]:
            self._retire(one)
        fn.ready = []

    def _retire(self, one: Instance) -> None:
        """It gets no more calls; it ends when it has none."""
        one.function.starting.pop(one.job, None)
        one.is_leaving = True
        if one.is_ready and one.link:
            one.link.say(calls.control("end", instance=one.number))
            one.function.retiring.append(one)
        else:
            self._controller.ask("cancel", lambda _: None, ids=[one.job], grace_s=0)

    def _submit(self, fn: Routed, version: int, *, is_first: bool = False) -> None:
        """One more instance."""
        spec = fn.specs[version]
        spec = {**spec, "fn": {**spec["fn"], "is_first": is_first}}
        fn.submitting += 1

        def then(said: dict[str, Any]) -> None:
            fn.submitting -= 1
            if "error" in said:
                fn.later(said["error"], time.monotonic())
                return self._tried(fn, version, said["error"]) if is_first else None
            self._adopt(said["ids"][0], fn, version, is_first=is_first)

        self._controller.ask("submit", then, jobs=[{"spec": spec, "key": None, "hold": False}])
        self._active[fn] = None

    def _adopt(self, job: int, fn: Routed, version: int, *, is_first: bool) -> Instance:
        if job in self._jobs:
            return self._jobs[job]
        one = self._jobs[job] = Instance(job, fn, version, is_first=is_first)
        if version == fn.version and not fn.is_gone:
            fn.starting[job] = one
            self._active[fn] = None
        return one

    def _job(self, said: dict[str, Any]) -> None:
        """What has become of the job of an instance."""
        one = self._jobs.get(said["id"])
        if said["state"] in ("finished", "cancelled"):
            if one:
                self._ended(one, said)
            return
        if one is None:
            fn = self._functions.get((said["tenant"], said["fn"]["name"]))
            version = said["fn"]["version"]
            if fn is None or fn.specs.get(version, {}).get("fn", {}).get("id") != said["fn"]["id"]:  # or another of its name
                return self._controller.ask("cancel", lambda _: None, ids=[said["id"]], grace_s=0)
            one = self._adopt(said["id"], fn, version, is_first=bool(said["fn"].get("is_first")))
        if said["worker"] and not one.is_placed:
            one.is_placed, one.made = True, time.monotonic()
            if one.link is None:
                one.link = self._link(said["worker"], said["address"])

    def _link(self, worker: str, address: str) -> HostLink:
        link = self._links.get(worker)
        if link is None or link.address != address:
            if link:
                link.give_up()
            link = self._links[worker] = HostLink(self, worker, address)
        return link

    def _ended(self, one: Instance, said: dict[str, Any]) -> None:
        """Its job has; whatever it still had is answered by the host, or lost."""
        fn = one.function
        del self._jobs[one.job]
        was_starting = fn.starting.pop(one.job, None) is not None or (one.is_first and not one.is_ready)
        self.gone(one, "")
        fn.retiring = [other for other in fn.retiring if other is not one]
        fn.instance_s += time.monotonic() - one.made if one.is_placed else 0
        one.is_over = True
        self._forget_if_over(one)
        if not was_starting or fn.is_gone:
            return
        problem = one.problem
        if problem:
            words = f"{problem['type']}: {problem['message']}" if problem.get("type") else str(problem["message"])
            return self._not_started(one, words)
        if said["state"] == "cancelled":
            return self._not_started(one, said.get("reason") or "cancelled")

        def then(found: dict[str, Any]) -> None:
            text = base64.b64decode(found.get("data", "")).decode(errors="replace").strip().splitlines()
            self._not_started(one, (said.get("reason") or "it ended") + (f": {text[-1]}" if text else ""))

        self._controller.ask("read", then, id=one.job, stream="err", offset=0)

    @staticmethod
    def _forget_if_over(one: Instance) -> None:
        """Its job has ended; what it still has its host answers for, or that is lost with the host."""
        if one.is_over and not one.calls and one.link and one.link.instances.get(one.number) is one:
            del one.link.instances[one.number]

    def _not_started(self, one: Instance, why: str) -> None:
        fn = one.function
        if one.is_first:
            self._tried(fn, one.version, why)
        if one.version == fn.version:
            fn.failed(why, time.monotonic())
            self._give_up_queue(fn)

    def _tried(self, fn: Routed, version: int, problem: str) -> None:
        """Tell whoever deploys how its first instance has done."""
        fields = {"name": fn.name, "tenant": fn.tenant, "version": version, "problem": problem[:4096]}
        self._controller.ask("function", lambda _: None, what="tried", **fields)

    def _give_up_queue(self, fn: Routed) -> None:
        if fn.is_hopeless and not fn.ready:
            while fn.queue:
                self._fail(fn.queue.pop(), "start", f"instances end before they are ready: {fn.problem}")

    # Hosts.

    def heed_host(self, link: HostLink, said: dict[str, Any]) -> None:
        """What a host says of an instance."""
        kind = said["is"]
        if kind == "ready":
            one = self._jobs.get(int(str(said["job"]).partition(".")[0]))
            if one is None:
                return link.say(calls.control("end", instance=said["instance"]))  # its job is none of ours any more
            one.may_be_ahead = bool(said.get("ahead"))
            self._ready(link, one, int(said["instance"]), int(said["busy"]))
        elif kind == "failed":
            one = self._jobs.get(int(str(said["job"]).partition(".")[0]))
            if one:
                one.problem = {name: str(value)[: 64 << 10] for name, value in said["error"].items()}
        else:
            one = link.instances.get(int(said["instance"]))
            if one and kind == "gone":
                self.gone(one, str(said["reason"]))
            elif one and kind == "freed":
                one.busy = max(one.busy - 1, 0)
                self._dispatch(one.function)

    def _ready(self, link: HostLink, one: Instance, number: int, busy: int) -> None:
        fn = one.function
        one.busy = max(busy - len(one.calls), 0)
        one.link, one.number = link, number
        link.instances[number] = one
        one.idle_s = -1.0
        if one.is_ready:
            if one.is_leaving:
                link.say(calls.control("end", instance=number))
            return self._dispatch(fn)
        one.is_ready = True
        fn.started(one, time.monotonic())
        fn.starting.pop(one.job, None)
        if one.identity and one.identity == fn.identity:
            fn.ready.insert(0, one)
            self._active[fn] = None
            self._dispatch(fn)
        elif one.is_first and one.version == fn.trying:
            self._tried(fn, one.version, "")
        else:
            self._retire(one)

    def gone(self, one: Instance, why: str) -> None:
        """It gets no more calls."""
        one.is_leaving = True
        if one in one.function.ready:
            one.function.ready.remove(one)
            one.function.retiring.append(one)
        if why == "its worker was lost" and one.job in self._jobs:
            self._controller.ask("cancel", lambda _: None, ids=[one.job], grace_s=0)

    def greeted(self, link: HostLink) -> None:
        """A host has said what it knows; what was under way when the connection was lost is asked for again."""
        for one in self._calls.values():
            if one.link is link and one.instance is None:
                link.say(calls.frame(calls.ASK, one.id))
        for call, piece in self._wants:
            done = self._done.get(call)
            if done and done.link is link:
                link.say(calls.frame(calls.WANT, call, a=piece))

    def lost_link(self, link: HostLink) -> None:
        """A host is no more."""
        for one in [one for one in self._calls.values() if one.link is link and one.instance is None]:
            self.lost(one)
        for call, piece in list(self._wants):
            done = self._done.get(call)
            if done is None or done.link is link:
                self._no_piece(call, piece)

    def _no_piece(self, call: bytes, piece: int) -> None:
        for caller in self._wants.pop((call, piece), []):
            caller.wants -= 1
            caller.wire.say(calls.failed(call, "unknown", "its answer is not kept any more"))

    def answered(self, link: HostLink, flags: int, call: bytes, items: int, body: bytes) -> None:
        """An answer has come from a host.  items: how many came before it."""
        found = self._calls.pop(call, None)
        now = self.loop.now
        if found is None:
            return self._answered_before(link, flags, call, items, body)
        one, fn = found.instance, found.function
        if one:
            fn.answered(found, flags, now)
            one.calls.pop(call, None)
            one.used = now
            one.busy += bool(flags & calls.BUSY)
            self._forget_if_over(one)
        kept = self._items.pop(call, None)
        if flags & calls.STREAM and found.flags & calls.SPAWN and not flags & calls.ERROR:
            given = kept.all if kept else []
            if len(given) == items:
                body, flags = b"[" + b",".join(given) + b"]", 0
            else:
                body, flags = calls.error("unknown", "some of its values were lost"), calls.ERROR
        self._deliver(found, flags & ~calls.BUSY, body, link if flags & calls.REFERENCE else None, items)
        if fn.queue:
            self._dispatch(fn)
        elif one and not one.calls:
            fn.settle(now)

    def _answered_before(self, link: HostLink, flags: int, call: bytes, items: int, body: bytes) -> None:
        """Of a router before us, or of one that nobody knows: a piece that is not there, most likely."""
        for at in [at for at in self._wants if at[0] == call] if flags & calls.ERROR and call in self._done else ():
            self._no_piece(*at)
        known = link.known.get(call)
        if known is None:
            return
        one = link.instances.get(known[1])
        if one and known[0] == "running" and not flags & calls.BUSY:
            link.known[call] = "done", known[1]
            one.busy = max(one.busy - 1, 0)
            self._dispatch(one.function)
        frame = calls.frame(calls.ANSWER, call, body, flags=flags & ~calls.BUSY, a=items)
        askers = self._askers.pop(call, [])
        self._keep(call, frame, link if flags & calls.REFERENCE else None, one.function.tenant if one else OWNER, len(askers))
        for wire in askers:
            wire.say(frame)

    def heed_call(self, link: HostLink, kind: int, flags: int, call: bytes, a: int, body: bytes) -> None:
        """What else a host says of a call."""
        if kind == calls.PIECE:
            for caller in self._wants.pop((call, a), []):
                caller.wants -= 1
                caller.wire.say(calls.frame(calls.PIECE, call, body, flags=flags, a=a))
            return
        found = self._calls.get(call)
        if found is None:
            return
        if kind == calls.BOUNCE:
            self.again(found, is_counted=False)
        elif kind == calls.ITEM and found.flags & calls.SPAWN:
            kept = self._items.setdefault(call, Items())
            kept.size += len(body)
            if kept.size > _ITEMS_MAX or flags & calls.BYTES:
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
        self._items.pop(call.id, None)
        call.tries += is_counted
        fn = call.function
        if fn.is_gone or call.tries > _TRIES_MAX:
            return self._fail(call, "unknown" if not fn.is_gone else "function", f"function {fn.name} has lost its instances")
        fn.queue.put(call, is_first=True)
        self._active[fn] = None
        self._dispatch(fn)

    def lost(self, call: Call) -> None:
        """Where it was nobody answers any more."""
        if call.flags & calls.IDEMPOTENT:
            return self.again(call)
        call.function.unknowns += 1
        if call.instance:
            call.instance.calls.pop(call.id, None)
        self._fail(call, "unknown", "outcome unknown: its worker was lost in the call")

    # Calls.

    def _fail(self, call: Call, kind: str, message: str) -> None:
        self._calls.pop(call.id, None)
        self._items.pop(call.id, None)
        call.function.count += 1
        call.function.errors += 1
        self._deliver(call, calls.ERROR, calls.error(kind, message), None, 0)

    def _deliver(self, call: Call, flags: int, body: bytes, link: HostLink | None, items: int) -> None:
        frame = calls.frame(calls.ANSWER, call.id, body, flags=flags, a=items)
        self._usage[call.function.tenant] -= 1
        self._keep(call.id, frame, link, call.function.tenant, len(call.callers))
        for wire in call.callers:
            wire.say(frame)

    def _keep(self, call: bytes, frame: bytes, link: HostLink | None, tenant: str, takers: int) -> None:
        before = self._done.pop(call, None)
        self._done_bytes += len(frame) - (len(before.frame) if before else 0)
        self._done[call] = Done(frame, self.loop.now, link, tenant, takers)
        while self._done_bytes > _DONE_BYTES or len(self._done) > _DONE_MANY:
            self._done_bytes -= len(self._done.popitem(last=False)[1].frame)

    def _dispatch(self, fn: Routed) -> None:
        """Give what waits to those that have room."""
        while fn.queue:
            one = fn.pick()
            if one is None:
                return
            call = fn.queue.pop()
            self._give(call, one)

    def _give(self, call: Call, one: Instance) -> None:
        now = self.loop.now
        call.instance, call.begun = one, now
        one.calls[call.id] = call
        ms = max(int((call.deadline - now) * 1000), 1) if call.deadline else 0
        assert one.link
        one.link.say(calls.frame(calls.CALL, call.id, call.body, flags=call.flags & ~calls.SPAWN, a=one.number, b=ms))

    # Callers.

    def _accept(self, connection: socket.socket) -> None:
        uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        tenant = OWNER if uid in (os.geteuid(), 0) else self._tenants.of_user(uid)
        many = sum(one.uid == uid for one in self._callers)
        if tenant is None or (tenant != OWNER and many >= _CALLERS_MAX):
            return connection.close()
        caller = Caller(uid, tenant)

        def heed(kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
            self._heed_caller(caller, kind, flags, call, a, b, body)

        def lost(_: str) -> None:
            self._callers.discard(caller)

        caller.wire = Wire(self.loop, connection, heed, lost)
        self._callers.add(caller)

    def _heed_caller(self, caller: Caller, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.CALL:
            self._come(caller, flags, call, a, b, body)
        elif kind == calls.CONTROL:
            self._answer_caller(caller, calls.said(body))
        elif kind == calls.ASK:
            self._ask(caller, call, body.decode("utf-8", "replace"), is_to_wait=bool(a))
        elif kind in (calls.WANT, calls.FORGET):
            self._fetch(caller, kind, call, a)
        else:
            found = self._calls.get(call)
            if found is None or caller.wire not in found.callers:
                return
            link = found.instance.link if found.instance else found.link
            if link and kind in (calls.PIECE, calls.MORE, calls.CANCEL):
                link.say(calls.frame(kind, call, body, flags=flags, a=a))
            elif kind == calls.CANCEL and found.function.queue.remove(found):
                self._fail(found, "cancelled", "the call was cancelled")

    def _fetch(self, caller: Caller, kind: int, call: bytes, piece: int) -> None:
        """A piece of a large answer; or one that has it, or does not want it."""
        done = self._done.get(call)
        if done is None or done.link is None or not (caller.is_owner or done.tenant == caller.tenant):
            return (
                caller.wire.say(calls.failed(call, "unknown", "its answer is not kept any more"))
                if kind == calls.WANT
                else None
            )
        if kind == calls.FORGET:
            done.takers -= 1
            if done.takers <= 0:
                done.link.say(calls.frame(kind, call))
                self._done_bytes -= len(self._done.pop(call).frame)
            return
        caller.wants += 1
        if caller.wants > _WANTS_MAX:
            return caller.wire.close("it asks for too much at once")
        waiting = self._wants.setdefault((call, piece), [])
        waiting.append(caller)
        if len(waiting) == 1:
            done.link.say(calls.frame(kind, call, a=piece))

    def _come(self, caller: Caller, flags: int, call: bytes, number: int, ms: int, body: bytes) -> None:
        """A call."""
        known = self._calls.get(call) or self._done.get(call)
        fn = caller.opened.get(number)
        if known is not None:
            return self._same_again(caller, call, flags, known)
        if fn is None or fn.is_gone:
            return caller.wire.say(calls.failed(call, "function", "there is no such function"))
        now = self.loop.now
        if any(call in link.known for link in self._links.values()):
            return self._take_up(caller, call, flags, fn, body, now)
        is_again = bool(flags & calls.LAST)
        flags &= ~calls.LAST
        if is_again and not flags & calls.IDEMPOTENT and not all(link.has_ever_greeted for link in self._links.values()):
            self._held.append((now, caller, (flags, call, number, ms, body)))  # a host may have begun it
            return
        limit = self._tenants.all[fn.tenant].calls if fn.tenant in self._tenants.all else 0
        if fn.queue.is_full(len(body)):
            return caller.wire.say(calls.failed(call, "full", f"the queue of {fn.name} is full"))
        if limit and self._usage[fn.tenant] >= limit:
            return caller.wire.say(calls.failed(call, "full", f"quota: {fn.tenant} has {limit} of {limit} calls"))
        if fn.is_hopeless and now < fn.blocked_until and not fn.ready:
            return caller.wire.say(calls.failed(call, "start", f"instances end before they are ready: {fn.problem}"))
        found = Call(call, fn, flags, body, now, now + ms / 1000 if ms else 0.0)
        self._calls[call] = found
        self._usage[fn.tenant] += 1
        if flags & calls.SPAWN:
            caller.wire.say(calls.frame(calls.BEGUN, call))
        if not flags & calls.SPAWN or flags & calls.REFERENCE:
            found.callers.append(caller.wire)
        fn.came(now)
        one = fn.pick() if not fn.queue else None
        if one:
            return self._give(found, one)
        fn.queue.put(found)
        self._active[fn] = None
        found.is_cold = not fn.ready
        if now >= fn.scale_after:
            fn.scale_after = now + _SCALE_S
            self._scale(fn, now)

    def _same_again(self, caller: Caller, call: bytes, flags: int, known: Call | Done) -> None:
        """A call that is known: whoever sends it again gets the same answer."""
        tenant = known.function.tenant if isinstance(known, Call) else known.tenant
        if not caller.is_owner and tenant != caller.tenant:
            return caller.wire.say(calls.failed(call, "function", "that id is another call's"))
        if flags & calls.SPAWN:
            caller.wire.say(calls.frame(calls.BEGUN, call))
        if flags & calls.SPAWN and not flags & calls.REFERENCE:
            return
        if isinstance(known, Call):
            known.callers.append(caller.wire)
        else:
            known.takers += 1
            caller.wire.say(known.frame)

    def _take_up(self, caller: Caller, call: bytes, flags: int, fn: Routed, body: bytes, now: float) -> None:
        """A call that a host knows from the router before us."""
        for link in self._links.values():
            known = link.known.get(call)
            if known is None:
                continue
            one = link.instances.get(known[1])
            if one and one.function is not fn:
                return caller.wire.say(calls.failed(call, "function", "that id is another call's"))
            found = self._calls[call] = Call(call, fn, flags, body, now, 0.0)
            found.begun = now
            found.callers.append(caller.wire)
            self._usage[fn.tenant] += 1
            found.link = link
            if one and known[0] == "running":
                found.instance = one
                one.calls[call] = found
                one.busy = max(one.busy - 1, 0)
            link.say(calls.frame(calls.ASK, call))
            return

    def _ask(self, caller: Caller, call: bytes, tenant_asked: str, *, is_to_wait: bool) -> None:
        """What has become of a call.  tenant_asked: whose it is to be, '' for whosever it is."""
        known = self._calls.get(call) or self._done.get(call)
        tenant = (known.function.tenant if isinstance(known, Call) else known.tenant) if known else OWNER
        if known and ((not caller.is_owner and tenant != caller.tenant) or tenant_asked not in ("", tenant)):
            known = None
        if isinstance(known, Done):
            known.takers += 1
            return caller.wire.say(known.frame)
        if known is None:
            for link in self._links.values():
                state, number = link.known.get(call, ("", 0))
                one = link.instances.get(number)
                whose = one.function.tenant if one else OWNER
                if not state or (not caller.is_owner and whose != caller.tenant) or tenant_asked not in ("", whose):
                    continue
                if state == "running" and not is_to_wait:
                    return caller.wire.say(calls.control("state", call=call.hex(), state=state))
                self._askers.setdefault(call, []).append(caller.wire)
                return link.say(calls.frame(calls.ASK, call))
            return caller.wire.say(calls.control("state", call=call.hex(), state="unknown"))
        if is_to_wait:
            known.callers.append(caller.wire)
        else:
            state = "running" if known.instance else "queued"
            caller.wire.say(calls.control("state", call=call.hex(), state=state))

    def _answer_caller(self, caller: Caller, said: dict[str, Any]) -> None:
        tag = said.get("tag")
        if type(tag) is not int:
            raise ValueError("a tag is a number")
        if said["is"] == "stats":
            shown = [fn.shown() for key, fn in sorted(self._functions.items()) if caller.is_owner or fn.tenant == caller.tenant]
            for at in range(0, len(shown) or 1, 500):
                caller.wire.say(calls.control("stats", tag=tag, functions=shown[at : at + 500], more=at + 500 < len(shown)))
            return
        if said["is"] != "open":
            raise ValueError("unknown")
        tenant = str(said.get("tenant") or caller.tenant)
        fn = self._functions.get((tenant, str(said["name"]))) if caller.is_owner or tenant == caller.tenant else None
        if fn is None or not (fn.version or fn.trying) or len(caller.opened) > _OPENED_MAX:
            message = f"no function '{said['name']}'"
            return caller.wire.say(calls.control("error", tag=tag, kind="function", message=message))
        caller.opened[fn.number] = fn
        caller.wire.say(calls.control("open", tag=tag, number=fn.number, tenant=fn.tenant, timeout_s=fn.timeout_s))

    # Time.

    def _tick(self) -> None:
        now = time.monotonic()
        self.loop.at(now + _TICK_S, self._tick)
        for link in list(self._links.values()):
            link.take_opened()
            link.mind()
        self._mind_listening(now)
        for fn in list(self._active):
            self._mind(fn, now)
        self._mind_held(now)
        self._mind_starts(now)
        while self._done and next(iter(self._done.values())).at < now - calls.KEPT_S:
            self._done_bytes -= len(self._done.popitem(last=False)[1].frame)
        self._mind_links()
        self._make_room(now)
        if self._jobs or self._calls or (self._controller.is_open and self._functions):
            self._used = now
        elif now > self._used + _BEGIN_S:
            self.loop.is_over = True
        if not self._is_asked and now > self._began + _BEGIN_S:
            self.loop.is_over = True  # without a controller nobody knows what there is to do

    def _mind_listening(self, now: float) -> None:
        """Take calls when all hosts have said what they know, or have had the time to."""
        if self._is_listening or not self._is_asked:
            return
        if all(link.has_greeted for link in self._links.values()) or now > self._began + _GREET_S:
            self._is_listening = True
            listen(self.loop, sockets.listen(os.path.join(self._directory, PLACE)), self._accept)
            self._share()

    def _mind_held(self, now: float) -> None:
        """Calls that a host may have begun, when all were heard; or one is not for too long."""
        is_known = all(link.has_ever_greeted for link in self._links.values())
        held, self._held = self._held, []
        for came, caller, (flags, call, number, ms, body) in held:
            if is_known:
                self._come(caller, flags, call, number, ms, body)
            elif now > came + self.lost_s:
                caller.wire.say(calls.failed(call, "unknown", "outcome unknown: its worker does not answer"))
            else:
                self._held.append((came, caller, (flags, call, number, ms, body)))

    def _mind_starts(self, now: float) -> None:
        """Instances that are not ready in time."""
        for one in self._jobs.values():
            spec = one.function.specs.get(one.version)
            limit_s = spec["fn"]["start_s"] if spec else 0.0
            if one.is_placed and not one.is_ready and not one.problem and now > one.made + limit_s:
                one.problem = {"type": "", "message": "it was not ready in time"}
                self._controller.ask("cancel", lambda _: None, ids=[one.job], grace_s=1)

    def _make_room(self, now: float) -> None:
        """An instance that has waited for a place for a moment gets that of one that is idle."""
        waiting = [one for one in self._jobs.values() if not one.is_placed and one.made < now - _PLACE_S]
        wanted = [one for one in waiting if one.freed_cpus < _cpus(one)]  # no more is ended for one than it needs
        if not wanted:
            return
        idle = []
        for fn in self._functions.values():
            many = len(fn.ready) - autoscaling.floor(fn.seen(), fn.bounds)
            idle += [one for one in fn.ready[: max(many, 0)] if not one.load] if not fn.queue else []
        if idle:
            one = min(idle, key=lambda one: one.used)
            wanted[0].freed_cpus += max(_cpus(one), 0.01)
            assert one.link
            one.link.say(calls.control("end", instance=one.number))

    def _mind_links(self) -> None:
        wanted = {one.link.worker for one in self._jobs.values() if one.link} | {
            done.link.worker for done in self._done.values() if done.link
        }
        for name in set(self._links) - wanted:
            if not any(call.instance and call.instance.link is self._links[name] for call in self._calls.values()):
                self._links.pop(name).close()

    def _mind(self, fn: Routed, now: float) -> None:
        limit = now - fn.timeout_s
        for call in [one for one in fn.queue if 0 < one.deadline <= now or (not one.deadline and one.came < limit)]:
            fn.queue.remove(call)
            self._fail(call, "timeout", "the call waited too long for an instance")
        self._dispatch(fn)
        if fn.is_gone:
            self._active.pop(fn)
            return
        self._scale(fn, now)
        self._set_idle(fn)
        if not (fn.queue or fn.ready or fn.starting or fn.retiring or fn.submitting or fn.bounds.least):
            self._active.pop(fn)

    def _scale(self, fn: Routed, now: float) -> None:
        if not fn.version or now < fn.blocked_until or not self._controller.is_open:
            return
        seen = fn.seen()
        for _ in range(autoscaling.to_start(seen, fn.bounds)):
            self._submit(fn, fn.version)
        if not fn.queue and len(fn.ready) + len(fn.starting) > autoscaling.floor(seen, fn.bounds):
            waiting = [one.job for one in fn.starting.values() if not one.is_placed]
            if waiting:  # nobody needs them any more, and they have no place yet
                self._controller.ask("cancel", lambda _: None, ids=waiting, grace_s=0)
                for job in waiting:
                    del fn.starting[job]

    def _set_idle(self, fn: Routed) -> None:
        """Tell hosts how long instances are kept."""
        idle_s = autoscaling.window_s(fn.measured.gaps, fn.bounds)
        keep = autoscaling.floor(fn.seen(), fn.bounds)
        for at, one in enumerate(fn.ready):
            wanted = 0.0 if at >= len(fn.ready) - keep else idle_s
            if abs(wanted - one.idle_s) > 0.1 * max(one.idle_s, 0.0) or (wanted == 0) != (one.idle_s == 0):
                one.idle_s = wanted
                assert one.link
                one.link.say(calls.control("idle", instance=one.number, idle_s=wanted))


def _cpus(one: Instance) -> float:
    """That it has for itself."""
    spec = one.function.specs.get(one.version)
    return float(spec["cpus"]) if spec else 0.0


def main(directory: str) -> int:
    """Be the router of a pool, if there is none."""
    place = os.path.join(directory, PLACE)
    os.makedirs(place, mode=0o700, exist_ok=True)
    lock = os.open(os.path.join(place, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    linux.raise_descriptor_limit()
    try:
        os.unlink(os.path.join(place, "socket"))
    except FileNotFoundError:
        pass
    try:
        Router(directory).run()
    finally:
        try:
            os.unlink(os.path.join(place, "socket"))
        except FileNotFoundError:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
