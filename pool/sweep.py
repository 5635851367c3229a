"""Policies of spare capacity beside each other: what each costs, how long jobs wait, and the cheapest that is good enough."""

from __future__ import annotations

import re
from dataclasses import replace

from cafs.errors import CafsError, UsageError, quote
from pool import drawing
from pool.simulation import Simulation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pool.scaling import Policy
    from pool.simulation import Arrival

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999)
_SHARES = (0.1, 0.25, 0.5, 1.0)
_MACHINES = (1, 2, 4)


def candidates(policy: Policy) -> list[tuple[str, Policy]]:
    """(what sets it apart, a policy): spare by what came before, by what runs, and whole machines."""
    plain = replace(policy, least_cpus=0.0, share=0.0, quantile=0.0)
    smallest = min(kind.cpus for kind in policy.kinds)
    found = [(f"quantile = {one:g}", replace(plain, quantile=one)) for one in _QUANTILES]
    found += [(f"share = {one:g}", replace(plain, share=one)) for one in _SHARES]
    return found + [(f"least_cpus = {one * smallest:g}", replace(plain, least_cpus=one * smallest)) for one in _MACHINES]


def run(policy: Policy, trace: Sequence[Arrival]) -> list[dict[str, Any]]:
    """What each gives, as `simulate` shows it, with `policy`, what sets it apart."""
    return [{"policy": name, **Simulation(one).run(trace).shown()} for name, one in candidates(policy)]


def parse_goal(text: str) -> tuple[str, float]:
    """(a field of a result, what it is to be at most) of p99=2s.  Raises UsageError."""
    match = re.fullmatch(r"(p50|p95|p99)=([0-9]+(?:\.[0-9]+)?)(ms|s|m)?", text)
    if not match:
        raise UsageError(f"{quote(text)} is no goal", hint="p99=2s")
    return f"{match[1]}_wait_s", float(match[2]) * {"ms": 0.001, "s": 1, "m": 60, None: 1}[match[3]]


def cheapest(results: Sequence[dict[str, Any]], goal: str) -> dict[str, Any]:
    """That meets the goal: by what it costs, then by what is paid for.  Raises CafsError if none does."""
    field, most = parse_goal(goal)
    good = [one for one in results if one[field] <= most and not one["rejected"]]
    if not good:
        best = min(results, key=lambda one: float(one[field]))
        raise CafsError(f"no policy keeps {goal}; {best['policy']} comes nearest, with {best[field]:g} s")
    return min(good, key=lambda one: (float(one["cost"]), -float(one["utilisation"])))


def draw(results: Sequence[dict[str, Any]], configured: dict[str, Any]) -> str:
    """An SVG: across how long jobs wait, up how much is paid for what is needed."""

    def point(one: dict[str, Any]) -> tuple[float, float, str]:
        return float(one["p99_wait_s"]), 1 / one["utilisation"] if one["utilisation"] else 0.0, str(one["policy"])

    series = [drawing.Series("other policies", [point(one) for one in results])]
    series.append(drawing.Series("pool.toml", [point({**configured, "policy": "this one"})]))
    return drawing.chart("What spare capacity costs and gives", "p99 of waiting, s", "paid for / needed", series, is_line=False)
