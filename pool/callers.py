"""Whoever makes calls, connected to the router: who may call what, what is refused, and what is the same call again."""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter

from pool import calls, sockets
from pool.answers import Done
from pool.held import Held
from pool.loop import Wire, listen
from pool.routed import Call, Routed
from pool.settings import read
from pool.tenants import OWNER, Tenants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.hostlinks import HostLink
    from pool.router import Router
    from pool.settings import Settings

PLACE = "router"
_GREET_S = 5.0
_OPENED_MAX = 10_000
_SCALE_S = 0.02
_CALLERS_MAX = 64
"""Connections of a user who is not the owner."""


class Caller:
    """Somebody who makes calls.  tenant: whose functions they are.  wants: pieces that it has asked for and not got."""

    __slots__ = ("is_owner", "opened", "tenant", "uid", "wants", "wire")

    def __init__(self, uid: int, tenant: str) -> None:
        self.uid, self.tenant, self.is_owner = uid, tenant, tenant == OWNER
        self.wants = 0
        self.opened: dict[int, Routed] = {}
        self.wire: Wire


class Askers:
    """Of a call that only the host of LINK knows."""

    __slots__ = ("link", "wires")

    def __init__(self, link: HostLink) -> None:
        self.link = link
        self.wires: list[Wire] = []


