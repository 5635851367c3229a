"""cpool simulate: a trace through the policy of machines, and of instances of a function."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass

from cli import _pool as asking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pool.scaling import Policy
    from pool.simulation import Arrival


@dataclass(frozen=True, slots=True)
class Trace:
    """name: of a CSV, - for standard input; the others are what it does not say."""

    name: str
    config: str | None
    duration: str
    cpus: float
    seed: int
    is_quiet: bool
    as_json: bool

    def policy(self) -> Policy:
        """Raises CafsError."""
        from pool import settings

        return (settings.read_file(self.config) if self.config else settings.read(asking.directory())).policy()

    @contextmanager
    def opened(self) -> Iterator[Iterator[Arrival]]:
        """What came.  Raises CafsError."""
        from cafs.errors import os_error
        from pool.simulation import read_trace

        if not self.is_quiet:
            rest = f"{self.duration} seconds, {self.cpus:g} CPUs a job; seed {self.seed}"
            sys.stderr.write(f"cpool: what the trace does not say: {rest}\n")
        try:
            with open(0 if self.name == "-" else self.name, encoding="utf-8", newline="", closefd=self.name != "-") as file:
                yield read_trace(file, self.name, self.duration, self.cpus, self.seed)
        except OSError as error:
            raise os_error(f"cannot read {self.name!r}", error) from error


def calls(trace: Trace, start_s: float, **bounds: Any) -> None:
    """Of a function.  Raises CafsError."""
    from pool.autoscaling import Bounds
    from pool.callsimulation import CallSimulation, with_machines
    from pool.placement import Need

    policy = trace.policy()
    with trace.opened() as arrivals:
        found = CallSimulation(Bounds(**bounds), start_s).run(arrivals)
    shown = {**found.shown(), **with_machines(found, policy, Need(trace.cpus))}
    asking.print_fields(shown, as_json=trace.as_json)


def jobs(trace: Trace, *, is_sweep: bool, goal: str | None, svg: str | None) -> None:
    """Once, or under several policies.  Raises CafsError."""
    from pool import sweep
    from pool.simulation import Simulation

    policy = trace.policy()
    if goal:
        sweep.parse_goal(goal)
    has_many = is_sweep or goal or svg
    with trace.opened() as arrivals:
        every = list(arrivals) if has_many else arrivals
        found = Simulation(policy).run(every).shown()
    if not has_many:
        return asking.print_fields(found, as_json=trace.as_json)
    results = sweep.run(policy, list(every))
    if svg:
        asking.write(svg, sweep.draw(results, found))
    if goal:
        asking.print_fields(sweep.cheapest(results, goal), as_json=trace.as_json)
    elif is_sweep:
        names = ("policy", "p50_wait_s", "p95_wait_s", "p99_wait_s", "utilisation", "cost", "launches")
        asking.table(results, {name: name.upper() for name in names}, as_json=trace.as_json, only="")
    else:
        asking.print_fields(found, as_json=trace.as_json)
