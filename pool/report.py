"""What a pool has done: jobs, how long they waited, what machines cost, over time; from what is in its state."""

from __future__ import annotations

import html
import time

from pool import drawing, quantile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.settings import Settings
    from pool.state import State

_BUCKETS = 48
_HOUR_S = 3600.0


def make(state: State, settings: Settings, days: float, now_s: float | None = None) -> dict[str, Any]:
    """Totals, and the same for each of 48 pieces of the last so many days; as `cpool report --json` prints it."""
    now = time.time() if now_s is None else now_s
    since = now - days * 86400
    width = (now - since) / _BUCKETS
    jobs, machines = state.jobs_since(since), state.machines(all_of_them=True)
    pieces = [_piece(jobs, machines, since + width * at, since + width * (at + 1), now) for at in range(_BUCKETS)]
    return {"since_s": since, "until_s": now, **_piece(jobs, machines, since, now, now),
            "utilisation": _utilisation(jobs, machines, settings, since, now), "pieces": pieces}  # fmt: skip


def _piece(jobs: list[dict[str, Any]], machines: list[dict[str, Any]], begin: float, end: float, now: float) -> dict[str, Any]:
    ended = [one for one in jobs if one["finished_s"] and begin <= one["finished_s"] < end]
    began = [one for one in jobs if one["started_s"] and begin <= one["started_s"] < end]
    waits = sorted(one["started_s"] - one["submitted_s"] for one in began)
    used = sum(one["cpus"] * _overlap(one["started_s"], one["finished_s"], begin, end, now) for one in jobs)
    hours = [(one, _overlap(one["launched_s"], one["ended_s"], begin, end, now) / _HOUR_S) for one in machines]
    return {
        "at_s": begin,
        "jobs": len(ended),
        "failed": sum(one["state"] == "finished" and one["code"] != 0 for one in ended),
        "p50_wait_s": quantile.of(waits, 0.5),
        "p95_wait_s": quantile.of(waits, 0.95),
        "cpu_hours": used / _HOUR_S,
        "machine_hours": sum(spent for _, spent in hours),
        "cost": sum(one["price"] * spent for one, spent in hours),
    }


def _overlap(first: float | None, last: float | None, begin: float, end: float, now: float) -> float:
    """Seconds of [first, last] that are in [begin, end]; what has not ended goes on until now."""
    return 0.0 if first is None else max(min(now if last is None else last, end) - max(first, begin), 0.0)


def _utilisation(
    jobs: list[dict[str, Any]], machines: list[dict[str, Any]], settings: Settings, begin: float, end: float
) -> float:
    """Of launched machines: processors that jobs had for themselves, of those that were paid for."""
    cpus = {table["name"]: float(table["cpus"]) for table in settings.machines}
    names = {one["name"] for one in machines}
    paid = sum(cpus.get(one["kind"], 0.0) * _overlap(one["launched_s"], one["ended_s"], begin, end, end) for one in machines)
    used = sum(
        one["cpus"] * _overlap(one["started_s"], one["finished_s"], begin, end, end) for one in jobs if one["worker"] in names
    )
    return used / paid if paid else 0.0


def functions(state: State, settings: Settings, since_s: float, now_s: float | None = None) -> list[dict[str, Any]]:
    """Of each, what its instances have taken: how many, their hours, and what these cost on machines that have a price.

    An instance costs its part of its machine's processors.
    """
    now = time.time() if now_s is None else now_s
    cpus = {table["name"]: float(table["cpus"]) for table in settings.machines}
    machines = state.machines(all_of_them=True)
    price = {one["name"]: one["price"] / cpus[one["kind"]] for one in machines if cpus.get(one["kind"])}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in state.instances_since(since_s):
        key = one["tenant"] or "", one["name"]
        row = found.setdefault(key, {"tenant": key[0], "name": key[1], "started": 0, "hours": 0.0, "cost": 0.0})
        hours = _overlap(one["started_s"], one["finished_s"], since_s, now, now) / _HOUR_S
        row["started"] += one["started_s"] is not None
        row["hours"] += hours
        row["cost"] += hours * one["cpus"] * price.get(one["worker"], 0.0)
    return [found[key] for key in sorted(found)]


_MEASURED = ("calls", "errors", "cold_share", "queued", "p50_s", "p95_s", "p99_s")


def _of_functions(rows: list[dict[str, Any]]) -> str:
    """A table, if there are any."""
    if not rows:
        return ""
    names = ("tenant", "name", "started", "hours", "cost", *_MEASURED)
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    cells = [
        "".join(
            f"<td>{html.escape(f'{one[name]:.4g}' if isinstance(one.get(name), float) else str(one.get(name, '')))}</td>"
            for name in names
        )
        for one in rows
    ]
    return f"<h2>Functions</h2>\n<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>\n"


def as_html(found: dict[str, Any]) -> str:
    """A page that needs nothing else."""
    begin, pieces = found["since_s"], found["pieces"]
    rows = [(name, found[name]) for name in found if name not in ("pieces", "functions", "since_s", "until_s", "at_s")]
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in rows)
    charts = ""
    for title, unit, names in (
        ("Waiting", "s", ("p50_wait_s", "p95_wait_s")),
        ("Jobs that ended", "jobs", ("jobs", "failed")),
        ("Processors used, machines paid for", "hours", ("cpu_hours", "machine_hours")),
        ("Money", "in a piece", ("cost",)),
    ):
        series = [
            drawing.Series(name, [((one["at_s"] - begin) / _HOUR_S, float(one[name]), "") for one in pieces]) for name in names
        ]
        charts += drawing.chart(title, "hours since the beginning", unit, series, is_line=True)
    when = " to ".join(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found[name])) for name in ("since_s", "until_s"))
    return (
        f'<!doctype html><meta charset="utf-8"><title>cpool report</title>\n<style>body {{ font-family: sans-serif }} '
        f"td {{ padding-right: 2em }} svg {{ display: block; margin: 1em 0 }}</style>\n<h1>Pool, {when}</h1>\n"
        f"<table>{table}</table>\n{charts}{_of_functions(found.get('functions', []))}"
    )
