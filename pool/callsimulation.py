"""How long calls of a function would wait, and what its instances would cost: the router's law under a clock that is not real.

Instances are then jobs for the simulation of machines, so that both are of one trace.  The same trace gives the same result.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from pool import autoscaling, quantile
from pool.autoscaling import Bounds, Measured, Seen
from pool.placement import Need
from pool.simulation import Arrival, Simulation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pool.scaling import Policy

TICK_S = 0.2
QUEUE_MAX = 10_000
_ARRIVE, _READY, _DONE = range(3)


@dataclass(slots=True)
class Instance:
    """busy: calls at work.  until: when it ends if it is idle till then."""

    made_s: float
    ready_s: float
    busy: int = 0
    used_s: float = 0.0
    calls: int = 0


@dataclass(slots=True)
class Result:
    """waits_s: of every call.  lives: (begin, end) of every instance.  used: the most instances that were at work at once."""

    waits_s: list[float] = field(default_factory=list)
    lives: list[tuple[float, float]] = field(default_factory=list)
    colds: int = 0
    refused: int = 0
    started: int = 0
    unused: int = 0
    used: int = 0
    most: int = 0
    longest_queue: int = 0
    busy_s: float = 0.0

    def shown(self) -> dict[str, float | int]:
        """As `cpool simulate --functions --json` prints it."""
        waits = sorted(self.waits_s)

        def part(share: float) -> float:
            return round(quantile.of(waits, share), 3)

        paid_s = sum(end - begin for begin, end in self.lives)
        return {
            "calls": len(waits),
            "p50_wait_s": part(0.50),
            "p95_wait_s": part(0.95),
            "p99_wait_s": part(0.99),
            "cold_share": round(self.colds / len(waits), 4) if waits else 0.0,
            "refused": self.refused,
            "instances_started": self.started,
            "instances_unused": self.unused,
            "most_instances": self.most,
            "most_used": self.used,
            "longest_queue": self.longest_queue,
            "instance_s": round(paid_s, 1),
            "busy_share": round(self.busy_s / paid_s, 4) if paid_s else 0.0,
        }


class CallSimulation:
    """start_s: how long an instance takes to be ready."""

    def __init__(self, bounds: Bounds, start_s: float) -> None:
        self._bounds, self._start_s = bounds, start_s
        self._measured = Measured()
        self._events: list[tuple[float, int, int, object]] = []
        self._order = count()
        self._queue: deque[tuple[float, float, bool]] = deque()
        self._ready: list[Instance] = []
        self._starting: list[Instance] = []
        self._quiet_since = -1.0
        self.result = Result()

    def run(self, trace: Iterable[Arrival]) -> Result:
        """Until the last call is answered and, by the law, the last instance has ended; those of --min end with the trace."""
        arrivals = iter(trace)
        coming = next(arrivals, None)
        tick_s = now = 0.0
        while coming or self._events or self._queue or self._ready or self._starting:
            now = min(coming.time_s if coming else math.inf, self._events[0][0] if self._events else math.inf, tick_s)
            while coming and coming.time_s <= now:
                self._arrive(coming, now)
                coming = next(arrivals, None)
            while self._events and self._events[0][0] <= now:
                _, _, kind, what = heapq.heappop(self._events)
                self._begin(what, now) if kind == _READY else self._end(what, now)  # type: ignore[arg-type]
            if now >= tick_s:
                is_over = not (coming or self._events or self._queue)
                self._tick(now, is_over=is_over)
                tick_s = self._next_tick(now, coming)
        return self.result

    def _next_tick(self, now: float, coming: Arrival | None) -> float:
        if self._queue or self._ready or self._starting or not coming:
            return now + TICK_S
        return max(now + TICK_S, math.floor(coming.time_s / TICK_S) * TICK_S)

    def _arrive(self, one: Arrival, now: float) -> None:
        if self._quiet_since >= 0:
            self._measured.gap(now - self._quiet_since)
            self._quiet_since = -1.0
        if len(self._queue) >= QUEUE_MAX:
            self.result.refused += 1
            return
        self._queue.append((one.time_s, one.duration_s, not self._ready))
        self.result.longest_queue = max(self.result.longest_queue, len(self._queue))
        self._dispatch(now)
        if self._queue and not self._ready and not self._starting:
            self._scale(now)

    def _dispatch(self, now: float) -> None:
        while self._queue:
            free = next((one for one in reversed(self._ready) if one.busy < self._bounds.concurrency), None)
            if free is None:
                return
            came_s, duration_s, is_cold = self._queue.popleft()
            self._ready.remove(free)
            self._ready.append(free)
            free.busy += 1
            free.calls += 1
            self.result.waits_s.append(now - came_s)
            self.result.colds += is_cold
            self.result.busy_s += duration_s / self._bounds.concurrency
            self.result.used = max(self.result.used, sum(one.busy > 0 for one in self._ready))
            heapq.heappush(self._events, (now + duration_s, next(self._order), _DONE, (free, duration_s)))

    def _begin(self, one: Instance, now: float) -> None:
        self._starting.remove(one)
        self._measured.started(now - one.made_s)
        one.used_s = now
        self._ready.insert(0, one)
        self._dispatch(now)

    def _end(self, what: tuple[Instance, float], now: float) -> None:
        one, duration_s = what
        one.busy -= 1
        one.used_s = now
        self._measured.served(duration_s)
        self._dispatch(now)
        if not self._queue and not any(one.busy for one in self._ready):
            self._quiet_since = now

    def _seen(self, now: float) -> Seen:
        running = sum(one.busy for one in self._ready)
        many = len(self._ready), len(self._starting)
        start_s = max([self._measured.start_s, *(now - one.made_s for one in self._starting[:1])])
        return Seen(len(self._queue), running, *many, self._measured.service_s, start_s)

    def _scale(self, now: float) -> None:
        for _ in range(autoscaling.to_start(self._seen(now), self._bounds)):
            one = Instance(now, now + self._start_s)
            self._starting.append(one)
            self.result.started += 1
            heapq.heappush(self._events, (one.ready_s, next(self._order), _READY, one))
        self.result.most = max(self.result.most, len(self._ready) + len(self._starting))

    def _tick(self, now: float, *, is_over: bool) -> None:
        if not is_over:
            self._scale(now)
        idle_s = autoscaling.window_s(self._measured.gaps, self._bounds)
        keep = 0 if is_over else autoscaling.floor(self._seen(now), self._bounds)
        for one in self._ready[: max(len(self._ready) - keep, 0)]:
            if not one.busy and now - one.used_s >= idle_s:
                self._ready.remove(one)
                self.result.lives.append((one.made_s, now))
                self.result.unused += not one.calls


def with_machines(result: Result, policy: Policy, need: Need) -> dict[str, float | int]:
    """What the machines would cost that the instances run on."""
    trace = (Arrival(begin, end - begin, need) for begin, end in sorted(result.lives))
    found = Simulation(policy).run(trace).shown()
    names = ("p99_wait_s", "cost", "launches", "most_machines", "utilisation")
    return {f"machines_{name}": found[name] for name in names}
