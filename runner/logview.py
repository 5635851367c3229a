"""What has been: crun logs, and crun events."""

from __future__ import annotations

import json
import os
import sys
import time

from cafs import atomic
from cafs.errors import DIFFERS, UsageError, quote
from runner import alive, containers, filters, logs
from runner.create import duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container

_FOREVER_NS = 1 << 63
_FILTERS: dict[str, tuple[str, ...]] = {"container": (), "event": (), "image": (), "type": ("container",)}


def moment(text: str) -> int:
    """Nanoseconds since 1970 of 10m (ago), seconds since 1970, or RFC 3339.  Raises UsageError."""
    try:
        if text.replace(".", "", 1).isdigit():
            return int(float(text) * 1e9)
        if text[:4].isdigit() and text[4:5] == "-":
            return _instant(text)
        return time.time_ns() - int(duration(text) * 1e9)
    except (ValueError, UsageError):
        raise UsageError(f"{quote(text)} is not a time", hint="10m, 2026-01-31T12:00:00Z, or seconds since 1970") from None


def _instant(text: str) -> int:
    """RFC 3339, whose parts may be missing from the end on; without a zone the time is our own.  Raises ValueError."""
    import re
    from datetime import datetime

    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:T(\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d:\d\d)?", text)
    if not found:
        raise ValueError(text)
    day, clock, fraction, zone = found.groups()
    seconds = int(datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone or ''}").timestamp())
    return seconds * 10**9 + int((fraction or "").ljust(9, "0"))


def show_logs(container: Container, options: Options) -> int:
    """Its output and errors, to ours; the exit code, 3 if some of it was never kept."""
    if container.asked["log"]["driver"] == "none":
        raise UsageError(f"container {quote(container.name)} keeps no log", hint="it was made with --log-driver none")
    tail = options.value("tail")
    if tail not in (None, "all") and not str(tail).isdigit():
        raise UsageError(f"--tail is a number of lines, not {quote(str(tail))}")
    since, until = _span(options)
    printer = _Printer(with_time=options.has("timestamps"))
    path, goes_on = container.path("log"), options.has("follow")
    skip = _LastLines(path, tail)

    def is_over() -> bool:
        return not goes_on or time.time_ns() > until or not alive.is_watched(container.id)

    for when, stream, data in logs.follow(path, is_over):
        if goes_on and when > until:
            break
        kept = skip.cut(data)
        if kept and since <= when <= until:
            printer.write(when, stream, kept)
    lost = int(container.state().get("log_lost", 0))
    if lost:
        logs.say_lost(container, lost)
    return DIFFERS if lost else 0


def _span(options: Options) -> tuple[int, int]:
    """--since and --until, in nanoseconds since 1970.  Raises UsageError."""
    until = options.value("until")
    return moment(options.value("since") or "0"), moment(until) if until else _FOREVER_NS


class _LastLines:
    """Leaves out all but the last TAIL lines of what is in a log now."""

    def __init__(self, path: str, tail: str | None) -> None:
        self.left = 0
        if tail not in (None, "all"):
            total, is_whole = 0, True
            for _, _, data in logs.read(path):
                total, is_whole = total + data.count(b"\n"), data.endswith(b"\n")
            self.left = max(total + (not is_whole) - int(str(tail)), 0)

    def cut(self, data: bytes) -> bytes:
        """What is left of a record."""
        while self.left and data:
            _, newline, data = data.partition(b"\n")
            self.left -= bool(newline)
        return data


class _Printer:
    def __init__(self, *, with_time: bool) -> None:
        self._with_time = with_time
        self._is_new_line = {"stdout": True, "stderr": True}

    def write(self, when: int, stream: str, data: bytes) -> None:
        fd = 2 if stream == "stderr" else 1
        if self._with_time:
            mark = logs.stamp(when).encode() + b" "
            lines = data.splitlines(keepends=True)
            starts = [self._is_new_line.get(stream, True), *([True] * (len(lines) - 1))]
            self._is_new_line[stream] = data.endswith(b"\n")
            data = b"".join((mark if is_new else b"") + line for line, is_new in zip(lines, starts, strict=True))
        atomic.write_all(fd, data)


def _tests(row: dict[str, Any]) -> dict[str, Callable[[str], bool]]:
    return {
        "container": lambda text: text == row["name"] or (bool(text) and row["id"].startswith(text)),
        "event": lambda text: text in (row["event"], row["event"].partition(":")[0]),
        "image": lambda text: text in (row["image"], row["image"].removesuffix(":latest")),
        "type": lambda text: text == "container",
    }


def events(options: Options) -> None:
    """JSON lines."""
    since, until = _span(options)
    wanted = filters.parse(options.all("filter"), _FILTERS)
    waits = options.has("follow") or until < _FOREVER_NS
    path, at, inode = containers.events_path(), 0, 0
    while True:
        try:
            with open(path, "rb") as file:
                at = at if os.fstat(file.fileno()).st_ino == inode else 0  # it was begun anew
                inode = os.fstat(file.fileno()).st_ino
                file.seek(at)
                for line in file:
                    at += len(line)
                    row = json.loads(line)
                    if since <= row["time_ns"] <= until and filters.fits(wanted, _tests(row)):
                        sys.stdout.write(json.dumps(row | {"time": logs.stamp(row["time_ns"])}, sort_keys=True) + "\n")
        except (FileNotFoundError, ValueError):
            pass
        sys.stdout.flush()
        if not waits or time.time_ns() > until:
            return
        time.sleep(0.1)
