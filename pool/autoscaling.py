"""How many instances a function is to have, and how long one is kept: pure functions of what was seen.

Started are those that calls will still need when a start is over: what the ones that there are, or that are starting, will have
done by then is taken off first.  So long starts and a burst do not start one instance for each call that waits for a moment,
which is what panic modes do that look at queues alone (Knative's issue 13284).  The simulator uses this module too.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from pool import quantile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SERVICE_S, START_S = 0.1, 0.5
"""What is assumed until it was measured."""

_RAMP, _RAMP_LEAST = 2, 10
_GAPS_MIN, _SHARE, _LEAST_S = 10, 0.95, 2.0
FAILURES_MAX = 3
_BACK_OFF_MAX_S = 60.0
_WEIGHT, _START_WEIGHT = 0.1, 0.3


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a user has said of a function.  least, most: instances; buffer: more of them while it is used; wait_s: the aim."""

    concurrency: int = 1
    least: int = 0
    most: int = 10
    buffer: int = 0
    idle_s: float = 60.0
    wait_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Seen:
    """queued: calls that wait; running: calls at work; ready, starting: instances; service_s of a call, start_s of a start.

    start_s is no less than how long those that are starting have taken already.
    """

    queued: int = 0
    running: int = 0
    ready: int = 0
    starting: int = 0
    service_s: float = SERVICE_S
    start_s: float = START_S


class Measured:
    """service_s of a call, start_s of an instance, of late; gaps: from the end of all work to the next call."""

    def __init__(self) -> None:
        self.service_s, self.start_s = SERVICE_S, START_S
        self.gaps: deque[float] = deque(maxlen=200)
        self._served = self._started = 0

    def served(self, seconds: float) -> None:
        """A call has taken so long; the first few count for more, so that what was assumed is forgotten soon."""
        self._served += 1
        self.service_s += max(_WEIGHT, 1 / self._served) * (seconds - self.service_s)

    def started(self, seconds: float) -> None:
        """An instance has taken so long to be ready."""
        self._started += 1
        self.start_s += max(_START_WEIGHT, 1 / self._started) * (seconds - self.start_s)

    def gap(self, seconds: float) -> None:
        """Nothing was asked for so long."""
        self.gaps.append(seconds)


def to_start(seen: Seen, bounds: Bounds) -> int:
    """How many instances to start now."""
    each = bounds.concurrency
    service_s = max(seen.service_s, 1e-6)
    soon = seen.ready * each * seen.start_s / service_s
    within_s = max(bounds.wait_s, seen.start_s / 2)  # who has waited for a start need not be served in a moment then
    served = each * max(1.0, within_s / service_s)
    need = math.ceil(max(0.0, seen.queued - soon) / served - 1e-9)
    wanted = max(need - seen.starting, 0)
    if seen.queued and not seen.ready + seen.starting:
        wanted = max(wanted, 1)
    there = seen.ready + seen.starting
    wanted = max(wanted, floor(seen, bounds) - there)
    ramp = max(_RAMP_LEAST, (_RAMP - 1) * there)
    return max(min(wanted, ramp, bounds.most - there), 0)


def floor(seen: Seen, bounds: Bounds) -> int:
    """How many are kept whatever is asked for."""
    busy = math.ceil(seen.running / bounds.concurrency)
    spare = bounds.buffer if seen.running or seen.queued else 0
    return min(max(bounds.least, busy + spare if spare else 0), bounds.most)


def window_s(gaps: Sequence[float], bounds: Bounds) -> float:
    """How long an instance is idle before it ends.  gaps: s from the end of a function's work to its next call, the latest."""
    if len(gaps) < _GAPS_MIN:
        return bounds.idle_s
    return min(max(quantile.of(sorted(gaps), _SHARE), _LEAST_S), bounds.idle_s)


def back_off_s(failures: int) -> float:
    """How long nothing is started after so many starts in a row that failed."""
    return min(2.0 ** (failures - 1), _BACK_OFF_MAX_S) if failures else 0.0
