"""The jobs that wait for a worker, in the order in which they are due, and what a turn of the controller does with them."""

from __future__ import annotations

import time

from pool.placement import Placement
from pool.state import CANCELLED, QUEUED, STARTING
from pool.tenants import Usage, tenant_of
from pool.workers import need_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pool.controller import Controller
    from pool.placement import Need, Worker
    from pool.settings import Settings
    from pool.state import Job

_PLACING_S = 0.02


class Waiting:
    """jobs: in order, among them some that have been placed.  may_place: something has changed since all were looked at."""

    def __init__(self, controller: Controller, settings: Settings) -> None:
        self._controller = controller
        self._overcommit, self._is_one_per_boot = settings.overcommit, settings.one_per_boot
        self.jobs: list[Job] = []
        self.may_place = True
        self.is_open = True
        """Whether jobs are started: not by a controller that is there for one question."""
        self._place_from = 0
        self._is_unordered = False

    def add(self, job: Job) -> None:
        """One more."""
        self.jobs.append(job)
        self.may_place = True
        self._is_unordered = self._is_unordered or bool(self._controller.tenants.all)
        if len(self.jobs) > 1 and self.jobs[-2].priority < job.priority:
            self._is_unordered = True

    def usage(self) -> dict[str, Usage]:
        """What each tenant's jobs have for themselves; nothing if there is nobody but the owner."""
        controller = self._controller
        placed = (job for remote in controller.remotes.values() for job in remote.jobs.values())
        return controller.tenants.usage(placed) if controller.tenants.all else {}

    def has_changed(self) -> None:
        """Jobs have come back, or gone: they are put in order when they are looked at next, once for all of a turn."""
        self.may_place, self._is_unordered = True, True

    def put_in_order(self) -> None:
        """All that are queued."""
        self.may_place, self._place_from, self._is_unordered = True, 0, False
        queued = (one for one in self._controller.jobs.values() if one.state == QUEUED)
        self.jobs = self._controller.tenants.in_order(queued, self.usage())

    def place(self) -> dict[str, list[Job]]:
        """Put jobs on workers, as many as fit and as 20 ms allow; those of each worker, which is to be told.

        They are starting in the state when that is on disk.
        """
        controller, turns = self._controller, self._controller.turns
        started: dict[str, list[Job]] = {}
        if not self.is_open or (not self.may_place and not turns.is_due()):
            return started
        turns.seen()
        if self._is_unordered:
            self.put_in_order()
        ready = list(self.free().values()) if self.jobs else []
        if not any(not one.reason for one in ready):
            return started
        placement, began, now = Placement(ready), time.monotonic(), time.time()
        usage, running = self.usage(), turns.running(controller.jobs.values())
        self.may_place = False
        for number in range(self._place_from, len(self.jobs)):
            job = self.jobs[number]
            if time.monotonic() - began > _PLACING_S:
                self.may_place, self._place_from = True, number
                controller.say(controller.wires.wake)  # the rest in the next turn, at once
                break
            if job.state != QUEUED:
                continue
            if turns.waits(job, running):
                self._end_if_hopeless(job)
                continue
            if controller.tenants.over(job, usage):
                continue
            chosen = placement.choose(need_of(job.spec), now - job.submitted_s)
            if chosen is None:
                continue
            _count(job, running, usage)
            controller.state.change(job, state=STARTING, worker=chosen.name, attempt=job.attempt + 1)
            controller.remotes[chosen.name].took(job)
            if self._is_one_per_boot:
                placement.keep(self._siblings(chosen.name))  # they have less now; the next turn knows how much
            started.setdefault(chosen.name, []).append(job)
        else:
            self._place_from = 0
        if not self._place_from:
            self.jobs = [job for job in self.jobs if job.state == QUEUED]
        return started

    def due(self, most: int, fits: Callable[[Need], bool]) -> list[Need]:
        """Of the first jobs that wait for nothing but room, and fit."""
        found: list[Need] = []
        turns, tenants = self._controller.turns, self._controller.tenants
        running, usage = turns.running(self._controller.jobs.values()), self.usage()
        known: dict[Need, bool] = {}
        for job in self.jobs:
            if job.state != QUEUED or turns.waits(job, running) or tenants.over(job, usage):
                continue
            need = need_of(job.spec)
            known[need] = known[need] if need in known else fits(need)
            if not known[need]:
                continue
            _count(job, running, usage)
            found.append(need)
            if len(found) == most:
                break
        return found

    def free(self) -> dict[str, Worker]:
        """What is free, by worker; of workers of one machine, all that the others have not taken, if pool.toml says so."""
        remotes = self._controller.remotes
        found = {remote.name: remote.free(self._overcommit) for remote in remotes.values()}
        for remote in remotes.values():
            for name in self._siblings(remote.name):
                for job in remotes[name].jobs.values():
                    found[remote.name].take(need_of(job.spec))
        return found

    def _siblings(self, name: str) -> list[str]:
        """Other workers on its machine."""
        remotes = self._controller.remotes
        boot = remotes[name].boot_id
        if not self._is_one_per_boot or not boot:
            return []
        return [one.name for one in remotes.values() if one.boot_id == boot and one.name != name]

    def _end_if_hopeless(self, job: Job) -> None:
        """If what it comes after has failed."""
        failed = self._controller.turns.failed_before(job) if job.spec.get("after") else 0
        if failed:
            why = (
                f"job {failed}, after which it comes, has failed" if failed > 0 else f"there is no job {-failed} to come after"
            )
            self._controller.finish(job, CANCELLED, why, has_written=False)


def _count(job: Job, running: dict[int, int], usage: dict[str, Usage]) -> None:
    """One more of its array and of its tenant, for those that are looked at after it."""
    if job.spec.get("at_once"):
        running[job.spec["array"]] = running.get(job.spec["array"], 0) + 1
    usage.setdefault(tenant_of(job), Usage()).add(job.spec)
