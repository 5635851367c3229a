"""How many machines there are to be: a pure function of what is asked for, what is there, and the time.

What is asked for is what runs, what waits, and spare capacity, as jobs that nobody has submitted: for launching and for
removing alike all of it has to fit (Karpenter's capacity buffers are so).  Spare is the most of a least amount, a share of what
runs, and what was asked for within one launch time on all but the worst occasions: a machine that is begun when it is needed
comes too late by that time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from pool.placement import Need, Placement, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WINDOWS_MIN = 100
_PIECES = 64
_REMOVED_SHARE = 0.1
_BEGUN_AT_ONCE = 16
_PIECE_MIN = 0.1


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of machine.  memory: bytes; price: an hour; images: whether it can run jobs in images."""

    name: str
    cpus: float
    memory: int = 0
    gpus: int = 0
    price: float = 0.0
    labels: frozenset[str] = frozenset()
    images: bool = True

    def worker(self, name: str) -> Worker:
        """An empty one."""
        all_of_it = self.cpus, self.memory, self.gpus
        return Worker(name, *all_of_it, *all_of_it, images=self.images, labels=self.labels)


@dataclass(frozen=True, slots=True)
class Policy:
    """kinds: cheapest first or not.  launch_s: how long one takes; idle_s: how long an empty one stays.

    least_cpus, share, quantile: of spare capacity.  machines, price: at most, at once; price: an hour.
    """

    kinds: tuple[Kind, ...]
    launch_s: float = 40.0
    idle_s: float = 60.0
    least_cpus: float = 0.0
    share: float = 0.0
    quantile: float = 0.0
    machines: int = 10
    price: float = math.inf


@dataclass(slots=True)
class Machine:
    """One that was begun.  ready_s: when it is, or was; idle_s: since when nothing runs there, inf if something does."""

    number: int
    kind: Kind
    ready_s: float
    idle_s: float
    jobs: int = 0
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self.kind.worker(str(self.number))


class Demand:
    """Processors that were asked for, in windows of one launch time: what came in each of the latest so many."""

    def __init__(self, window_s: float, many: int = 2000) -> None:
        self._window_s, self._many = window_s, many
        self._now = 0
        self._sums: list[float] = []
        self._current = 0.0
        self._sorted: list[float] = []

    def came(self, now_s: float, cpus: float) -> None:
        """A job was submitted."""
        self._go_to(now_s)
        self._current += cpus

    def _go_to(self, now_s: float) -> None:
        window = int(now_s // self._window_s)
        if not self._sums:
            self._now = max(self._now, window - self._many)
        while self._now < window:
            self._now += 1
            self._sums.append(self._current)
            self._sorted.insert(bisect_left(self._sorted, self._current), self._current)
            self._current = 0.0
            if len(self._sums) > self._many:
                del self._sorted[bisect_left(self._sorted, self._sums.pop(0))]

    def quantile(self, now_s: float, part: float) -> float:
        """What no more than 1 - PART of the windows went over; from few windows by their mean and spread (normal law)."""
        self._go_to(now_s)
        found = self._sorted
        if len(found) >= _WINDOWS_MIN:
            return found[min(int(len(found) * part), len(found) - 1)]
        if not found:
            return 0.0
        mean = sum(found) / len(found)
        return mean + 2.33 * math.sqrt(sum((one - mean) ** 2 for one in found) / len(found))


def spare_cpus(policy: Policy, running: float, demand: Demand, now_s: float) -> float:
    """Processors that are to be free."""
    asked = demand.quantile(now_s, policy.quantile) if policy.quantile else 0.0
    return max(policy.least_cpus, policy.share * running, asked)


def decide(
    now_s: float,
    policy: Policy,
    machines: Sequence[Machine],
    waiting: Iterable[Need],
    spare: float,
    others: Sequence[Worker] = (),
) -> tuple[list[Kind], list[Machine]]:
    """(what to begin, what to end).  spare: processors, as of `spare_cpus`.  others: workers that nobody launched."""
    wanted = [*waiting, *_as_jobs(spare, policy)]
    workers = [_copy(one) for one in (*others, *(machine.worker for machine in machines))]
    missing = _unplaced(workers, wanted)
    begin = _kinds_for(policy, machines, missing) if missing else []
    return begin, [] if begin else _not_needed(now_s, policy, machines, wanted, others, len(missing))


def _as_jobs(spare: float, policy: Policy) -> list[Need]:
    """Of one processor each, or, of many, of as much as the smallest machine takes."""
    if not policy.kinds:
        return []
    spare = min(spare, policy.machines * max(kind.cpus for kind in policy.kinds))  # there will never be more
    piece = min(max(1.0, math.ceil(spare / _PIECES)), max(min(kind.cpus for kind in policy.kinds), _PIECE_MIN))
    return [Need(piece)] * math.ceil(spare / piece)


def _copy(one: Worker) -> Worker:
    free, whole = (one.cpus, one.memory, one.gpus), (one.all_cpus, one.all_memory, one.all_gpus)
    return Worker(one.name, *free, *whole, one.images, one.labels, one.reason)


def _unplaced(workers: list[Worker], wanted: Sequence[Need]) -> list[Need]:
    """What does not fit; the largest are placed first."""
    first = wanted[0] if wanted else Need(0)
    if first.cpus and first == Need(first.cpus) and len(set(wanted)) == 1:
        room = sum(int((one.cpus + 1e-9) / first.cpus) for one in workers if not one.reason)  # all alike: counting does
        return list(wanted[room:])
    placement = Placement(workers)
    ordered = sorted(wanted, key=lambda need: (need.gpus, need.cpus, need.memory), reverse=True)
    return [need for need in ordered if placement.choose(need) is None]


def _kinds_for(policy: Policy, machines: Sequence[Machine], missing: list[Need]) -> list[Kind]:
    """The cheapest for what each holds, until all fits or a cap is reached."""
    found: list[Kind] = []
    price = sum(one.kind.price for one in machines)
    while missing and len(machines) + len(found) < policy.machines and len(found) < _BEGUN_AT_ONCE:
        best: tuple[float, Kind, list[Need]] | None = None
        for kind in policy.kinds:
            left = _unplaced([kind.worker("new")], missing)
            placed = len(missing) - len(left)
            if placed and price + kind.price <= policy.price:
                cost = (kind.price or 1e-9) / placed
                if best is None or cost < best[0]:
                    best = cost, kind, left
        if best is None:
            break
        _, kind, missing = best
        found.append(kind)
        price += kind.price
    return found


def _not_needed(
    now_s: float, policy: Policy, machines: Sequence[Machine], wanted: list[Need], others: Sequence[Worker], missing: int
) -> list[Machine]:
    """Those that have been empty for long, if no more is missing without them; the dearest first, not many at once."""
    idle = [one for one in machines if one.ready_s <= now_s and one.idle_s + policy.idle_s <= now_s]
    idle.sort(key=lambda one: (-one.kind.price, one.idle_s))
    found: list[Machine] = []
    for one in idle[: max(1, math.ceil(len(machines) * _REMOVED_SHARE))]:
        left = [_copy(other.worker) for other in machines if other is not one and other not in found]
        left += map(_copy, others)
        if len(_unplaced(left, wanted)) <= missing:
            found.append(one)
    return found
