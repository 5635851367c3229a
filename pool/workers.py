"""A worker as the controller sees it: its link, what it has last said, and what is on it."""

from __future__ import annotations

import time

from pool import frames
from pool.placement import Need, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable
    from typing import Any

    from pool.state import Job

SUSPECT_S, LOST_S = 6.0, 30.0
_AGAIN_S, _AGAIN_MAX_S = 0.5, 30.0
_IMAGES_MAX = 200
_SLACK = 512 << 20
_GRACE_S = 15.0
_ASIDE_S, _ASIDE_MAX_S, _STUCK = 1.0, 30.0, 5
_UNABLE_S = 300.0
_AT_ONCE_S = 1.0
STRICT_S = 60.0
"""A job that is never to run twice at once ends itself when no controller was heard for so long."""

_NEW_S, _AGAIN_NEW_S = 300.0, 2.0
"""One that may be booting is tried more often."""

CONNECTING, READY, SUSPECT, LOST = "connecting", "ready", "suspect", "lost"


class Remote:
    """name, address: of the host.  link: None while there is none.  jobs: what we have put there and has not ended, by id."""

    def __init__(self, name: str, address: str, labels: Iterable[str] = (), *, is_draining: bool) -> None:
        self.name = name
        self.labels = frozenset(labels)
        self.address = address
        self.is_draining = is_draining
        self.link: socket.socket | None = None
        self.is_opening = self.is_gone = False
        self.has_greeted = False
        self.reader = frames.Reader()
        self.unsent = bytearray()
        self.report: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.problem = ""
        self.jobs: dict[int, Job] = {}
        self.try_after = 0.0
        self._failures = 0
        self.images: dict[str, None] = {}
        """Digests of those that ran there, the latest last."""
        self.setup_after, self.setup_failures = 0.0, 0
        """When what runs images is to be brought there, if it is not there then."""
        self.setup_problem = ""
        self.unable, self._unable_until = "", 0.0
        """Why a job in an image could not run there, whatever it was, and until when none goes there."""
        self.known: frozenset[tuple[int, int]] = frozenset()
        """(id, attempt) of all jobs that it knew when it was connected."""
        self.failed_in_a_row = 0
        self.fails_since_s = self.did_well_s = -1.0
        """When the first of these has ended, and the last job that did not fail."""
        self.aside, self._aside_until, self._refusals = "", 0.0, 0
        """Why nothing could be started there the last time, and until when nothing is tried."""
        self.boot_id = ""
        self.placed: dict[int, float] = {}
        """When jobs were put there, by our clock."""
        self._made = time.monotonic()

    @property
    def state(self) -> str:
        """By this controller's own clock, from the last report or its own beginning."""
        silent_s = time.monotonic() - self.heard
        if silent_s > LOST_S:
            return LOST
        if not self.report:
            return CONNECTING
        return SUSPECT if silent_s > SUSPECT_S or not self.has_greeted else READY

    def is_lost_for(self, job: Job) -> bool:
        """Whether a job is to be done again: a strict one not before it has ended itself."""
        silent_s = time.monotonic() - self.heard
        return silent_s > LOST_S + (STRICT_S + _GRACE_S if job.spec.get("strict") else 0)

    @property
    def has_reported(self) -> bool:
        """Whether it is connected, and has said what is free."""
        return self.has_greeted and bool(self.report)

    @property
    def reason(self) -> str:
        """Why no job goes there, '' if one may."""
        if self.is_draining:
            return "is drained"
        if self.report.get("notice"):
            return "is about to be taken away by its cloud"
        if self.is_aside:
            return f"cannot start jobs: {self.aside}"
        return "" if self.state == READY else f"is {self.state}" + (f" ({self.problem})" if self.problem else "")

    @property
    def is_aside(self) -> bool:
        """Whether it is passed over for a while."""
        return time.monotonic() < self._aside_until

    @property
    def is_stuck(self) -> bool:
        """Whether it has been put aside again and again: it is not to be counted on."""
        return self._refusals >= _STUCK

    def refused(self, problem: str) -> None:
        """It cannot start a job, whatever that is: others get them, and it is tried again, later each time."""
        self.aside = problem
        if not self.is_aside:  # those that were under way together count once
            self._refusals += 1
            self._aside_until = time.monotonic() + min(_ASIDE_S * 2 ** (self._refusals - 1), _ASIDE_MAX_S)

    def cannot_run_images(self, problem: str) -> None:
        """As a job has shown."""
        self.unable, self._unable_until = problem, time.monotonic() + _UNABLE_S

    def has_ended(self, job: Job, wall_s: float) -> None:
        """A job, there."""
        code = job.code
        if not code and job.spec["image"]:
            self.unable, self._unable_until = "", 0.0
        if not code:
            self.did_well_s = time.monotonic()
        is_failure = code and wall_s < _AT_ONCE_S
        if is_failure and not self.failed_in_a_row:
            self.fails_since_s = time.monotonic()
        self.failed_in_a_row = self.failed_in_a_row + 1 if is_failure else 0

    def has_started(self) -> None:
        """A job, well."""
        self.aside, self._aside_until, self._refusals = "", 0.0, 0

    def connected(self, link: socket.socket) -> None:
        """There is a way to it."""
        link.setblocking(False)
        self.link, self.is_opening, self.has_greeted = link, False, False
        self.reader, self.unsent, self.problem = frames.Reader(), bytearray(), ""

    def took(self, job: Job) -> None:
        """A job was put there."""
        self.jobs[job.id] = job
        self.placed = {number: when for number, when in self.placed.items() if number in self.jobs}
        self.placed[job.id] = time.monotonic()
        image = str(job.spec["image"])
        if image:
            self.images.pop(image, None)
            self.images[image] = None
            if len(self.images) > _IMAGES_MAX:
                del self.images[next(iter(self.images))]

    def waits_s(self, job: Job) -> float:
        """How long it is that a job was put there, as far as this controller knows."""
        return time.monotonic() - self.placed.setdefault(job.id, time.monotonic())

    @property
    def may_be_set_up(self) -> bool:
        """Whether jobs in images could run there if what they need is brought."""
        is_due = time.monotonic() >= self.setup_after
        return bool(self.address) and self.has_reported and bool(self.report["images"]) and is_due

    def failed(self, problem: str) -> None:
        """There is none, or none any more; the next try comes later the more have failed."""
        if self.link:
            self.link.close()
        self.link, self.is_opening, self.has_greeted = None, False, False
        self.problem = problem
        is_new = not self.report and time.monotonic() - self._made < _NEW_S
        self.try_after = time.monotonic() + min(_AGAIN_S * 2**self._failures, _AGAIN_NEW_S if is_new else _AGAIN_MAX_S)
        self._failures += 1

    def reported(self, said: dict[str, Any]) -> None:
        """What it says is a stranger's until it is checked."""
        numbers = ("cpus", "memory", "free_memory", "free_disk", "load", "gpus", "running")
        found = {name: said[name] for name in numbers}
        if not all(is_amount(value) for value in found.values()):
            raise ValueError("a report of what is no number")
        self.report = {**found, "images": str(said["images"])[:200], "arch": str(said["arch"])[:40]}
        self.report |= {"notice": bool(said.get("notice")), "toolkit": str(said.get("toolkit", ""))[:40]}
        self.heard = time.monotonic()
        self._failures = 0

    def free(self, overcommit: float = 1.0) -> Worker:
        """For placement.  overcommit: processors that are given away for each that there is.

        What is measured already has what jobs use; of those that were put there since, all that they may use is taken off.
        """
        report = self.report or {"cpus": 0, "memory": 0, "gpus": 0, "images": ""}
        every = report["cpus"] * overcommit, int(report["memory"]), int(report["gpus"])
        images = not report["images"] and time.monotonic() >= self._unable_until
        found = Worker(self.name, *every, *every, images=images, labels=self.labels, reason=self.reason)
        found.has, found.load = frozenset(self.images), report.get("load", 0.0) / (report["cpus"] or 1)
        for job in self.jobs.values():
            found.take(need_of(job.spec))
        new = [
            need_of(self.jobs[number].spec) for number, when in self.placed.items() if when > self.heard and number in self.jobs
        ]
        slack = max(int(report["memory"]) // 20, _SLACK)  # what the system itself has, also where nothing runs
        found.measured_memory = report.get("free_memory", 0) + slack - sum(need.memory for need in new)
        found.measured_disk = report.get("free_disk", 0) - sum(need.disk for need in new)
        return found

    def shown(self) -> dict[str, Any]:
        """As `cpool nodes` prints it."""
        free = self.free()
        state = "draining" if self.is_draining else "failing" if self.is_aside else self.state
        problem = f"cannot start jobs: {self.aside}" if self.aside else self.setup_problem
        return {
            "name": self.name,
            "address": self.address or "local",
            "state": state,
            "jobs": len(self.jobs),
            "labels": sorted(self.labels),
            "free_cpus": round(free.cpus, 3),
            "reason": self.problem or problem or (f"cannot run images: {self.unable}" if self.unable else ""),
            **{name: value for name, value in self.report.items() if name != "running"},
            **({"images": self.unable} if self.unable and self.report else {}),
        }


def is_amount(value: object) -> bool:
    """Whether it is a number of something, and not a strange one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 62


def need_of(spec: dict[str, Any]) -> Need:
    """What a job is to have for itself."""
    labels, exclude = (frozenset(spec.get(name, ())) for name in ("constraint", "exclude"))
    amounts = float(spec["cpus"]), int(spec["memory"]), int(spec["gpus"])
    return Need(*amounts, str(spec["image"]), labels, exclude, int(spec.get("disk", 0)))
