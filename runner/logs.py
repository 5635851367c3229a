"""A container's log: JSON lines of time, stream and bytes, rotated by size.  cafs-container(5), LOG.

A record holds what was read at once, which may be many lines, or part of one: the bytes of all records of a stream in order are
what the container wrote, whatever they are.
"""

from __future__ import annotations

import base64
import json
import os
import time

from cafs import atomic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Record = tuple[int, str, bytes]  # nanoseconds since 1970, stream, bytes


class Log:
    """What is written.  max_size: bytes of a file; max_files: how many are kept, the one that grows among them."""

    def __init__(self, path: str, max_size: int, max_files: int) -> None:
        self.path = path
        self._max_size = max_size
        self._max_files = max_files
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def size(self) -> int:
        """Bytes of the file that grows."""
        return os.fstat(self._fd).st_size

    def last(self, stream: str) -> bytes | None:
        """What the last record of a stream holds, None if there is none in the file that grows."""
        with open(self.path, "rb") as file:
            records = [one for one in map(decode, file) if one and one[1] == stream]
        return records[-1][2] if records else None

    def write(self, stream: str, data: bytes) -> None:
        """One record, by one write(2).  Raises OSError."""
        row: dict[str, object] = {"time": stamp(time.time_ns()), "stream": stream}
        try:
            row["log"] = data.decode()
        except UnicodeDecodeError:
            row["log_b64"] = base64.b64encode(data).decode()
        atomic.write_all(self._fd, json.dumps(row, separators=(",", ":")).encode() + b"\n")
        if os.fstat(self._fd).st_size > self._max_size:
            self._rotate()

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(self._max_files - 1, 0, -1):
            older = f"{self.path}.{number - 1}" if number > 1 else self.path
            try:
                os.rename(older, f"{self.path}.{number}")
            except FileNotFoundError:
                continue
        if self._max_files == 1:
            os.unlink(self.path)
        self._fd = self._open()


def stamp(ns: int) -> str:
    """RFC 3339, UTC, with nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9)) + f".{ns % 10**9:09d}Z"


def parse_stamp(text: str) -> int:
    """Nanoseconds since 1970 of what `stamp` has made.  Raises ValueError."""
    import calendar

    seconds, _, fraction = text.removesuffix("Z").partition(".")
    whole = calendar.timegm(time.strptime(seconds, "%Y-%m-%dT%H:%M:%S"))
    return whole * 10**9 + int(fraction.ljust(9, "0")[:9] or 0)


def read(path: str) -> Iterator[Record]:
    """All records, the oldest first; a last one that is not whole is left out."""
    for number in range(100, -1, -1):
        try:
            with open(f"{path}.{number}" if number else path, "rb") as file:
                for line in file:
                    if record := decode(line):
                        yield record
        except FileNotFoundError:
            continue


def decode(line: bytes) -> Record | None:
    """A record; None if the line is none."""
    try:
        row = json.loads(line)
        data = base64.b64decode(row["log_b64"]) if "log_b64" in row else row["log"].encode("utf-8", "surrogatepass")
        return parse_stamp(row["time"]), str(row["stream"]), data
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def follow(path: str, is_over: object, pause_s: float = 0.05) -> Iterator[Record]:
    """Records from now on, also after the file was rotated, until IS_OVER() and nothing is left."""
    file, rest = None, b""
    try:
        while True:
            ended = is_over()  # type: ignore[operator]
            if file is None:
                try:
                    file = open(path, "rb")
                except FileNotFoundError:
                    if ended:
                        return
                    time.sleep(pause_s)
                    continue
            is_any = False
            while chunk := file.read(1 << 16):
                is_any = True
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if record := decode(line):
                        yield record
            if not is_any:
                if _is_rotated(file.fileno(), path):
                    file.close()
                    file, rest = None, b""
                elif ended:
                    return
                else:
                    time.sleep(pause_s)
    finally:
        if file is not None:
            file.close()


def _is_rotated(fd: int, path: str) -> bool:
    try:
        return os.stat(path).st_ino != os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
