"""cpool top: workers and jobs, live."""

from __future__ import annotations

import signal
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cafs import stopping
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pool.client import Client

_SHOWN = 20
_NODE = ("name", "state", "jobs", "free_cpus", "cpus", "load", "free_memory", "memory", "gpus", "reason")
_JOB = ("id", "state", "worker", "command")


def show(client: Client, *, once: bool) -> None:
    """Until Ctrl-C, or ONCE.  Raises CafsError when the controller ends."""
    _live(lambda: _picture(client), once=once)


def _live(picture: Callable[[], Any], *, once: bool) -> None:
    console = Console(highlight=False)
    if once:
        console.print(picture())
        return
    with Live(picture(), console=console, screen=True, refresh_per_second=2) as live:
        try:
            while True:
                stopping.wait(seconds=1)
                live.update(picture())
        except stopping.Ended as end:
            if end.number != signal.SIGINT:
                raise


_FUNCTION = (
    "name",
    "version",
    "instances",
    "starting",
    "running",
    "queued",
    "calls",
    "errors",
    "cold_share",
    "p50_s",
    "p95_s",
    "p99_s",
    "cost",
)


def show_rows(listed: Callable[[], list[dict[str, Any]]], *, once: bool) -> None:
    """Of functions.  Raises CafsError."""

    def picture() -> Table:
        table = Table(box=None, pad_edge=False)
        for name in _FUNCTION:
            table.add_column(name.removesuffix("_s").upper().replace("_", " "), overflow="ellipsis", no_wrap=True)
        for row in listed():
            table.add_row(*(_cell(name, row.get(name)) for name in _FUNCTION))
        return table

    _live(picture, once=once)


def _picture(client: Client) -> Group:
    nodes = client.ask("nodes")["nodes"]
    jobs = client.ask("jobs", all=False, limit=10_000)["jobs"]
    counts = Counter(job["state"] for job in jobs)
    free, every = (sum(node.get(name) or 0 for node in nodes) for name in ("free_cpus", "cpus"))
    head = f"{len(nodes)} workers, {every - free:g} of {every:g} CPUs used; jobs: "
    head += ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
    head += _money(client)
    workers, rows = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for name in _NODE:
        workers.add_column(name.upper().replace("_", " "), overflow="ellipsis", no_wrap=True)
    for node in nodes:
        workers.add_row(*(_cell(name, node.get(name)) for name in _NODE))
    for name in _JOB:
        rows.add_column(name.upper(), overflow="ellipsis", no_wrap=True)
    for job in sorted(jobs, key=lambda one: (one["state"] != "running", one["id"]))[:_SHOWN]:
        values = (job["id"], job["state"], job["worker"], " ".join(job["spec"]["command"]))
        rows.add_row(*(_cell(name, value) for name, value in zip(_JOB, values, strict=True)))
    return Group(Text(head), Text(""), workers, Text(""), rows)


def _money(client: Client) -> str:
    """What machines that were launched cost; '' if there is no cloud."""
    try:
        found = client.ask("cloud", what="ls")
    except CafsError:
        return ""
    text = f"\n{len(found['machines'])} machines launched, {found['price']:.4f} an hour, {found['spent_today']:.2f} today"
    return text + (f"; {found['problem']}" if found["problem"] else "")


def _cell(name: str, value: Any) -> Text:
    if "memory" in name and value is not None:
        value = f"{value / (1 << 30):.1f}G"
    text = f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
    return Text("".join(char if char.isprintable() else "?" for char in text))
