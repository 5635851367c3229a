"""How many instances a function is to have, and how long one is kept: pure functions of what was seen.

Started are those that calls will still need when a start is over: what the ones that there are, or that are starting, will have
done by then is taken off first.  So long starts and a burst do not start one instance for each call that waits for a moment,
which is what panic modes do that look at queues alone (Knative's issue 13284).  The simulator uses this module too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SERVICE_S, START_S = 0.1, 0.5
"""What is assumed until it was measured."""

_RAMP, _RAMP_LEAST = 2, 10
_GAPS_MIN, _SHARE, _LEAST_S = 10, 0.95, 2.0
FAILURES_MAX = 3
_BACK_OFF_MAX_S = 60.0


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
    """queued: calls that wait; running: calls at work; ready, starting: instances; service_s of a call, start_s of a start."""

    queued: int = 0
    running: int = 0
    ready: int = 0
    starting: int = 0
    service_s: float = SERVICE_S
    start_s: float = START_S


def to_start(seen: Seen, bounds: Bounds) -> int:
    """How many instances to start now."""
    each = bounds.concurrency
    service_s = max(seen.service_s, 1e-6)
    soon = seen.ready * each * seen.start_s / service_s
    served = each * max(1.0, bounds.wait_s / service_s)
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
    is_used = seen.running or seen.queued
    return min(bounds.least + (bounds.buffer if is_used else 0), bounds.most)


def window_s(gaps: Sequence[float], bounds: Bounds) -> float:
    """How long an instance is idle before it ends.  gaps: s from the end of a function's work to its next call, the latest."""
    if len(gaps) < _GAPS_MIN:
        return bounds.idle_s
    ordered = sorted(gaps)
    usual = ordered[min(math.ceil(len(ordered) * _SHARE), len(ordered)) - 1]
    return min(max(usual, _LEAST_S), bounds.idle_s)


def back_off_s(failures: int) -> float:
    """How long nothing is started after so many starts in a row that failed."""
    return min(2.0 ** (failures - 1), _BACK_OFF_MAX_S) if failures else 0.0
