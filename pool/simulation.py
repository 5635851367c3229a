"""What a policy would cost and how long jobs would wait: the pool's own placement and scaling under a clock that is not real.

The same trace, policy and seed give the same result.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count

from cafs.errors import FormatError, UsageError, quote
from pool import quantile
from pool.placement import Need, Placement
from pool.scaling import Demand, Machine, decide, spare_cpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from pool.scaling import Policy

TICK_S = 2.0
_NONE = 0.001
LAUNCH, ROOM = "launch", "room"
"""Why a job has waited: for a machine that was begun after it came, or for room on one that there was."""

_COLUMNS = ("duration_s", "cpus", "memory", "gpus", "tenant")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job of a trace.  time_s: since its beginning."""

    time_s: float
    duration_s: float
    need: Need


@dataclass(slots=True)
class Result:
    """waits_s: of every job.  causes: of those that have waited, by cause.  paid_cpu_s, busy_cpu_s: processor seconds.
    unused: machines that never had a job."""

    waits_s: list[float] = field(default_factory=list)
    causes: dict[str, list[float]] = field(default_factory=lambda: {LAUNCH: [], ROOM: []})
    busy_cpu_s: float = 0.0
    paid_cpu_s: float = 0.0
    cost: float = 0.0
    launches: int = 0
    unused: int = 0
    longest_queue: int = 0
    most_machines: int = 0
    rejected: int = 0

    def shown(self) -> dict[str, float | int]:
        """As `cpool simulate --json` prints it."""
        waits = sorted(self.waits_s)
        return {
            "jobs": len(waits),
            "p50_wait_s": _part(waits, 0.50),
            "p95_wait_s": _part(waits, 0.95),
            "p99_wait_s": _part(waits, 0.99),
            "waited_share": round(sum(one > _NONE for one in waits) / len(waits), 4) if waits else 0.0,
            **{f"waited_for_{cause}": len(found) for cause, found in self.causes.items()},
            **{f"p99_wait_for_{cause}_s": _part(sorted(found), 0.99) for cause, found in self.causes.items()},
            "utilisation": round(self.busy_cpu_s / self.paid_cpu_s, 4) if self.paid_cpu_s else 0.0,
            "cost": round(self.cost, 4),
            "launches": self.launches,
            "launches_unused": self.unused,
            "longest_queue": self.longest_queue,
            "most_machines": self.most_machines,
            "rejected": self.rejected,
        }


def _part(ordered: list[float], part: float) -> float:
    return round(quantile.of(ordered, part), 3)


