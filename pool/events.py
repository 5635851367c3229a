"""What happens in a pool, a JSON object a line, in its directory; and how often it has since this controller began."""

from __future__ import annotations

import json
import os
import time
from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIZE_MAX = 16 << 20
"""A file that is larger becomes events.1, in place of the one before."""


class Events:
    """directory: of the pool."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "events")
        self.counts: Counter[tuple[str, str]] = Counter()

    def write(self, changes: list[dict[str, Any]]) -> None:
        """After they are on disk.  What cannot be written is left out: it has happened all the same."""
        if not changes:
            return
        now = time.time()
        lines = []
        for one in changes:
            self.counts[one["what"], _result(one)] += 1
            lines.append(json.dumps({"time_s": round(now, 3), **one}, separators=(",", ":")).encode() + b"\n")
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size, data = os.fstat(fd).st_size, b"".join(lines)
                if os.write(fd, data) < len(data):
                    os.ftruncate(fd, size)  # there is no room: no half of a line
                if os.fstat(fd).st_size > SIZE_MAX:
                    os.rename(self._path, self._path + ".1")
            finally:
                os.close(fd)
        except OSError:
            pass


def _result(one: dict[str, Any]) -> str:
    if one["what"] == "job" and one["state"] == "finished":
        return "done" if one["code"] == 0 else "failed"
    return str(one["state"])
