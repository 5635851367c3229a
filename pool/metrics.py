"""A pool in numbers, as Prometheus reads them (its text exposition format, version 0.0.4)."""

from __future__ import annotations

from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.controller import Controller

TYPE = "text/plain; version=0.0.4"


def text(controller: Controller) -> str:
    """All of them."""
    nodes = [remote.shown() for remote in controller.remotes.values()]
    jobs = Counter(job.state for job in controller.jobs.values())
    out: list[str] = []

    def put(name: str, kind: str, about: str, rows: list[tuple[str, float]]) -> None:
        out.append(f"# HELP cpool_{name} {about}")
        out.append(f"# TYPE cpool_{name} {kind}")
        out.extend(f"cpool_{name}{labels} {value:g}" for labels, value in rows)

    put("jobs", "gauge", "Jobs that have not ended, by state.", [(_label("state", one), jobs[one]) for one in sorted(jobs)])
    counts = sorted(controller.events.counts.items())
    for what in ("job", "machine"):
        rows = [(_label("state", state), float(many)) for (kind, state), many in counts if kind == what]
        put(f"{what}_changes_total", "counter", f"How often a {what} has come to a state, since the controller began.", rows)
    states = Counter(str(one["state"]) for one in nodes)
    put("workers", "gauge", "Workers, by state.", [(_label("state", one), states[one]) for one in sorted(states)])
    for name in ("cpus", "free_cpus", "memory", "free_memory", "gpus", "load"):
        rows = [(_label("worker", str(one["name"])), float(one[name])) for one in nodes if name in one]
        put(f"worker_{name}", "gauge", f"{name.replace('_', ' ')} of a worker.", rows)
    if controller.fleet:
        shown = controller.fleet.shown()
        put("price_per_hour", "gauge", "What the machines that were launched cost an hour.", [("", shown["price"])])
        put("spent_today", "gauge", "What they have cost since midnight, UTC.", [("", shown["spent_today"])])
        put("launches_stopped", "gauge", "1 if too many machines in a row did not come up.", [("", float(shown["is_stopped"]))])
    return "\n".join(out) + "\n"


def _label(name: str, value: str) -> str:
    value = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{name}="{value}"}}'