class Callers:
    """All of them."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.usage: Counter[str] = Counter()
        """Calls of each tenant that have no answer."""

        self.askers: dict[bytes, Askers] = {}
        """Who waits for what only a host knows."""

        self._held = Held()
        self._all: set[Caller] = set()
        self._is_listening = False
        self.settle(read(router.directory))

    def _accept(self, connection: socket.socket) -> None:
        uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        tenant = OWNER if uid in (os.geteuid(), 0) else self._tenants.of_user(uid)
        many = sum(one.uid == uid for one in self._all)
        if tenant is None or (tenant != OWNER and many >= _CALLERS_MAX):
            return connection.close()
        caller = Caller(uid, tenant)

        def heed(kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
            self._heed(caller, kind, flags, call, a, b, body)

        def lost(_: str) -> None:
            self._all.discard(caller)

        caller.wire = Wire(self._router.loop, connection, heed, lost, is_shared=caller.is_owner)
        self._all.add(caller)

    def _heed(self, caller: Caller, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.CALL:
            self._come(caller, flags, call, a, b, body)
        elif kind == calls.CONTROL:
            self._control(caller, calls.said(body))
        elif kind == calls.ASK:
            self._ask(caller, call, body.decode("utf-8", "replace"), is_to_wait=bool(a))
        elif kind in (calls.WANT, calls.FORGET):
            self._router.answers.fetch(caller, kind, call, a)
        else:
            found = self._router.calls.get(call)
            if found is None and kind == calls.CANCEL:
                self._held.drop(caller, call)
            if found is None or caller.wire not in found.callers:
                return
            link = found.host
            if link and kind in (calls.PIECE, calls.MORE, calls.CANCEL):
                link.say(calls.frame(kind, call, body, flags=flags, a=a))
            elif kind == calls.CANCEL and found.function.queue.remove(found):
                self._router.fail(found, "cancelled", "the call was cancelled")

    def _come(self, caller: Caller, flags: int, call: bytes, number: int, ms: int, body: bytes) -> None:
        """A call."""
        known = self._router.calls.get(call) or self._router.answers.done.get(call)
        fn = caller.opened.get(number)
        if known is not None:
            return self._same_again(caller, call, flags, known)
        if fn and fn.is_gone:  # it may have been deployed anew
            fn = self._router.instances.functions.get((fn.tenant, fn.name))
            if fn:
                caller.opened[number] = fn
        if fn is None:
            return caller.wire.say(calls.failed(call, "function", "there is no such function"))
        now = self._router.loop.now
        if any(call in link.known for link in self._router.links.values()):
            return self._take_up(caller, call, flags, fn, body, now)
        noted = self._router.spawned.answer(call) if flags & (calls.SPAWN | calls.LAST) else None
        if noted:
            return self._same_again_noted(caller, call, flags, *noted)
        is_again = bool(flags & calls.LAST)
        flags &= ~calls.LAST
        if is_again and not flags & calls.IDEMPOTENT and not all(link.has_ever_greeted for link in self._router.links.values()):
            if not self._held.put(now, caller, (flags, call, number, ms, body)):
                caller.wire.say(calls.failed(call, "full", "too many calls wait for workers that do not answer yet"))
            return
        if is_again and not flags & calls.IDEMPOTENT and call in self._router.answers.gone:
            return caller.wire.say(calls.failed(call, "unknown", "it was done, and its answer is not kept any more"))
        limit = self._tenants.all[fn.tenant].calls if fn.tenant in self._tenants.all else 0
        if fn.queue.is_full(len(body)):
            return caller.wire.say(calls.failed(call, "full", f"the queue of {fn.name} is full"))
        if limit and self.usage[fn.tenant] >= limit:
            return caller.wire.say(calls.failed(call, "full", f"quota: {fn.tenant} has {limit} of {limit} calls"))
        if fn.is_hopeless and now < fn.blocked_until and not fn.ready:
            return caller.wire.say(calls.failed(call, "start", f"instances end before they are ready: {fn.problem}"))
        found = Call(call, fn, flags, body, now, now + ms / 1000 if ms else 0.0)
        self._router.calls[call] = found
        self.usage[fn.tenant] += 1
        if flags & calls.SPAWN and not flags & calls.REFERENCE:
            return self._router.spawned.note(found, ms, caller.wire)
        if flags & calls.SPAWN:  # its value is still to come from its caller, who waits for the answer
            caller.wire.say(calls.frame(calls.BEGUN, call))
        found.callers.append(caller.wire)
        self.begin(found)

    def begin(self, found: Call) -> None:
        """It is accepted: give it to an instance, or let it wait for one."""
        fn, now = found.function, self._router.loop.now
        fn.came(now)
        one = fn.pick() if not fn.queue else None
        if one:
            return self._router.give(found, one)
        fn.queue.put(found)
        self._router.instances.active[fn] = None
        found.is_cold = not fn.ready
        if now >= fn.scale_after:
            fn.scale_after = now + _SCALE_S
            self._router.instances.scale(fn, now)

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

    def _same_again_noted(self, caller: Caller, call: bytes, flags: int, tenant: str, frame: bytes) -> None:
        """As `_same_again`, of one that was spawned and has its answer on disk."""
        if not caller.is_owner and tenant != caller.tenant:
            return caller.wire.say(calls.failed(call, "function", "that id is another call's"))
        if flags & calls.SPAWN:
            caller.wire.say(calls.frame(calls.BEGUN, call))
        if not flags & calls.SPAWN or flags & calls.REFERENCE:
            caller.wire.say(_kept(call, frame))

    def _take_up(self, caller: Caller, call: bytes, flags: int, fn: Routed, body: bytes, now: float) -> None:
        """A call that a host knows from the router before us."""
        for link in self._router.links.values():
            known = link.known.get(call)
            if known is None:
                continue
            whose = self._router.instances.function_of(link, known)
            if whose is not fn and (whose or not caller.is_owner):
                return caller.wire.say(calls.failed(call, "function", "that id is another call's"))
            if flags & calls.SPAWN:
                caller.wire.say(calls.frame(calls.BEGUN, call))
            found = self._router.calls[call] = Call(call, fn, flags, body, now, 0.0)
            if not flags & calls.SPAWN or flags & calls.REFERENCE:
                found.callers.append(caller.wire)
            self.usage[fn.tenant] += 1
            return self.take_up(found, link)

    def take_up(self, call: Call, link: HostLink) -> None:
        """The host of LINK knows it."""
        state, number, _ = link.known[call.id]
        one = link.instances.get(number)
        call.begun, call.link = self._router.loop.now, link
        if one and state == "running":
            call.instance = one
            one.calls[call.id] = call
            one.busy = max(one.busy - 1, 0)
        link.say(calls.frame(calls.ASK, call.id))

    def _ask(self, caller: Caller, call: bytes, tenant_asked: str, *, is_to_wait: bool) -> None:
        """What has become of a call.  tenant_asked: whose it is to be, '' for whosever it is."""
        known = self._router.calls.get(call) or self._router.answers.done.get(call)
        tenant = (known.function.tenant if isinstance(known, Call) else known.tenant) if known else OWNER
        if known and ((not caller.is_owner and tenant != caller.tenant) or tenant_asked not in ("", tenant)):
            known = None
        if isinstance(known, Done):
            known.takers += 1
            return caller.wire.say(known.frame)
        if known is None:
            for link in self._router.links.values():
                known_there = link.known.get(call)
                if known_there is None:
                    continue
                fn, state = self._router.instances.function_of(link, known_there), known_there[0]
                whose = fn.tenant if fn else OWNER
                if (not caller.is_owner and whose != caller.tenant) or tenant_asked not in ("", whose):
                    continue
                if state == "running" and not is_to_wait:
                    return caller.wire.say(calls.control("state", call=call.hex(), state=state))
                self.askers.setdefault(call, Askers(link)).wires.append(caller.wire)
                return link.say(calls.frame(calls.ASK, call))
            return self._tell_noted(caller, call, tenant_asked)
        if is_to_wait:
            known.callers.append(caller.wire)
        else:
            state = "running" if known.instance else "queued"
            caller.wire.say(calls.control("state", call=call.hex(), state=state))

    def _tell_noted(self, caller: Caller, call: bytes, tenant_asked: str) -> None:
        """The answer of one that was spawned, if it is on disk."""
        whose, frame = self._router.spawned.answer(call) or ("", b"")
        if not frame or (not caller.is_owner and whose != caller.tenant) or tenant_asked not in ("", whose):
            return caller.wire.say(calls.control("state", call=call.hex(), state="unknown"))
        caller.wire.say(_kept(call, frame))

    def asked(self) -> set[HostLink]:
        """Of what somebody waits for that only these know."""
        for call in [call for call, one in self.askers.items() if not any(wire.is_open for wire in one.wires)]:
            del self.askers[call]
        return {one.link for one in self.askers.values()}

    def ask_again(self, link: HostLink) -> None:
        """There is another connection to a host."""
        for call, one in list(self.askers.items()):
            if one.link is link:
                link.say(calls.frame(calls.ASK, call))  # if it knows nothing, it says so

    def lose(self, link: HostLink) -> None:
        """A host is no more."""
        for call in [call for call, one in self.askers.items() if one.link is link]:
            for wire in self.askers.pop(call).wires:
                wire.say(calls.failed(call, "unknown", "outcome unknown: its worker was lost in the call"))

    def _control(self, caller: Caller, said: dict[str, Any]) -> None:
        tag = said.get("tag")
        if type(tag) is not int:
            raise ValueError("a tag is a number")
        if said["is"] == "stats":
            shown = [
                fn.shown()
                for key, fn in sorted(self._router.instances.functions.items())
                if caller.is_owner or fn.tenant == caller.tenant
            ]
            for at in range(0, len(shown) or 1, 500):
                caller.wire.say(calls.control("stats", tag=tag, functions=shown[at : at + 500], more=at + 500 < len(shown)))
            return
        if said["is"] != "open":
            raise ValueError("unknown")
        tenant = str(said.get("tenant") or caller.tenant)
        fn = (
            self._router.instances.functions.get((tenant, str(said["name"])))
            if caller.is_owner or tenant == caller.tenant
            else None
        )
        if fn is None or not (fn.version or fn.trying) or len(caller.opened) > _OPENED_MAX:
            message = f"no function '{said['name']}'"
            return caller.wire.say(calls.control("error", tag=tag, kind="function", message=message))
        caller.opened[fn.number] = fn
        caller.wire.say(calls.control("open", tag=tag, number=fn.number, tenant=fn.tenant, timeout_s=fn.timeout_s))

    def mind_held(self, now: float) -> None:
        """Calls that a host may have begun, when all were heard; or one is not for too long."""
        is_known = all(link.has_ever_greeted for link in self._router.links.values())
        for came, caller, fields in self._held.all():
            flags, call, number, ms, body = fields
            if is_known:
                self._held.drop(caller, call)
                self._come(caller, flags, call, number, ms, body)
            elif now > came + self.lost_s:
                self._held.drop(caller, call)
                caller.wire.say(calls.failed(call, "unknown", "outcome unknown: its worker does not answer"))

    def settle(self, settings: Settings) -> None:
        """What pool.toml says; it may have changed when there is another controller."""
        self._tenants, self.lost_s = Tenants(settings.tenants), settings.lost_s
        if self._is_listening:
            self._share()

    def _share(self) -> None:
        """Whether others reach the socket."""
        place = os.path.join(self._router.directory, PLACE)
        is_shared = bool(self._tenants.all)
        os.chmod(place, 0o711 if is_shared else 0o700)
        os.chmod(os.path.join(place, "socket"), 0o666 if is_shared else 0o600)

    def mind_listening(self, now: float) -> None:
        """Take calls when all hosts have said what they know, or have had the time to."""
        if self._is_listening or not self._router.instances.is_asked:
            return
        if all(link.has_greeted for link in self._router.links.values()) or now > self._router.began + _GREET_S:
            self._is_listening = True
            listen(self._router.loop, sockets.listen(os.path.join(self._router.directory, PLACE)), self._accept)
            self._share()


def _kept(call: bytes, frame: bytes) -> bytes:
    """An answer that is on disk; of a large one only its name is."""
    if calls.HEAD.unpack_from(frame)[2] & calls.REFERENCE:
        return calls.failed(call, "unknown", "its answer is not kept any more")
    return frame
