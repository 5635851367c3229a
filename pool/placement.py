"""Which job goes to which worker: a pure function of what is asked for and what is free.

Best fit: a job goes where it leaves least of what is scarce there, so that large jobs find room elsewhere; jobs without GPUs
keep off machines that have some; a job goes to a worker that has had its image before others.  Measured load only orders what
is equal; measured memory and disk may keep a job away.  Jobs of one shape share a heap of workers, so a decision costs the
logarithm of their number; for a shape of its own the workers are looked at that have little more processors free than it needs.
A job that has waited for long keeps a worker for itself until it fits there: smaller ones cannot pass it for ever.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

STARVING_S = 30.0
"""How long smaller jobs may pass one that does not fit."""

_WITH_GPUS, _HAS_IMAGE, _LOADED = 10.0, 2.0, 0.05
"""How much of a rank they are: all that is left free is 2."""

_FEW, _LOOKED_AT = 4, 64


@dataclass(frozen=True, slots=True)
class Need:
    """What a job is to have for itself.  memory, disk: bytes.  image: digest, '' for a plain command.  labels: that its worker
    has; exclude: names that are not its own."""

    cpus: float = 1.0
    memory: int = 0
    gpus: int = 0
    image: str = ""
    labels: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    disk: int = 0


@dataclass(slots=True)
class Worker:
    """What is free of a worker, and what it has in all.  reason: why it takes nothing now, '' if it does.  has: images whose
    files it has fetched.  load: that was measured, by processor."""

    name: str
    cpus: float
    memory: int
    gpus: int
    all_cpus: float
    all_memory: int
    all_gpus: int
    images: bool = True
    labels: frozenset[str] = frozenset()
    reason: str = ""
    has: frozenset[str] = frozenset()
    load: float = 0.0
    measured_memory: float = math.inf
    measured_disk: float = math.inf
    version: int = 0
    is_kept: bool = False

    def fits(self, need: Need) -> bool:
        """Whether a job can be here now."""
        is_there = need.cpus <= self.cpus + 1e-9 and need.memory <= self.memory and need.gpus <= self.gpus and self.suits(need)
        return is_there and need.memory <= self.measured_memory and need.disk <= self.measured_disk

    def could_fit(self, need: Need) -> bool:
        """Whether it could if nothing else were here."""
        return (
            need.cpus <= self.all_cpus + 1e-9
            and need.memory <= self.all_memory
            and need.gpus <= self.all_gpus
            and self.suits(need)
        )

    def suits(self, need: Need) -> bool:
        """Whether it is of the kind that a job wants, whatever is free."""
        return (self.images or not need.image) and need.labels <= self.labels and self.name not in need.exclude

    def take(self, need: Need) -> None:
        """It is here now."""
        self.cpus -= need.cpus
        self.memory -= need.memory
        self.gpus -= need.gpus
        self.measured_memory -= need.memory
        self.measured_disk -= need.disk
        self.version += 1

    def give_back(self, need: Need) -> None:
        """It has ended."""
        self.cpus += need.cpus
        self.memory += need.memory
        self.gpus += need.gpus
        self.measured_memory += need.memory
        self.measured_disk += need.disk
        self.version += 1

    def rank(self, need: Need) -> float:
        """Less is better: the shares of the worker that would be left."""
        left = (self.cpus - need.cpus) / (self.all_cpus or 1) + (self.memory - need.memory) / (self.all_memory or 1)
        left += _LOADED * min(self.load, 1.0) - (_HAS_IMAGE if need.image in self.has else 0)
        return left + (_WITH_GPUS if self.all_gpus and not need.gpus else 0) + (self.gpus - need.gpus)


class Placement:
    """One turn.  Workers are changed as jobs are put on them."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.workers = [one for one in workers if not one.reason]
        self._heaps: dict[Need, list[tuple[float, int, int]]] = {}
        self._seen: dict[Need, int] = {}
        self._by_cpus = sorted((one.cpus, number) for number, one in enumerate(self.workers))
        self._hopeless: set[Need] = set()

    def choose(self, need: Need, waited_s: float = 0.0) -> Worker | None:
        """The worker for a job, which then has it; None if there is none now."""
        found = self.choose_number(need, waited_s)
        return None if found is None else self.workers[found]

    def choose_number(self, need: Need, waited_s: float = 0.0) -> int | None:
        """The same, by its number."""
        if need in self._hopeless:
            return None
        count = self._seen[need] = self._seen.get(need, 0) + 1
        found = self._of_few(need) if count <= _FEW else self._of_many(need)
        if found is not None:
            self._give(found, need)
            return found
        if waited_s < STARVING_S:
            self._hopeless.add(need)  # what is free only gets less in one turn
        else:
            self._keep_one(need)
        return None

    def keep(self, names: Iterable[str]) -> None:
        """Nothing more goes to these in this turn."""
        wanted = set(names)
        for one in self.workers:
            one.is_kept = one.is_kept or one.name in wanted

    def add(self, worker: Worker) -> int:
        """One more; its number."""
        number = len(self.workers)
        self.workers.append(worker)
        insort(self._by_cpus, (worker.cpus, number))
        self._offer(number)
        return number

    def remove(self, number: int) -> None:
        """Nothing goes there any more.  Its number is not given again."""
        worker = self.workers[number]
        self._by_cpus.pop(bisect_left(self._by_cpus, (worker.cpus, number)))
        worker.is_kept = True

    def give_back(self, number: int, need: Need) -> None:
        """A job has ended there."""
        worker = self.workers[number]
        self._by_cpus.pop(bisect_left(self._by_cpus, (worker.cpus, number)))
        worker.give_back(need)
        insort(self._by_cpus, (worker.cpus, number))
        self._offer(number)

    def _offer(self, number: int) -> None:
        """It has more room than before."""
        worker = self.workers[number]
        self._hopeless.clear()
        for need, heap in self._heaps.items():
            if worker.fits(need):
                heapq.heappush(heap, (worker.rank(need), number, worker.version))

    def _give(self, number: int, need: Need) -> None:
        worker = self.workers[number]
        self._by_cpus.pop(bisect_left(self._by_cpus, (worker.cpus, number)))
        worker.take(need)
        insort(self._by_cpus, (worker.cpus, number))

    def _of_few(self, need: Need) -> int | None:
        """The best of the first that have room, by free processors."""
        found: list[tuple[float, int]] = []
        with_gpus = None
        for at in range(bisect_left(self._by_cpus, (need.cpus - 1e-9, -1)), len(self._by_cpus)):
            number = self._by_cpus[at][1]
            worker = self.workers[number]
            if worker.is_kept or not worker.fits(need):
                continue
            if worker.all_gpus and not need.gpus:
                with_gpus = number if with_gpus is None else with_gpus
                continue
            found.append((worker.rank(need), number))
            if len(found) == _LOOKED_AT:
                break
        return min(found)[1] if found else with_gpus

    def _of_many(self, need: Need) -> int | None:
        """The best of all: the heap of the shape, in which what has changed since is put in its place when it comes up."""
        heap = self._heaps.get(need)
        if heap is None:
            ranked = ((one.rank(need), number, one.version) for number, one in enumerate(self.workers) if one.fits(need))
            heap = self._heaps[need] = list(ranked)
            heapq.heapify(heap)
        while heap:
            _, number, version = heap[0]
            worker = self.workers[number]
            if worker.is_kept or not worker.fits(need):
                heapq.heappop(heap)
            elif version != worker.version:
                heapq.heapreplace(heap, (worker.rank(need), number, worker.version))
            else:
                return number
        return None

    def _keep_one(self, need: Need) -> None:
        """Nothing more goes to the worker that is nearest to having room."""
        able = [one for one in self.workers if one.could_fit(need) and not one.is_kept]
        if able:
            max(able, key=lambda one: (one.gpus if need.gpus else 0, one.cpus, one.memory)).is_kept = True


def why_not(need: Need, workers: Iterable[Worker]) -> str:
    """Why a job waits, in words."""
    found = list(workers)
    ready = [one for one in found if not one.reason]
    if not ready:
        return f"no worker is ready: {found[0].name} {found[0].reason}" if found else "there is no worker"
    if need.image and not any(one.images for one in ready):
        return "no worker can run images"
    ready = [one for one in ready if one.suits(need)]
    if not ready:
        return "no worker has the labels that it wants, or all are excluded"
    for what, wanted, most, show in (
        ("CPUs", need.cpus, max(one.all_cpus for one in ready), "{:g}".format),
        ("GB of memory", need.memory / 1e9, max(one.all_memory for one in ready) / 1e9, "{:.1f}".format),
        ("GPUs", float(need.gpus), float(max(one.all_gpus for one in ready)), "{:g}".format),
    ):
        if wanted > most:
            return f"no worker fits: needs {show(wanted)} {what}, the largest has {show(most)}"
    if need.disk and all(need.disk > one.measured_disk for one in ready):
        return f"no worker has {need.disk / 1e9:.1f} GB of disk free"
    return "waits for room"
