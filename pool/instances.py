"""The functions that the router knows, and their instances: which there are to be, from being asked for to their end.

An instance is a job: the controller is asked for it, says what becomes of it, and its host says when it serves.
"""

from __future__ import annotations

import base64
import math
import time

from pool import autoscaling, calls
from pool.controlling import ControllerLink
from pool.routed import Instance, Routed
from pool.settings import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.hostlinks import HostLink
    from pool.router import Router

_PLACE_S = 0.3
_END_S = 30.0
"""A host takes no longer than that to end an instance that does nothing."""


class Instances:
    """Of all functions.  active: those that have something to be looked after."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.functions: dict[tuple[str, str], Routed] = {}
        self._numbers: dict[int, Routed] = {}
        self.active: dict[Routed, None] = {}
        self.jobs: dict[int, Instance] = {}
        self.is_asked = False
        self._freed: dict[int, float] = {}
        """Processors of idle ones that were ended for a job that waits."""

        self.controller = ControllerLink(router.loop, router.directory, self._heed_controller, self._watch)

    def function_of(self, link: HostLink, known: tuple[str, int, str]) -> Routed | None:
        """Whose call that is which a host knows, as in `HostLink.known`; None if there is no such function any more."""
        one = link.instances.get(known[1])
        return one.function if one else next((fn for fn in self.functions.values() if known[2] in fn.identities()), None)

    def _watch(self) -> None:
        hosts = {*self._router.links, *self._router.spawned.workers()}
        self.controller.ask("watch", self._watched, hosts=sorted(hosts))

    def _watched(self, said: dict[str, Any]) -> None:
        """All that there is: at the beginning, and when there is a controller again."""
        if "error" in said:
            return
        self._router.pool.id = said["pool"]
        self._router.callers.settle(read(self._router.directory))
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in self.functions}
        for row in said["functions"]:
            rows.setdefault((row["tenant"], row["name"]), []).append(row)
        for (tenant, name), found in rows.items():
            self._set_function(tenant, name, found)
        there = {one["id"] for one in said["jobs"]}
        for job in set(self.jobs) - there:
            self._job({"id": job, "state": "finished", "code": None, "reason": "its job has ended"})
        for one in said["jobs"]:
            self._job(one)
        if not self.is_asked:
            for worker, address in said["hosts"].items():
                self._router.link(worker, address)
            self._router.take_up()
        self.is_asked = True
        for fn in self.functions.values():
            self._try_again(fn)

    def _try_again(self, fn: Routed) -> None:
        """A version that is tried, while there was no controller: how its first instance has done, or another one."""
        if not fn.trying:
            return
        first = [one for one in self.jobs.values() if one.function is fn and one.version == fn.trying]
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
        elif kind == "room":
            self._make_room_for(int(said["job"]), float(said["cpus"]))
        elif kind == "end":
            self._router.end()

    def _set_function(self, tenant: str, name: str, rows: list[dict[str, Any]]) -> None:
        """What versions of it there are; none: it is removed."""
        key = tenant, name
        fn = self.functions.get(key)
        if not rows:
            return self._remove(key) if fn else None
        if fn is None:
            number = len(self._numbers) + 1
            fn = self.functions[key] = self._numbers[number] = Routed(tenant, name, number)
        fn.specs = {row["version"]: row["spec"] for row in rows}
        current = next((row["version"] for row in rows if row["state"] == "current"), 0)
        trying = next((row["version"] for row in rows if row["state"] == "trying"), 0)
        if fn.identity and fn.identity != fn.identity_of(fn.version):  # it was removed, and is another now
            fn.version, fn.identity = 0, ""
            for one in [one for one in self.jobs.values() if one.function is fn]:
                self._retire(one)
            fn.ready = []
        if current and current != fn.version:
            self._switch(fn, current)
        if trying and trying != fn.trying:
            self._submit(fn, trying, is_first=True)
        fn.trying = trying
        while fn.queue and not current and not trying:
            self._router.fail(fn.queue.pop(), "start", "its first instance has not started")
        if fn.bounds.least:
            self.active[fn] = None

    def _switch(self, fn: Routed, version: int) -> None:
        """Calls go to that version from now on; what runs on the one before may end."""
        fn.set_version(version)
        old = fn.ready + [one for one in fn.starting.values() if one.identity != fn.identity]
        fn.ready = []
        for one in old:
            self._retire(one)
        for one in self.jobs.values():
            is_right = one.function is fn and one.identity == fn.identity and one.is_ready and not one.is_leaving
            if is_right and one not in fn.ready:
                fn.ready.append(one)
        self.active[fn] = None
        self._router.dispatch(fn)

    def _remove(self, key: tuple[str, str]) -> None:
        fn = self.functions.pop(key)
        fn.is_gone = True
        while fn.queue:
            self._router.fail(fn.queue.pop(), "function", f"function {fn.name} was removed")
        for one in [one for one in self.jobs.values() if one.function is fn]:
            self._retire(one)
        fn.ready = []

    def _retire(self, one: Instance) -> None:
        """It gets no more calls; it ends when it has none."""
        one.function.starting.pop(one.job, None)
        one.leave()
        if one.is_ready and one.link:
            one.link.say(calls.control("end", instance=one.number))
            one.function.retiring.append(one)
        else:
            self._cancel(one.job)

    def _cancel(self, *jobs: int, grace_s: float = 0) -> None:
        self.controller.ask("cancel", lambda _: None, ids=jobs, grace_s=grace_s)

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
            if fn.is_gone:
                return self._cancel(said["ids"][0])
            self._adopt(said["ids"][0], fn, version, is_first=is_first)

        self.controller.ask("submit", then, jobs=[{"spec": spec, "key": None, "hold": False}])
        self.active[fn] = None

    def _adopt(self, job: int, fn: Routed, version: int, *, is_first: bool) -> Instance:
        if job in self.jobs:
            return self.jobs[job]
        one = self.jobs[job] = Instance(job, fn, version, is_first=is_first)
        if version == fn.version and not fn.is_gone:
            fn.starting[job] = one
            self.active[fn] = None
        return one

    def _job(self, said: dict[str, Any]) -> None:
        """What has become of the job of an instance."""
        one = self.jobs.get(said["id"])
        if said["state"] in ("finished", "cancelled"):
            if one:
                self._ended(one, said)
            return
        if one is None:
            fn = self.functions.get((said["tenant"], said["fn"]["name"]))
            version = said["fn"]["version"]
            if fn is None or fn.specs.get(version, {}).get("fn", {}).get("id") != said["fn"]["id"]:  # or another of its name
                return self._cancel(said["id"])
            one = self._adopt(said["id"], fn, version, is_first=bool(said["fn"].get("is_first")))
        if said["worker"] and not one.is_placed:
            one.is_placed, one.made = True, time.monotonic()
            if one.link is None:
                one.link = self._router.link(said["worker"], said["address"])

    def _ended(self, one: Instance, said: dict[str, Any]) -> None:
        """Its job has; whatever it still had is answered by the host, or lost."""
        fn = one.function
        del self.jobs[one.job]
        was_starting = fn.starting.pop(one.job, None) is not None or (one.is_first and not one.is_ready)
        self.gone(one)
        fn.retiring = [other for other in fn.retiring if other is not one]
        fn.instance_s += time.monotonic() - one.made if one.is_placed else 0
        one.is_over = True
        self.forget_if_over(one)
        if not (was_starting or one.problem) or fn.is_gone:
            return
        problem = one.problem
        if problem:
            words = f"{problem['type']}: {problem['message']}" if problem.get("type") else str(problem["message"])
            return self._not_started(one, words)
        if said["state"] == "cancelled":
            return self._not_started(one, said.get("reason") or "cancelled")

        def then(found: dict[str, Any]) -> None:
            lines = base64.b64decode(found.get("data", "")).decode(errors="replace").strip().splitlines()
            last = next((line for line in reversed(lines) if ": hint: " not in line), "")
            self._not_started(one, (said.get("reason") or "it ended") + (f": {last}" if last else ""))

        self.controller.ask("read", then, id=one.job, stream="err", offset=0)

    @staticmethod
    def forget_if_over(one: Instance) -> None:
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
        self.controller.ask("function", lambda _: None, what="tried", **fields)

    def _give_up_queue(self, fn: Routed) -> None:
        if fn.is_hopeless and not fn.ready:
            while fn.queue:
                self._router.fail(fn.queue.pop(), "start", f"instances end before they are ready: {fn.problem}")

    def heed_host(self, link: HostLink, said: dict[str, Any]) -> None:
        """What a host says of an instance."""
        kind = said["is"]
        if kind == "ready":
            one = self.jobs.get(int(str(said["job"]).partition(".")[0]))
            if one is None:
                return link.say(calls.control("end", instance=said["instance"]))  # its job is none of ours any more
            one.may_be_ahead = bool(said.get("ahead"))
            self._ready(link, one, int(said["instance"]), int(said["busy"]))
        elif kind == "failed":
            one = self.jobs.get(int(str(said["job"]).partition(".")[0]))
            if one:
                one.problem = {name: str(value)[: 64 << 10] for name, value in said["error"].items()}
        else:
            one = link.instances.get(int(said["instance"]))
            if one and kind == "gone":
                self.gone(one)
            elif one and kind == "freed":
                one.busy = max(one.busy - 1, 0)
                self._router.dispatch(one.function)

    def _ready(self, link: HostLink, one: Instance, number: int, busy: int) -> None:
        fn = one.function
        one.busy = max(busy - len(one.calls), 0)
        one.link, one.number = link, number
        link.instances[number] = one
        one.idle_s = -1.0
        if one.is_ready:
            if one.is_leaving:
                link.say(calls.control("end", instance=number))
            return self._router.dispatch(fn)
        one.is_ready = True
        fn.started(one, time.monotonic())
        fn.starting.pop(one.job, None)
        if one.identity and one.identity == fn.identity:
            fn.ready.insert(0, one)
            self.active[fn] = None
            self._router.dispatch(fn)
        elif one.is_first and one.version == fn.trying:
            self._tried(fn, one.version, "")
        else:
            self._retire(one)

    def gone(self, one: Instance) -> None:
        """It gets no more calls."""
        one.leave()
        if one in one.function.ready:
            one.function.ready.remove(one)
            one.function.retiring.append(one)

    def lost(self, one: Instance) -> None:
        """Its host is no more."""
        self.gone(one)
        if one.job in self.jobs:
            self._cancel(one.job)

    def mind_starts(self, now: float) -> None:
        """Instances that are not ready in time."""
        for one in self.jobs.values():
            spec = one.function.specs.get(one.version)
            limit_s = spec["fn"]["start_s"] if spec else 0.0
            if one.is_placed and not one.is_ready and not one.problem and now > one.made + limit_s:
                one.problem = {"type": "", "message": "it was not ready in time"}
                self._cancel(one.job, grace_s=1)

    def mind_ends(self, now: float) -> None:
        """Instances whose hosts have not ended them, although they are to end: their jobs are cancelled."""
        for one in self.jobs.values():
            if one.is_leaving and one.is_ready and not one.calls and max(one.left_at, one.used) < now - _END_S:
                one.left_at = math.inf  # once
                self._cancel(one.job, grace_s=1)

    def make_room(self, now: float) -> None:
        """An instance that has waited for a place for a moment gets that of one that is idle."""
        for one in self.jobs.values():
            if not one.is_placed and one.made < now - _PLACE_S and one.freed_cpus < _cpus(one):
                one.freed_cpus += self._end_idle()
                return

    def _make_room_for(self, job: int, cpus: float) -> None:
        """The same for a plain job, of which the controller tells."""
        if self._freed.get(job, 0.0) < cpus:
            self._freed = {job: self._freed.get(job, 0.0) + self._end_idle()}

    def _end_idle(self) -> float:
        """The idle instance that was used least lately is ended; its processors, 0 if there is none."""
        idle = []
        for fn in self.functions.values():
            many = len(fn.ready) - autoscaling.floor(fn.seen(), fn.bounds)
            idle += [one for one in fn.ready[: max(many, 0)] if not one.load] if not fn.queue else []
        if not idle:
            return 0.0
        one = min(idle, key=lambda one: one.used)
        assert one.link
        one.link.say(calls.control("end", instance=one.number))
        return max(_cpus(one), 0.01)

    def mind(self, fn: Routed, now: float) -> None:
        if fn.ready:
            fn.served = now
        limit = now - fn.timeout_s if fn.served < now - fn.timeout_s else 0.0  # while it is served, a call may wait its turn
        for call in [one for one in fn.queue if 0 < one.deadline <= now or (not one.deadline and one.came < limit)]:
            fn.queue.remove(call)
            self._router.fail(call, "timeout", "the call waited too long for an instance")
        self._router.dispatch(fn)
        if fn.is_gone:
            self.active.pop(fn)
            return
        self.scale(fn, now)
        self._set_idle(fn)
        if not (fn.queue or fn.ready or fn.starting or fn.retiring or fn.submitting or fn.bounds.least):
            self.active.pop(fn)

    def scale(self, fn: Routed, now: float) -> None:
        if not fn.version or now < fn.blocked_until or not self.controller.is_open:
            return
        seen = fn.seen()
        for _ in range(autoscaling.to_start(seen, fn.bounds)):
            self._submit(fn, fn.version)
        if not fn.queue and len(fn.ready) + len(fn.starting) > autoscaling.floor(seen, fn.bounds):
            waiting = [one.job for one in fn.starting.values() if not one.is_placed]
            if waiting:  # nobody needs them any more, and they have no place yet
                self._cancel(*waiting)
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
