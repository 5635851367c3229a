"""The function host of a worker: between the router and the instances that serve calls.  cpool-function(7), FUNCTION HOST.

Part of the agent's program: standard library only, Python 3.9.  A process of its own: calls and heartbeats do not wait for each
other, and an agent that ends disturbs no call.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import time
from collections import OrderedDict

from pool import calls, loop, sockets, values
from pool.hosted import DONE, PLACE, RUNNING, Call, Instance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICK_S, _IDLE_TICK_S = 0.1, 1.0
_GRACE_S = 10.0
_ALONE_S = 600.0
_KEPT_BYTES, _KEPT_MANY = 64 << 20, 100_000
_GONE_MANY = 200_000
_TEXT_MAX = 64 << 10
_STRANGERS_MAX, _HELLO_S = 64, 10.0
"""Connections that have not said whose they are, and how long they may take."""

_FILES_SHARE = 128
"""So many bytes of an answer in a file count as one in memory."""

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
        self._zygotes: dict[str, loop.Wire] = {}
        self._forks: dict[str, tuple[loop.Wire, str]] = {}
        """Who waits for the process of a job that is to be forked, and from which zygote."""

        self._calls: dict[bytes, Call] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._kept_bytes = 0
        self._gone: OrderedDict[bytes, float] = OrderedDict()
        """Calls that were answered, and whose answers are not kept any more."""

        self._strangers = 0
        self._numbers = 0
        self._alone_since = time.monotonic()
        self._tick_at, self._is_to_leave = math.inf, False
        values.clear(os.path.join(self._place, "kept"))
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
            for job in [job for job, (waits, _) in self._forks.items() if waits is wire]:
                del self._forks[job]  # a process that still comes is not wanted any more

        wire = loop.Wire(self._loop, connection, heed, lost, is_shared=True)

    def _heed_router(self, wire: loop.Wire, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.CALL:
            self._begin(flags, call, a, b, body)
        elif kind == calls.CONTROL:
            self._obey(wire, calls.said(body))
        elif kind == calls.CANCEL:
            found = self._calls.get(call)
            if found and not found.done:
                self._give_up(found, "cancelled", "the call was cancelled")
        elif kind == calls.ASK:
            found = self._calls.get(call)
            if found is None:
                wire.say(calls.failed(call, "unknown", "outcome unknown: nothing is known of it any more"))
            elif found.done:
                wire.say(found.answer)
            else:
                self._ask_for_pieces(found)
        elif kind == calls.WANT:
            wire.say(self._piece(call, a))
        elif kind == calls.PIECE:
            found = self._calls.get(call)
            if found and found.pull:
                self._pulled(found, a, body)
        elif kind == calls.MORE:
            found = self._calls.get(call)
            if found and not found.done:
                found.credit += a
                found.instance.wire.say(calls.frame(calls.MORE, call, a=a))
        elif kind == calls.FORGET:
            found = self._calls.get(call)
            if found and found.done:
                self._forget(found)

    def _piece(self, call: bytes, number: int) -> bytes:
        found = self._calls.get(call)
        try:
            if found and found.result:
                return found.result.piece(call, number)
        except OSError:
            pass
        return calls.failed(call, "unknown", "its answer is not kept any more")

    def _ask_for_pieces(self, call: Call) -> None:
        """Those that were under way when a router, or a connection, was lost."""
        for piece in call.pull.asked() if call.pull else ():
            self._say(calls.frame(calls.WANT, call.id, a=piece))

    def _obey(self, wire: loop.Wire, said: dict[str, Any]) -> None:
        if said["is"] == "hello":
            self._is_to_leave = False
            self._greet(wire)
        elif said["is"] in ("leave", "stay"):
            self._is_to_leave = said["is"] == "leave"
            wire.say(calls.control("so"))
        elif said["is"] == "fork":
            self._fork(wire, str(said["zygote"]), str(said["job"]))
        elif said["is"] == "idle":
            found = self._instances.get(int(said["instance"]))
            if found:
                found.idle_s = float(said["idle_s"])
        elif said["is"] == "end":
            found = self._instances.get(int(said["instance"]))
            if found:
                self._leave(found, "it is not wanted any more")

    def _fork(self, wire: loop.Wire, zygote: str, job: str) -> None:
        """An agent wants one more instance of what a zygote has loaded."""
        there = self._zygotes.get(zygote)
        if there is None:
            return wire.say(calls.control("refused"))
        with open(os.path.join(self._directory, "jobs", job, PLACE, "token"), encoding="ascii") as file:
            token = file.read().split()[1]
        self._forks[job] = wire, zygote
        there.say(calls.control("fork", job=job, token=token))

    def _greet(self, wire: loop.Wire) -> None:
        if self._router:
            self._router.close(is_quiet=True)
        self._router = wire
        known = [[call.id.hex(), DONE if call.done else RUNNING, call.instance.number] for call in self._calls.values()]
        known += [[call.hex(), DONE, 0] for call in self._gone]
        for at in range(0, len(known), _TOLD_AT_ONCE):
            wire.say(calls.control("calls", calls=known[at : at + _TOLD_AT_ONCE]))
        wire.say(calls.control("hello", protocol=calls.PROTOCOL, host=self._name))
        for one in self._instances.values():
            if one.is_ready and not one.is_leaving:
                self._say_ready(one)
        for call in self._calls.values():
            self._ask_for_pieces(call)

    def _say(self, frame: bytes) -> None:
        if self._router:
            self._router.say(frame)

    def _say_ready(self, one: Instance) -> None:
        self._say(calls.control("ready", instance=one.number, job=one.job, busy=len(one.calls), ahead=one.may_be_ahead))

    # Calls.

    def _begin(self, flags: int, call: bytes, number: int, ms: int, body: bytes) -> None:
        known = self._calls.get(call)
        if known:
            if known.done:
                self._say(known.answer)
            return
        if call in self._gone:
            return self._say(calls.failed(call, "unknown", "it was done, and its answer is not kept any more"))
        one = self._instances.get(number)
        if one is None or one.is_leaving:
            self._say(calls.frame(calls.BOUNCE, call))
            return
        limit_s = ms / 1000 if ms else one.timeout_s
        found = Call(call, one, self._loop.now + limit_s)
        self._calls[call] = one.calls[call] = found
        self._tick_soon()
        if flags & calls.REFERENCE:
            try:
                found.pull = values.Pull(os.path.join(one.directory, "in"), call.hex(), body, flags)
            except (OSError, ValueError, LookupError, TypeError) as error:
                return self._answer(found, calls.ERROR, calls.error("raised", f"the value cannot be taken: {error}", "OSError"))
            for piece in found.pull.first():
                self._say(calls.frame(calls.WANT, call, a=piece))
            if found.pull.is_whole:
                self._whole(found)
            return
        found.has_begun = True
        one.wire.say(calls.frame(calls.CALL, call, body, flags=flags, b=int(limit_s * 1000)))

    def _pulled(self, call: Call, piece: int, data: bytes) -> None:
        """A piece of its value has come."""
        assert call.pull
        try:
            following = call.pull.take(piece, data)
        except (OSError, ValueError) as error:
            return self._answer(call, calls.ERROR, calls.error("raised", f"the value cannot be taken: {error}", "OSError"))
        if following is not None:
            self._say(calls.frame(calls.WANT, call.id, a=following))
        elif call.pull.is_whole:
            self._whole(call)

    def _whole(self, call: Call) -> None:
        """Its value is there."""
        assert call.pull
        ms = max(int((call.deadline - self._loop.now) * 1000), 1)
        call.instance.wire.say(calls.frame(calls.CALL, call.id, call.pull.reference(), flags=call.pull.flags, b=ms))
        call.has_begun = True
        call.instance.calls.move_to_end(call.id)  # they are in the order in which they were given

    def _answer(self, call: Call, flags: int, body: bytes) -> None:
        """What the caller gets; it is kept for a while."""
        call.answer = calls.frame(calls.ANSWER, call.id, body, flags=flags, a=call.items)
        call.done = self._loop.now
        if call.pull:
            call.pull.remove()
            call.pull = None
        if not flags & calls.BUSY:
            one = call.instance
            one.calls.pop(call.id, None)
            one.used = self._loop.now
        weight = len(call.answer) + (call.result.size // _FILES_SHARE if call.result else 0)
        self._kept[call.id] = weight
        self._kept_bytes += weight
        while self._kept_bytes > _KEPT_BYTES or len(self._kept) > _KEPT_MANY:
            oldest = self._calls[next(iter(self._kept))]
            self._gone[oldest.id] = oldest.done
            self._forget(oldest)
        while len(self._gone) > _GONE_MANY:
            self._gone.popitem(last=False)
        self._say(call.answer)

    def _forget(self, call: Call) -> None:
        self._kept_bytes -= self._kept.pop(call.id, 0)
        self._calls.pop(call.id, None)
        if call.result:
            call.result.remove()

    def _give_up(self, call: Call, kind: str, message: str) -> None:
        """Answer for the handler, and tell it."""
        one = call.instance
        is_first = next((other.id for other in one.calls.values() if other.has_begun), b"") == call.id
        self._answer(call, calls.ERROR | (calls.BUSY if call.has_begun else 0), calls.error(kind, message))
        if not call.has_begun:
            return
        call.given_up = self._loop.now
        one.wire.say(calls.frame(calls.CANCEL, call.id))
        if one.is_serial and is_first:
            one.wire.flush()
            one.send(signal.SIGUSR1)

    # Instances.

    def _accept_instance(self, connection: socket.socket) -> None:
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if self._strangers >= _STRANGERS_MAX:
            return connection.close()
        self._strangers += 1
        found: list[Instance] = []
        zygote: list[str] = []
        wire: loop.Wire

        def heed(kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
            if found:
                self._heed_instance(found[0], kind, flags, call, a, body)
            elif zygote:
                self._refused(calls.said(body))
            elif calls.said(body).get("zygote"):
                job = self._check(calls.said(body))[0]
                if job in self._zygotes:
                    raise ValueError("there is one")
                zygote.append(job)
                self._zygotes[job] = wire
                known(None)
            else:
                found.append(self._greeted(wire, pid, calls.said(body)))
                known(None)

        def lost(_: str) -> None:
            if found:
                self._lost(found[0])
            if zygote:
                del self._zygotes[zygote[0]]
                for job in [job for job, (_, whose) in self._forks.items() if whose == zygote[0]]:
                    self._refused({"is": "refused", "job": job})
            known(None)

        def known(_: object) -> None:
            if strangers:
                self._strangers -= strangers.pop()

        def late() -> None:
            if strangers:
                wire.close("it says nothing")

        strangers = [1]
        wire = loop.Wire(self._loop, connection, heed, lost)
        self._loop.at(time.monotonic() + _HELLO_S, late)

    def _refused(self, said: dict[str, Any]) -> None:
        """A zygote cannot be forked."""
        waits = self._forks.pop(str(said["job"]), None) if said["is"] == "refused" else None
        if waits:
            waits[0].say(calls.control("refused"))

    def _greeted(self, wire: loop.Wire, pid: int, said: dict[str, Any]) -> Instance:
        """An instance.  Raises ValueError, LookupError."""
        job, about = self._check(said)
        owner = str(about.get("zygote_of") or job)  # whose container it is in
        if any(one.job == job for one in self._instances.values()) or (owner != job and job not in self._forks):
            raise ValueError("that job is another process")
        self._numbers += 1
        one = Instance(self._numbers, wire, job, about, os.path.join(self._directory, "jobs", owner, PLACE), pid)
        self._instances[one.number] = one
        waits = self._forks.pop(job, None)
        if waits:
            waits[0].say(calls.control("forked", pid=pid))
        return one

    def _check(self, said: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """(job, what its agent has written of it) of who says whose it is, and knows what only that can know.

        Raises ValueError, LookupError.
        """
        job = str(said["job"])
        if said["is"] != "hello" or not job.replace(".", "", 1).isdigit():
            raise ValueError("no hello")
        directory = os.path.join(self._directory, "jobs", job, PLACE)
        try:
            with open(os.path.join(directory, "token"), encoding="ascii") as file:
                wanted = file.read().split()[1]
            with open(os.path.join(self._directory, "jobs", job, "about.json"), encoding="utf-8") as file:
                about = json.load(file)
        except OSError as error:
            raise ValueError("no such job") from error
        if said["token"] != wanted:
            raise ValueError("not the job that it says")
        return job, about

    def _heed_instance(self, one: Instance, kind: int, flags: int, call: bytes, a: int, body: bytes) -> None:
        found = one.calls.get(call)
        if kind == calls.ANSWER:
            if found is None:
                return  # it was never asked for
            if found.given_up:
                del one.calls[call]
                one.used = self._loop.now
                return self._say(calls.control("freed", instance=one.number))
            if flags & calls.REFERENCE:
                return self._kept_answer(found, flags, body)
            self._answer(found, flags & (calls.ERROR | calls.BYTES | calls.STREAM), body)
        elif kind == calls.ITEM:
            if found and not found.given_up:
                if flags & calls.REFERENCE or found.credit <= 0:
                    raise ValueError("an item that nobody has asked for")
                found.credit -= 1
                found.items += 1
                self._say(calls.frame(calls.ITEM, call, body, flags=flags & calls.BYTES))
        elif kind == calls.CONTROL:
            said = calls.said(body)
            if said["is"] == "ready":
                one.is_ready, one.is_serial, one.used = True, bool(said.get("serial")), self._loop.now
                one.may_be_ahead = bool(said.get("ahead"))
                self._say_ready(one)
            elif said["is"] == "failed":
                error = {
                    name: str(said["error"].get(name, ""))[:_TEXT_MAX] for name in ("kind", "type", "message", "traceback")
                }
                self._say(calls.control("failed", job=one.job, error=error))

    def _kept_answer(self, call: Call, flags: int, body: bytes) -> None:
        """A large one, in a file that the instance has left."""
        try:
            place = os.path.join(self._place, "kept")
            call.result = values.Kept(os.path.join(call.instance.directory, "out"), place, call.id.hex(), body)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return self._answer(call, calls.ERROR, calls.error("protocol", f"the answer cannot be taken: {error}"))
        self._answer(call, flags & (calls.BYTES | calls.REFERENCE | calls.STREAM), call.result.reference())

    def _leave(self, one: Instance, why: str) -> None:
        """It gets no more calls, and ends when it has none."""
        if not one.is_leaving:
            one.is_leaving = True
            self._say(calls.control("gone", instance=one.number, reason=why))
        if not one.calls and not one.left_at:
            one.left_at = self._loop.now
            one.wire.say(calls.control("end"))

    def _lost(self, one: Instance) -> None:
        """Its process has ended: the calls that it had begun fail, those that were sent ahead go elsewhere."""
        self._instances.pop(one.number, None)
        os.close(one.process)
        if not one.is_leaving:
            one.is_leaving = True
            self._say(calls.control("gone", instance=one.number, reason="its process has ended"))
        begun = [call.id for call in one.calls.values() if call.has_begun][: one.concurrency if one.may_be_ahead else None]
        for call in list(one.calls.values()):
            if call.done:
                one.calls.pop(call.id)
            elif call.id in begun:
                self._answer(call, calls.ERROR, calls.error("died", "the handler's process has ended in the call"))
            else:
                call.pull.remove() if call.pull else None
                del self._calls[call.id]
                self._say(calls.frame(calls.BOUNCE, call.id))

    # Time.

    def _tick_soon(self) -> None:
        self._tick_within(_TICK_S)

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
        for one in list(self._instances.values()):
            is_busy = is_busy or bool(one.calls)
            self._mind(one, now)
        while self._kept and self._calls[next(iter(self._kept))].done < now - calls.KEPT_S:
            self._forget(self._calls[next(iter(self._kept))])
        while self._gone and next(iter(self._gone.values())) < now - calls.KEPT_S:
            self._gone.popitem(last=False)
        if self._router or self._instances:
            self._alone_since = now
        if not self._instances and (self._is_to_leave or now > self._alone_since + _ALONE_S):
            self._loop.is_over = True
        self._tick_within(_TICK_S if is_busy else _IDLE_TICK_S)

    def _mind(self, one: Instance, now: float) -> None:
        for call in [call for call in one.calls.values() if call.deadline <= now and not call.done]:
            self._give_up(call, "timeout", "the call took too long")
        stuck = [call for call in one.calls.values() if call.given_up and call.given_up < now - _GRACE_S]
        if stuck:
            self._leave(one, "its handler does not end")
            if all(call.given_up for call in one.calls.values()):
                one.send(signal.SIGKILL)
        elif one.is_leaving and not one.calls:
            self._leave(one, "")
            if now > one.left_at + _GRACE_S:
                one.send(signal.SIGKILL if now > one.left_at + 2 * _GRACE_S else signal.SIGTERM)
        idle_s = one.idle_s or (0.0 if self._router else _ALONE_S)
        if one.is_ready and not one.calls and not one.is_leaving and 0 < idle_s <= now - one.used:
            self._leave(one, "idle")
