"""A function as the router sees it: its calls that wait, its instances, which of them a call goes to, and what was measured."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque

from pool import autoscaling, calls, quantile
from pool.autoscaling import Bounds, Measured, Seen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pool.hostlinks import HostLink
    from pool.loop import Wire

QUEUE_MAX, QUEUE_BYTES = 10_000, 64 << 20
_SHORT_S, _AHEAD = 0.002, 16
_KEPT = 1000


class Call:
    """callers: who waits for its answer.  deadline: by time.monotonic(), 0 for none.  instance: None while it waits."""

    __slots__ = (
        "begun", "body", "callers", "came", "deadline", "flags", "function", "id", "instance", "is_cold", "link", "tries",
    )  # fmt: skip

    def __init__(self, call: bytes, function: Routed, flags: int, body: bytes, came: float, deadline: float) -> None:
        self.id, self.function, self.flags, self.body, self.came, self.deadline = call, function, flags, body, came, deadline
        self.callers: list[Wire] = []
        self.instance: Instance | None = None
        self.link: HostLink | None = None
        """Of the host that knows it, if its instance is not known any more."""

        self.begun = 0.0
        self.tries = 0
        self.is_cold = False

    @property
    def host(self) -> HostLink | None:
        """Where it is, if it is anywhere."""
        return self.instance.link if self.instance else self.link


class Instance:
    """job: of the pool.  number: of its host; link: None before it is ready.  busy: calls that were given up and hold it."""

    def __init__(self, job: int, function: Routed, version: int, *, is_first: bool) -> None:
        self.job, self.function, self.version, self.is_first = job, function, version, is_first
        self.identity = function.identity_of(version)
        self.link: HostLink | None = None
        self.number = 0
        self.calls: OrderedDict[bytes, Call] = OrderedDict()
        self.busy = 0
        self.made = self.used = time.monotonic()
        self.idle_s = -1.0
        self.is_placed = self.is_ready = self.is_over = self.is_leaving = self.may_be_ahead = False
        self.freed_cpus = 0.0
        """Of idle ones that were ended to give it a place."""

        self.left_at = math.inf
        """Since when it is to end."""

        self.problem: dict[str, Any] | None = None
        """Why its handler cannot serve, as it has said."""

    def leave(self) -> None:
        """It gets no more calls."""
        if not self.is_leaving:
            self.is_leaving, self.left_at = True, time.monotonic()

    @property
    def load(self) -> int:
        return len(self.calls) + self.busy


class Queue:
    """Calls that wait, first come first served; any of them may leave.  size: bytes of their values."""

    def __init__(self) -> None:
        self._calls: OrderedDict[bytes, Call] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls.values())

    def is_full(self, more: int) -> bool:
        """Whether a value of so many bytes is too much."""
        return len(self._calls) >= QUEUE_MAX or self.size + more > QUEUE_BYTES

    def put(self, call: Call, *, is_first: bool = False) -> None:
        """At its end, or before all others."""
        self._calls[call.id] = call
        if is_first:
            self._calls.move_to_end(call.id, last=False)
        self.size += len(call.body)

    def pop(self) -> Call:
        """The first."""
        call = self._calls.popitem(last=False)[1]
        self.size -= len(call.body)
        return call

    def remove(self, call: Call) -> bool:
        """Whether it was there."""
        if self._calls.pop(call.id, None) is None:
            return False
        self.size -= len(call.body)
        return True


class Routed:
    """number: for callers.  version: the one that gets calls, 0 if there is none yet.  spec: of that version."""

    def __init__(self, tenant: str, name: str, number: int) -> None:
        self.tenant, self.name, self.number = tenant, name, number
        self.version, self.trying, self.identity = 0, 0, ""
        self.specs: dict[int, dict[str, Any]] = {}
        self.bounds = Bounds()
        self.queue = Queue()
        self.ready: list[Instance] = []
        """Of the current version; the one that was used last is the last."""

        self.starting: dict[int, Instance] = {}
        self.retiring: list[Instance] = []
        self.is_gone = False
        self.measured = Measured()
        self._quiet_since = 0.0
        self.failures, self.blocked_until, self.problem = 0, 0.0, ""
        self.waits: deque[float] = deque(maxlen=_KEPT)
        self.count = self.errors = self.colds = 0
        self.instance_s = 0.0
        self.submitting = 0
        self.scale_after = self.served = 0.0
        """served: when there was an instance last."""

    def identity_of(self, version: int) -> str:
        """Of what was deployed under that number, '' if nothing is: numbers begin anew after a function was removed."""
        return str(self.specs[version]["fn"]["id"]) if version in self.specs else ""

    def identities(self) -> set[str]:
        """Of all versions that there are."""
        return {str(spec["fn"]["id"]) for spec in self.specs.values()}

    def set_version(self, version: int) -> None:
        """From now on calls go to that one."""
        self.version, self.identity = version, self.identity_of(version)
        spec = self.specs[version]
        fn = spec["fn"]
        self.bounds = Bounds(fn["concurrency"], fn["min"], fn["max"], fn["buffer"], fn["idle_s"], fn["wait_s"])
        self.measured = Measured()
        self.failures, self.blocked_until, self.problem = 0, 0.0, ""

    @property
    def timeout_s(self) -> float:
        return float(self.specs[self.version]["fn"]["timeout_s"]) if self.version else 300.0

    def running(self) -> int:
        """Calls at work, or sent to be."""
        return sum(len(one.calls) for one in self.ready)

    def seen(self) -> Seen:
        """For the law."""
        each = self.bounds.concurrency
        ahead = sum(max(len(one.calls) - each, 0) for one in self.ready)
        starting = len(self.starting) + self.submitting
        many = len(self.ready), starting
        began = min((one.made for one in self.starting.values() if one.is_placed), default=math.inf)
        start_s = max(self.measured.start_s, time.monotonic() - began)
        return Seen(len(self.queue) + ahead, self.running() - ahead, *many, self.measured.service_s, start_s)

    def pick(self) -> Instance | None:
        """The instance used last that has room; of short calls some are sent ahead, so that none waits for the way back."""
        each = self.bounds.concurrency
        ready = self.ready
        for at in range(len(ready) - 1, -1, -1):
            one = ready[at]
            if len(one.calls) + one.busy < each and one.link and one.link.has_greeted:
                if at != len(ready) - 1:
                    ready.append(ready.pop(at))
                return one
        if self.measured.service_s < _SHORT_S and ready:
            one = min(ready, key=lambda one: len(one.calls))
            if len(one.calls) < each + _AHEAD and not one.busy and one.may_be_ahead and one.link and one.link.has_greeted:
                return one
        return None

    def came(self, now: float) -> None:
        """A call has."""
        if self._quiet_since:
            self.measured.gap(now - self._quiet_since)
            self._quiet_since = 0.0

    def answered(self, call: Call, flags: int, now: float) -> None:
        """Measure it."""
        service_s = now - call.begun
        ahead = max(len(call.instance.calls) - self.bounds.concurrency + 1, 1) if call.instance else 1
        self.measured.served(service_s / ahead)
        self.waits.append(now - call.came)
        self.count += 1
        self.errors += bool(flags & calls.ERROR)
        self.colds += call.is_cold
        if not flags & calls.ERROR:
            self.failures = 0  # not before: some say that they are ready, and are not

    def settle(self, now: float) -> None:
        """After an answer: whether it is quiet now."""
        if not self.queue and not any(one.calls for one in self.ready):
            self._quiet_since = now

    def started(self, instance: Instance, now: float) -> None:
        """An instance is ready; how long it took."""
        self.measured.started(now - instance.made)
        self.blocked_until, self.problem = 0.0, ""

    def later(self, why: str, now: float) -> None:
        """Nothing can be started now."""
        self.blocked_until, self.problem = now + 1.0, why

    def failed(self, why: str, now: float) -> None:
        """One ended before it was ready."""
        self.failures += 1
        self.blocked_until = now + autoscaling.back_off_s(self.failures)
        self.problem = why

    @property
    def is_hopeless(self) -> bool:
        """Whether its instances end again and again before they are ready."""
        return self.failures >= autoscaling.FAILURES_MAX

    def shown(self) -> dict[str, Any]:
        """As `cpool fn ls --json` prints it."""
        ordered = sorted(self.waits)

        def part(share: float) -> float:
            return round(quantile.of(ordered, share), 6)

        return {
            "name": self.name,
            "tenant": self.tenant,
            "version": self.version,
            "instances": len(self.ready),
            "starting": len(self.starting),
            "running": self.running(),
            "queued": len(self.queue),
            "calls": self.count,
            "errors": self.errors,
            "cold_share": round(self.colds / self.count, 4) if self.count else 0.0,
            "p50_s": part(0.50),
            "p95_s": part(0.95),
            "p99_s": part(0.99),
            "idle_s": round(autoscaling.window_s(self.measured.gaps, self.bounds), 3),
            "instance_s": round(self.instance_s, 1),
            "problem": self.problem,
        }
