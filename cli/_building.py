"""The progress of a build on a terminal: a line a step, and below the one that runs what its command has said last."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from builder.progress import Progress

_LAST = 6
_SHOWN = 30
_KEPT = 4096


class Terminal(Progress):
    """As BuildKit's.  Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(file=sys.stderr, highlight=False)
        self._lines: list[Text] = []
        self._running: dict[int, tuple[str, float]] = {}
        self._said: dict[int, str] = {}
        self._start = time.monotonic()
        self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Terminal:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        for line in self._lines:
            self._console.print(line)

    def _picture(self) -> Group:
        rows = self._lines[-_SHOWN:]
        for number, (title, began) in sorted(self._running.items()):
            rows = [*rows, self._row("=>", title, f"{time.monotonic() - began:.1f}s", "bold")]
            said = self._said.get(number, "").splitlines()[-_LAST:]
            rows += [Text(f"   # {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in said]
        head = Text(f"[+] building {time.monotonic() - self._start:.1f}s ({len(self._lines)} steps)")
        return Group(head, *rows)

    def _row(self, mark: str, title: str, right: str, style: str = "") -> Text:
        width = max(self._console.width - len(right) - len(mark) - 3, 10)
        title = title if len(title) <= width else title[: width - 1] + "…"
        return Text(f" {mark} {title:<{width}}{right}", style=style, no_wrap=True, overflow="ellipsis")

    def begin(self, number: int, title: str) -> None:
        super().begin(number, title)
        self._running[number] = title, time.monotonic()

    def output(self, number: int, data: bytes) -> None:
        text = data.decode("utf-8", "replace").replace("\r", "\n")
        self._said[number] = (self._said.get(number, "") + "".join(c if c.isprintable() or c == "\n" else " " for c in text))[
            -_KEPT:
        ]

    def done(self, number: int, seconds: float, added: int) -> None:
        super().done(number, seconds, added)
        self._finish(number, "", f"{seconds:.1f}s")

    def cached(self, number: int, saved: float) -> None:
        super().cached(number, saved)
        self._finish(number, "CACHED ", "0.0s", "blue")

    def _finish(self, number: int, mark: str, right: str, style: str = "") -> None:
        title, _ = self._running.pop(number, ("", 0.0))
        self._lines.append(self._row("=>", mark + title, right, style))

    def failed(self, tail: bytes) -> None:
        for number, (_, began) in list(self._running.items()):
            self._finish(number, "ERROR ", f"{time.monotonic() - began:.1f}s", "red")
        self._live.stop()
        self._console.print(Text(tail.decode("utf-8", "replace").rstrip("\n"), style="dim"))

    def warn(self, text: str) -> None:
        self._console.print(f"cbuild: warning: {text}", markup=False)
