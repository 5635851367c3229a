"""What a build says while it goes on, on standard error: a line a step and what commands print, plain or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


class Row:
    """What became of a step.  seconds: that it took, or had taken when it was made; added: bytes of its layer's index."""

    __slots__ = ("added", "is_cached", "number", "seconds", "title")

    def __init__(self, number: int, title: str, seconds: float, *, is_cached: bool, added: int = 0) -> None:
        self.number = number
        self.title = title
        self.seconds = seconds
        self.is_cached = is_cached
        self.added = added


class Progress:
    """Says nothing; what it is told is kept for --explain and --report."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._titles: dict[int, str] = {}

    def begin(self, number: int, title: str) -> None:
        """A step begins."""
        self._titles[number] = title

    def output(self, number: int, data: bytes) -> None:
        """Its command has printed something."""

    def done(self, number: int, seconds: float, added: int) -> None:
        """It was carried out."""
        self.rows.append(Row(number, self._titles[number], seconds, is_cached=False, added=added))

    def cached(self, number: int, saved: float) -> None:
        """It was made before."""
        self.rows.append(Row(number, self._titles[number], saved, is_cached=True))

    def failed(self, tail: bytes) -> None:
        """The last step has failed.  tail: the end of what its command has printed."""
        sys.stderr.write(tail.decode("utf-8", "replace"))
        sys.stderr.write("" if tail.endswith(b"\n") or not tail else "\n")

    def warn(self, text: str) -> None:
        """Something that the user should know."""


class Plain(Progress):
    """A line each, for logs; groups and annotations where GitHub Actions reads them.

    Groups cannot be inside one another: of steps that run at once the first is shown, the others are when it has ended.
    """

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._is_at_start = True
        self._is_grouped = os.environ.get("GITHUB_ACTIONS") == "true"
        self._began: dict[int, float] = {}
        self._last = 0
        self._shown = 0
        self._waiting: dict[int, list[str]] = {}

    def begin(self, number: int, title: str) -> None:
        super().begin(number, title)
        self._began[number] = time.monotonic()
        if self._is_grouped and self._shown:
            self._waiting[number] = []
        self._shown = self._shown or number
        self._say(number, f"{'::group::' if self._is_grouped else ''}#{number} {title}")

    def _say(self, number: int, text: str) -> None:
        """A line of a step, or of nobody (0)."""
        waiting = self._waiting.get(number)
        is_at_start = self._is_at_start if waiting is None else not waiting or waiting[-1].endswith("\n")
        line = ("" if is_at_start else "\n") + (text + "\n" if text else "")
        if waiting is not None:
            waiting.append(line)
            return
        self._out.write(line)
        self._out.flush()
        self._is_at_start = True

    def output(self, number: int, data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        if number in self._waiting:
            self._waiting[number].append(text)
            return
        if not self._is_at_start and number != self._last:
            self._say(number, "")
        self._last = number
        for line in text.splitlines(keepends=True):
            if self._is_at_start:
                self._out.write(f"#{number} {time.monotonic() - self._began.get(number, 0):.3f} ")
            self._out.write(line)
            self._is_at_start = line.endswith("\n")
        self._out.flush()

    def done(self, number: int, seconds: float, added: int) -> None:
        super().done(number, seconds, added)
        self._end(number, f"#{number} DONE {seconds:.1f}s")

    def cached(self, number: int, saved: float) -> None:
        super().cached(number, saved)
        self._end(number, f"#{number} CACHED")

    def _end(self, number: int, text: str) -> None:
        self._say(number, text)
        if not self._is_grouped:
            return
        self._say(number, "::endgroup::")
        del self._began[number]
        if number == self._shown:
            self._show_waiting()

    def _show_waiting(self) -> None:
        """Show what has ended meanwhile, and then of one that still runs what it has said."""
        self._shown = 0
        for number in sorted(self._waiting, key=lambda one: one in self._began):
            text = "".join(self._waiting.pop(number))
            self._out.write(text)
            self._is_at_start = text.endswith("\n")
            if number in self._began:
                self._shown = number
                break
        self._out.flush()

    def failed(self, tail: bytes) -> None:
        self._say(0, "::endgroup::" if self._is_grouped and self._shown else "")
        while self._waiting:
            self._show_waiting()
            self._say(0, "::endgroup::" if self._shown else "")

    def warn(self, text: str) -> None:
        self._say(0, f"{'::warning::' if self._is_grouped else 'cbuild: warning: '}{text}")


class Json(Progress):
    """An object a line, for programs."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def _say(self, **what: object) -> None:
        self._out.write(json.dumps(what, sort_keys=True) + "\n")
        self._out.flush()

    def begin(self, number: int, title: str) -> None:
        super().begin(number, title)
        self._say(event="begin", step=number, title=title, time=time.time())

    def output(self, number: int, data: bytes) -> None:
        self._say(event="output", step=number, text=data.decode("utf-8", "replace"))

    def done(self, number: int, seconds: float, added: int) -> None:
        super().done(number, seconds, added)
        self._say(event="done", step=number, seconds=round(seconds, 3))

    def cached(self, number: int, saved: float) -> None:
        super().cached(number, saved)
        self._say(event="cached", step=number, saved_seconds=saved)

    def failed(self, tail: bytes) -> None:
        self._say(event="failed")

    def warn(self, text: str) -> None:
        self._say(event="warning", text=text)


def chosen(name: str, *, is_quiet: bool) -> Progress:
    """auto, plain or json."""
    if is_quiet:
        return Progress()
    return Json(sys.stderr) if name == "json" else Plain(sys.stderr)
