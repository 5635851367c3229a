"""A container's log: JSON lines of time, stream and bytes, rotated by size.  cafs-container(5), LOG.

A record holds what was read at once, which may be many lines, or part of one: the bytes of all records of a stream in order are
what the container wrote, whatever they are.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time

from cafs import atomic
from cafs.errors import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from runner.containers import Container

    Record = tuple[int, str, bytes]  # nanoseconds since 1970, stream, bytes

_FILES_MAX = 100


class Log:
    """What is written.  max_size: bytes of a file; max_files: how many are kept, the one that grows among them.

    A full disk stops nobody: lost is how many bytes could not be written, why the last reason.
    """

    def __init__(self, path: str, max_size: int, max_files: int) -> None:
        self.path = path
        self.lost, self.why = 0, ""
        self._max_size = max_size
        self._max_files = max_files
        self._fd = -1
        self._try(self._begin)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _begin(self) -> None:
        if self._fd < 0:
            self._fd = self._open()

    def _try(self, step: Callable[[], None]) -> bool:
        try:
            step()
            return True
        except OSError as error:
            self.why = error.strerror or str(error)
            return False

    def size(self) -> int:
        """Bytes of the file that grows."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def last(self, stream: str) -> bytes | None:
        """What the last record of a stream holds, None if there is none in the file that grows."""
        with open(self.path, "rb") as file:
            records = [one for one in map(decode, file) if one and one[1] == stream]
        return records[-1][2] if records else None

    def write(self, stream: str, data: bytes) -> None:
        """One record, by one write(2)."""
        row: dict[str, object] = {"time": stamp(time.time_ns()), "stream": stream}
        try:
            row["log"] = data.decode()
        except UnicodeDecodeError:
            row["log_b64"] = base64.b64encode(data).decode()
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        if not self._try(lambda: self._add(line)):
            self.lost += len(data)
        elif self.size() > self._max_size:
            self._rotate()

    def _add(self, line: bytes) -> None:
        self._begin()
        before = self.size()
        try:
            atomic.write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, before)  # half a line would spoil the next, too
            raise

    def _rotate(self) -> None:
        """Where that cannot be done it goes on in the same file."""
        try:
            for number in range(self._max_files - 1, 0, -1):
                older = f"{self.path}.{number - 1}" if number > 1 else self.path
                try:
                    os.rename(older, f"{self.path}.{number}")
                except FileNotFoundError:
                    continue
            if self._max_files == 1:
                os.unlink(self.path)
            new = self._open()
        except OSError:
            return
        old, self._fd = self._fd, new
        os.close(old)


def say_lost(container: Container, lost: int, why: str = "no room on the disk") -> None:
    """A log is not whole."""
    sys.stderr.write(f"crun: warning: the log of container {quote(container.name)} lacks {lost} bytes: {why}\n")


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
    """All records that are there, the oldest first; a last one that is not whole is left out."""
    return follow(path, lambda: True)


def decode(line: bytes) -> Record | None:
    """A record; None if the line is none."""
    try:
        row = json.loads(line)
        data = base64.b64decode(row["log_b64"]) if "log_b64" in row else row["log"].encode("utf-8", "surrogatepass")
        return parse_stamp(row["time"]), str(row["stream"]), data
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def follow(path: str, is_over: Callable[[], bool], pause_s: float = 0.05) -> Iterator[Record]:
    """All records, the oldest first, and those that come, also when files are rotated, until IS_OVER() and nothing is left."""
    file, rest = None, b""
    try:
        while True:
            ended = is_over()
            if file is None:
                file = _open_oldest(path)
                if file is None:
                    if ended:
                        return
                    time.sleep(pause_s)
                    continue
            newer = _newer(file.fileno(), path)  # asked before the end is read: nothing is added after that
            is_any = False
            while chunk := file.read(1 << 16):
                is_any = True
                *lines, rest = (rest + chunk).split(b"\n")
                yield from filter(None, map(decode, lines))
            if newer:
                file.close()
                file, rest = newer, b""
            elif not is_any:
                if ended:
                    return
                time.sleep(pause_s)
    finally:
        if file is not None:
            file.close()


def _open_oldest(path: str) -> IO[bytes] | None:
    return _open_first(path, range(_FILES_MAX, -1, -1))


def _open_first(path: str, numbers: range) -> IO[bytes] | None:
    """The first that is there of log.N, of which 0 is the one that grows; a kill while they are renamed leaves a gap."""
    for number in numbers:
        try:
            return open(f"{path}.{number}" if number else path, "rb")
        except FileNotFoundError:
            continue
    return None


def _newer(fd: int, path: str) -> IO[bytes] | None:
    """The file that comes after an open one, None if that is the one that grows.  Looks again if it was rotated meanwhile."""
    mine = os.fstat(fd).st_ino
    for _ in range(_FILES_MAX):
        try:
            if os.stat(path).st_ino == mine:
                return None
            for number in range(1, _FILES_MAX + 1):
                if not _is(f"{path}.{number}", mine):
                    continue
                found = _open_first(path, range(number - 1, -1, -1))
                if found is not None and _is(f"{path}.{number}", mine):
                    return found
                if found is not None:
                    found.close()
                break
        except FileNotFoundError:
            pass
        if not os.path.exists(path):
            return None  # just being rotated, or removed
    return _open_oldest(path)  # it is gone itself: what is left begins with the oldest


def _is(path: str, inode: int) -> bool:
    try:
        return os.stat(path).st_ino == inode
    except FileNotFoundError:
        return False