class Simulation:
    """One run."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._placement = Placement([])
        self._machines: dict[int, Machine] = {}  # by number, those that are not ended
        self._places: dict[int, int] = {}  # number of a machine -> its number in the placement
        self._owners: list[Machine] = []
        self._queue: deque[Arrival] = deque()
        self._ends: list[tuple[float, int, int, Need]] = []
        self._ready: list[tuple[float, int]] = []
        self._order = count()
        self._demand = Demand(policy.launch_s)
        self._running = 0.0
        self._is_over = False
        self.result = Result()

    def run(self, trace: Iterable[Arrival]) -> Result:
        """Until the last job has ended and, by the policy, the last machine."""
        arrivals = iter(trace)
        coming = next(arrivals, None)
        tick_s = 0.0
        while coming or self._queue or self._ends or self._machines:
            times = [tick_s, coming.time_s if coming else math.inf]
            times += [self._ends[0][0] if self._ends else math.inf, self._ready[0][0] if self._ready else math.inf]
            now = min(times)
            while self._ends and self._ends[0][0] <= now:
                self._end(now)
            while self._ready and self._ready[0][0] <= now:
                self._begin(now)
            while coming and coming.time_s <= now:
                self._arrive(coming, now)
                coming = next(arrivals, None)
            if self._queue and not (coming or self._ends or self._machines) and now >= tick_s and not self._can_begin(now):
                self.result.rejected += len(self._queue)  # no machine will ever come for them
                self._queue.clear()
            self._is_over = not (coming or self._queue or self._ends)
            if now >= tick_s:
                self._scale(now)
                tick_s = self._next_tick(now, coming)
        return self.result

    def _can_begin(self, now: float) -> bool:
        return bool(decide(now, self._policy, [], [one.need for one in self._queue], 0.0)[0])

    def _next_tick(self, now: float, coming: Arrival | None) -> float:
        """In two seconds; not before something happens, if nothing can change till then."""
        if self._queue or self._machines or not coming:
            return now + TICK_S
        return max(now + TICK_S, math.floor(coming.time_s / TICK_S) * TICK_S)

    def _arrive(self, one: Arrival, now: float) -> None:
        self._demand.came(now, one.need.cpus)
        if not any(kind.worker("x").could_fit(one.need) for kind in self._policy.kinds):
            self.result.rejected += 1
        elif self._queue or not self._start(one, now):
            self._queue.append(one)
            self.result.longest_queue = max(self.result.longest_queue, len(self._queue))
            self._scale(now) if len(self._queue) == 1 else None

    def _start(self, one: Arrival, now: float) -> bool:
        number = self._placement.choose_number(one.need)
        if number is None:
            return False
        machine = self._owners[number]
        machine.jobs += 1
        machine.idle_s = math.inf
        self._running += one.need.cpus
        self.result.waits_s.append(now - one.time_s)
        if now - one.time_s > _NONE:
            self.result.causes[LAUNCH if machine.ready_s > one.time_s else ROOM].append(now - one.time_s)
        self.result.busy_cpu_s += one.need.cpus * one.duration_s
        heapq.heappush(self._ends, (now + one.duration_s, next(self._order), number, one.need))
        return True

    def _end(self, now: float) -> None:
        _, _, number, need = heapq.heappop(self._ends)
        self._placement.give_back(number, need)
        self._running -= need.cpus
        machine = self._owners[number]
        if machine.worker.cpus >= machine.kind.cpus - 1e-9:
            machine.idle_s = now
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        while self._queue and self._start(self._queue[0], now):
            self._queue.popleft()

    def _begin(self, now: float) -> None:
        """A machine that was launched is ready."""
        _, number = heapq.heappop(self._ready)
        machine = self._machines[number]
        machine.idle_s = now
        self._places[number] = self._placement.add(machine.worker)
        self._owners.append(machine)
        self._go_on(now)

    def _scale(self, now: float) -> None:
        policy, machines = self._policy, list(self._machines.values())
        spare = 0.0 if self._is_over else spare_cpus(policy, self._running, self._demand, now)
        begin, end = decide(now, policy, machines, [one.need for one in self._queue], spare)
        for kind in begin:
            machine = Machine(next(self._order), kind, now + policy.launch_s, math.inf)
            self._machines[machine.number] = machine
            heapq.heappush(self._ready, (machine.ready_s, machine.number))
            self.result.launches += 1
        for machine in end:
            self._placement.remove(self._places.pop(machine.number))
            self._pay(machine, now)
        self.result.most_machines = max(self.result.most_machines, len(self._machines))

    def _pay(self, machine: Machine, now: float) -> None:
        """It is ended; it was paid for since it was begun."""
        del self._machines[machine.number]
        seconds = now - (machine.ready_s - self._policy.launch_s)
        self.result.cost += machine.kind.price * seconds / 3600
        self.result.paid_cpu_s += machine.kind.cpus * seconds
        self.result.unused += not machine.jobs


def read_trace(file: TextIO, name: str, duration: str, cpus: float, seed: int) -> Iterator[Arrival]:
    """Of a CSV: times first, ISO or numbers; columns by their names.  What it does not have comes from the other arguments.

    Raises FormatError, naming the line.
    """
    rows = csv.reader(file)
    head = next(rows, None)
    if head is None:
        raise FormatError(f"{name}: it is empty")
    columns = {word.strip(): at for at, word in enumerate(head) if word.strip() in _COLUMNS}
    draw, rng = distribution(duration), random.Random(seed)
    first = last = None
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            time_s = _time(row[0])
            first = time_s if first is None else first
            given = {word: float(row[at]) for word, at in columns.items() if word != "tenant" and row[at] != ""}
            need = Need(given.get("cpus", cpus), int(given.get("memory", 0)), int(given.get("gpus", 0)))
            length = given.get("duration_s", -1.0)
            if not all(math.isfinite(value) for value in given.values()) or need.cpus <= 0:
                raise ValueError("a number that is none")
        except (ValueError, IndexError) as error:
            raise FormatError(f"{name}:{number}: {error}") from None
        if last is not None and time_s < last:
            raise FormatError(f"{name}:{number}: it is earlier than the line before")
        last = time_s
        yield Arrival(time_s - first, length if length >= 0 else draw(rng), need)


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        head, _, rest = text.strip().rstrip("Z").partition(".")
        return datetime.fromisoformat(head + "+00:00").timestamp() + (float(f"0.{rest}") if rest else 0.0)


def distribution(text: str) -> _Draw:
    """lognormal:MEDIAN[:SIGMA], exponential:MEAN, or a number of seconds.  Raises UsageError."""
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(one) for one in (rest or kind).split(":")]
    except ValueError:
        numbers = []
    if not numbers or any(one <= 0 or not math.isfinite(one) for one in numbers):
        raise UsageError(f"{quote(text)} is no distribution", hint="lognormal:10, exponential:10, or 10")
    if kind == "lognormal" and len(numbers) <= 2:
        sigma = numbers[1] if numbers[1:] else 1.0
        return lambda rng: rng.lognormvariate(math.log(numbers[0]), sigma)
    if kind == "exponential" and len(numbers) == 1:
        return lambda rng: rng.expovariate(1 / numbers[0])
    if not rest and len(numbers) == 1:
        return lambda rng: numbers[0]
    raise UsageError(f"{quote(text)} is no distribution", hint="lognormal:10, exponential:10, or 10")


if TYPE_CHECKING:
    from collections.abc import Callable

    _Draw = Callable[[random.Random], float]
