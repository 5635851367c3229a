"""The function host of a worker: between the router and the instances that serve calls.  cpool-function(7), FUNCTION HOST.

Part of the agent's program: standard library only, Python 3.9.  A process of its own: calls and heartbeats do not wait for each
other, and an agent that ends disturbs no call.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import time

from pool import admitting, calls, loop, sockets
from pool.execution import Execution
from pool.hosted import OUTCOME, PLACE, Instance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICK_S, _IDLE_TICK_S = 0.1, 1.0
_GRACE_S = 10.0
_LAST_S = 1.0
"""How long a process may live on whose connection has ended."""

_ALONE_S = 600.0
_TEXT_MAX = 64 << 10
_STRANGERS_MAX, _HELLO_S = 64, 10.0
"""Connections that have not said whose they are, and how long they may take."""

_TOLD_AT_ONCE = 10_000


class Host:
    """directory: of the agent."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._place = os.path.join(directory, PLACE)
        self._loop = loop.Loop()
        self._name = os.urandom(8).hex()
        self._router: loop.Wire | None = None
        self._instances: dict[int, Instance] = {}
        self._zygotes = admitting.Zygotes(directory)
        self._calls = Execution(directory, self._loop, self._say)
        self._strangers: dict[loop.Wire, float] = {}
        """Since when they are there, the oldest first."""

        self._numbers = 0
        self._alone_since = time.monotonic()
        self._tick_at, self._is_to_leave = math.inf, False
        os.makedirs(os.path.join(self._place, "in"), exist_ok=True)
        os.chmod(os.path.join(self._place, "in"), 0o755)
        loop.listen(self._loop, sockets.listen(self._place), self._accept_router)
        inner = sockets.listen(os.path.join(self._place, "in"), mode=0o666)
        loop.listen(self._loop, inner, self._accept_instance)

    def run(self) -> None:
        """Until nobody has wanted anything for a long time."""
        self._tick()
        self._loop.run()

    # The router.

    def _accept_router(self, connection: socket.socket) -> None:
        wire: loop.Wire

        def heed(kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
            self._heed_router(wire, kind, flags, call, a, b, body)

        def lost(_: str) -> None:
            self._router = None if self._router is wire else self._router
            self._zygotes.unwanted(wire)

        wire = loop.Wire(self._loop, connection, heed, lost, is_shared=True)

    def _heed_router(self, wire: loop.Wire, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.CALL:
            self._calls.begin(call, self._instances.get(a), flags, b, body)
            self._tick_within(_TICK_S)
        elif kind == calls.CONTROL:
            self._obey(wire, calls.said(body))
        else:
            self._calls.heed(wire, kind, call, a, body)

    def _obey(self, wire: loop.Wire, said: dict[str, Any]) -> None:
        if said["is"] == "hello":
            self._is_to_leave = False
            self._greet(wire)
        elif said["is"] in ("leave", "stay"):
            self._is_to_leave = said["is"] == "leave"
            wire.say(calls.control("so"))
        elif said["is"] == "fork":
            self._zygotes.fork(wire, str(said["zygote"]), str(said["job"]), str(said.get("kills", "")))
        elif said["is"] == "idle":
            found = self._instances.get(int(said["instance"]))
            if found:
                found.idle_s = float(said["idle_s"])
        elif said["is"] == "end":
            found = self._instances.get(int(said["instance"]))
            if found:
                self._leave(found, "it is not wanted any more")

    def _greet(self, wire: loop.Wire) -> None:
        if self._router:
            self._router.close(is_quiet=True)
        self._router = wire
        known = self._calls.known.listed()
        for at in range(0, len(known), _TOLD_AT_ONCE):
            wire.say(calls.control("calls", calls=known[at : at + _TOLD_AT_ONCE]))
        wire.say(calls.control("hello", protocol=calls.PROTOCOL, host=self._name))
        for one in self._instances.values():
            if one.is_ready and not one.is_leaving:
                self._say_ready(one)
        self._calls.resume()

    def _say(self, frame: bytes) -> None:
        if self._router:
            self._router.say(frame)

    def _say_ready(self, one: Instance) -> None:
        if self._router and not one.is_told:
            one.is_told, one.used = True, self._loop.now
        self._say(calls.control("ready", instance=one.number, job=one.job, busy=len(one.calls), ahead=one.may_be_ahead))

    # Instances.

    def _accept_instance(self, connection: socket.socket) -> None:
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        found: list[Instance] = []
        zygote: list[str] = []
        wire: loop.Wire

        def heed(kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
            if found:
                self._heed_instance(found[0], kind, flags, call, body)
            elif zygote:
                self._zygotes.heed(calls.said(body))
            elif calls.said(body).get("zygote"):
                job, _ = admitting.admit(self._directory, calls.said(body))
                self._zygotes.add(job, wire)
                zygote.append(job)
                known()
            else:
                found.append(self._greeted(wire, pid, calls.said(body)))
                known()

        def lost(_: str) -> None:
            if found:
                self._lost(found[0])
            if zygote:
                self._zygotes.lost(zygote[0])
            known()

        def known() -> None:
            self._strangers.pop(wire, None)

        wire = loop.Wire(self._loop, connection, heed, lost, is_shared=True)
        self._strangers[wire] = self._loop.now
        if len(self._strangers) > _STRANGERS_MAX:
            next(iter(self._strangers)).close("others want to say who they are")

    def _greeted(self, wire: loop.Wire, pid: int, said: dict[str, Any]) -> Instance:
        """An instance.  Raises ValueError, LookupError."""
        job, about = admitting.admit(self._directory, said)
        owner = str(about.get("zygote_of") or job)  # whose container it is in
        if any(one.job == job for one in self._instances.values()) or (owner != job and not self._zygotes.is_wanted(job)):
            raise ValueError("that job is another process")
        self._numbers += 1
        kills = self._zygotes.came(job, pid)
        jobs = os.path.join(self._directory, "jobs")
        outcome = os.path.join(jobs, job if kills else owner, OUTCOME)
        one = Instance(self._numbers, wire, job, about, os.path.join(jobs, owner, PLACE), pid, kills, outcome)
        self._instances[one.number] = one
        return one

    def _heed_instance(self, one: Instance, kind: int, flags: int, call: bytes, body: bytes) -> None:
        if kind == calls.ANSWER:
            self._calls.answered(one, call, flags, body)
        elif kind == calls.ITEM:
            self._calls.item(one, call, flags, body)
        elif kind == calls.CONTROL:
            said = calls.said(body)
            if said["is"] == "ready":
                one.set_ready(is_serial=bool(said.get("serial")), may_be_ahead=bool(said.get("ahead")))
                self._say_ready(one)
            elif said["is"] == "failed":
                error = {
                    name: str(said["error"].get(name, ""))[:_TEXT_MAX] for name in ("kind", "type", "message", "traceback")
                }
                self._say(calls.control("failed", job=one.job, error=error))

    def _leave(self, one: Instance, why: str) -> None:
        """It gets no more calls, and ends when it has none."""
        if not one.is_leaving:
            one.is_leaving = True
            self._say(calls.control("gone", instance=one.number, reason=why))
        if not one.calls and not one.left_at:
            one.left_at = self._loop.now
            one.wire.say(calls.control("end"))

    def _lost(self, one: Instance) -> None:
        """Its connection has ended: with its process, most likely; else that is ended too, as nothing can reach it any more."""
        if not one.is_leaving:
            one.is_leaving = True
            self._say(calls.control("gone", instance=one.number, reason="its process has ended"))
        self._calls.lost(one)
        self._loop.add(one.process, lambda _: self._ended(one))
        self._loop.at(self._loop.now + _LAST_S, lambda: one.send(signal.SIGKILL))

    def _ended(self, one: Instance) -> None:
        """Its process has ended."""
        del self._instances[one.number]
        self._loop.remove(one.process)
        one.close()

    # Time.

    def _tick_within(self, seconds: float) -> None:
        """Unless that is to be before."""
        when = self._loop.now + seconds
        if when < self._tick_at:
            self._tick_at = when
            self._loop.at(when, self._tick_if_due)

    def _tick_if_due(self) -> None:
        if self._loop.now >= self._tick_at:  # else an earlier one took its place
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self._tick_at = math.inf
        is_busy = False
        while self._strangers and next(iter(self._strangers.values())) < now - _HELLO_S:
            next(iter(self._strangers)).close("it says nothing")
        for one in list(self._instances.values()):
            is_busy = is_busy or bool(one.calls)
            self._mind(one, now)
        self._calls.known.expire(now)
        if self._router or self._instances:
            self._alone_since = now
        if not self._instances and (self._is_to_leave or now > self._alone_since + _ALONE_S):
            self._loop.is_over = True
        self._tick_within(_TICK_S if is_busy else _IDLE_TICK_S)

    def _mind(self, one: Instance, now: float) -> None:
        self._calls.give_up_late(one, now)
        stuck = [call for call in one.calls.values() if call.given_up and call.given_up < now - _GRACE_S]
        if stuck:
            self._leave(one, "its handler does not end")
            if all(call.given_up for call in one.calls.values()):
                one.send(signal.SIGKILL)
        elif one.is_leaving and not one.calls:
            self._leave(one, "")
            if now > one.left_at + _GRACE_S:
                one.send(signal.SIGKILL if now > one.left_at + 2 * _GRACE_S else signal.SIGTERM)
        # One of which no router knows yet is not idle: the call that it was begun for may be on its way.
        idle_s = (one.is_told and one.idle_s) or (0.0 if self._router else _ALONE_S)
        if one.is_ready and not one.calls and not one.is_leaving and 0 < idle_s <= now - one.used:
            self._leave(one, "idle")
