"""What a workload read, in order: written by a recording mount, read to make a profile.  cafs-store(5), PROFILES.

Text: a header, then a line a first read: microseconds since the first, name of the object, offset and length of what was read
of it.  Of a small file there is one line, of a large one a line for each chunk.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time

from cafs.digest import CHUNK_LIST, CHUNK_LIST_SUFFIX, DIGEST_SIZES, PLAIN, object_name
from cafs.errors import FormatError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = "cafs-record 1"
_LINES_MAX = 1 << 24
_log = logging.getLogger(__name__)


class Read:
    """One first read.  at_us: microseconds since the first; kind: PLAIN, or CHUNK_LIST of a large file."""

    __slots__ = ("at_us", "digest", "kind", "length", "offset")

    def __init__(self, at_us: int, digest: bytes, kind: int, offset: int, length: int) -> None:
        self.at_us = at_us
        self.digest = digest
        self.kind = kind
        self.offset = offset
        self.length = length


class Recorder:
    """Appends to a record.  Thread-safe; a server that takes over goes on with the same file."""

    def __init__(self, path: str, hash_name: str, chunk_size: int) -> None:
        """Raises CafsError."""
        self._chunk_size = chunk_size
        self._seen: set[tuple[bytes, int]] = set()
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            if not os.fstat(self._fd).st_size:
                os.write(self._fd, f"{MAGIC} {hash_name}\n".encode())
        except OSError as error:
            raise os_error(f"cannot write record {quote(path)}", error) from error

    def saw(self, digest: bytes, kind: int, offset: int, size: int) -> None:
        """A range of an object is read."""
        if kind == PLAIN:
            parts = range(1)
        else:
            parts = range(offset // self._chunk_size, (offset + max(size, 1) - 1) // self._chunk_size + 1)
        new = [part for part in parts if (digest, part) not in self._seen]
        if not new:
            return
        with self._lock:
            self._seen.update((digest, part) for part in new)
            now = time.monotonic_ns() // 1000
            name, length = object_name(digest, kind), self._chunk_size if kind == CHUNK_LIST else size
            lines = "".join(f"{now} {name} {part * self._chunk_size} {length}\n" for part in new)
            try:
                os.write(self._fd, lines.encode())
            except OSError as error:  # not the reader's fault
                _log.error("cannot write record: %s", error.strerror)


def parse(path: str, hash_name: str) -> Iterator[Read]:
    """The reads of a record, each once, the first at 0 us.  Raises CafsError."""
    width = 2 * DIGEST_SIZES[hash_name]
    line_of = re.compile(r"([0-9]{1,18}) ([0-9a-f]{%d})(\.c)? ([0-9]{1,18}) ([0-9]{1,18})\n" % width)
    try:
        file = open(path, encoding="ascii", errors="replace")
    except OSError as error:
        raise os_error(f"cannot open record {quote(path)}", error) from error
    with file:
        if file.readline(200) != f"{MAGIC} {hash_name}\n":
            raise FormatError(f"{quote(path)} is not a record of {hash_name}", line=1)
        first = -1
        seen = set()
        for number in range(2, _LINES_MAX):
            line = file.readline(400)
            if not line:
                return
            found = line_of.fullmatch(line)
            if not found:
                raise FormatError(f"record {quote(path)} has a line that is none", line=number)
            key = found[2], found[3], found[4]
            if key not in seen:
                seen.add(key)
                first = int(found[1]) if first < 0 else first
                kind = CHUNK_LIST if found[3] == CHUNK_LIST_SUFFIX else PLAIN
                yield Read(max(int(found[1]) - first, 0), bytes.fromhex(found[2]), kind, int(found[4]), int(found[5]))
