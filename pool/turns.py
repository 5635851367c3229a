"""Whose turn a job is: jobs that come after others, arrays of which only so many run at once, tries that come later."""

from __future__ import annotations

import time

from pool.state import ENDED, RUNNING, STARTING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pool.state import Job, State


_NAMED = 10


class Turns:
    """What is known of the jobs that a job comes after, and of when one may be tried again."""

    def __init__(self, state: State, open_jobs: Mapping[int, Job]) -> None:
        self._state, self._open = state, open_jobs
        self._not_before: dict[int, float] = {}
        self._good: set[int] = set()
        self._reached: dict[int, int] = {}
        """How many of the jobs that a job comes after are known to have ended well, in their order."""
        self._failures = 0
        self._looked: dict[int, int] = {}
        """Of each job that comes after others: after how many failures it was looked at last."""
        self._is_due = False

    def try_later(self, job: Job, wait_s: float) -> None:
        """Not before so many seconds from now."""
        self._not_before[job.id] = time.monotonic() + wait_s

    def forget(self, job: Job) -> None:
        """It has ended."""
        for known in (self._not_before, self._reached, self._looked):
            known.pop(job.id, None)
        self._failures += job.state != "finished" or job.code != 0

    def is_due(self) -> bool:
        """Whether the time of one has come that had to wait; said once."""
        now = time.monotonic()
        due = [number for number, when in self._not_before.items() if when <= now]
        for number in due:
            del self._not_before[number]
        self._is_due = self._is_due or bool(due)
        return self._is_due

    def seen(self) -> None:
        """Those whose time has come were looked at."""
        self._is_due = False

    def running(self, jobs: Iterable[Job]) -> dict[int, int]:
        """How many of each array that has a limit run."""
        found: dict[int, int] = {}
        for job in jobs:
            if job.spec.get("at_once") and job.state in (STARTING, RUNNING):
                found[job.spec["array"]] = found.get(job.spec["array"], 0) + 1
        return found

    def waits(self, job: Job, running: dict[int, int]) -> bool:
        """Whether it is not its turn yet."""
        if self._not_before.get(job.id, 0) > time.monotonic():
            return True
        self._not_before.pop(job.id, None)
        limit = job.spec.get("at_once")
        if limit and running.get(job.spec["array"], 0) >= limit:
            return True
        after, at = job.spec.get("after", ()), self._reached.get(job.id, 0)
        while at < len(after) and self._is_good(after[at]):
            at += 1
        if at:
            self._reached[job.id] = at
        return at < len(after)

    def failed_before(self, job: Job) -> int:
        """The job that it comes after and that has failed; 0 if none has; negative: there is none of that number.

        They may be many: they are walked once, and again when some job has failed.
        """
        if self._looked.get(job.id) == self._failures:
            return 0
        self._looked[job.id] = self._failures
        for number in job.spec.get("after", ()):
            if not self._is_good(number) and number not in self._open:  # which is looked up once
                if not self._state.has_job(number):
                    return -int(number)
                other = self._state.job(number)
                if other.state in ENDED and (other.state != "finished" or other.code != 0):
                    return other.id
        return 0

    def _is_good(self, number: int) -> bool:
        """Whether a job has ended well; looked up once."""
        if number in self._good:
            return True
        if number in self._open or not self._state.has_job(number):
            return False
        other = self._state.job(number)
        if other.state == "finished" and other.code == 0:
            self._good.add(number)
            return True
        return False

    def why_not(self, job: Job) -> str:
        """Why it is not its turn, in words; '' if it is."""
        open_ones = [str(number) for number in job.spec.get("after", ()) if not self._is_good(number)]
        if open_ones:
            more = f" and {len(open_ones) - _NAMED} others" if len(open_ones) > _NAMED else ""
            return f"comes after job {', '.join(open_ones[:_NAMED])}{more}"
        return "is tried again in a moment" if job.id in self._not_before else ""
