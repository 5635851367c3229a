"""Which content a file had when it was last indexed: (dev, ino, size, mtime_ns, ctime_ns) -> digest.

Only a hint, kept in the cache directory, with a checksum; a damaged one counts as absent.  An entry whose ctime is not well
before the start of the scan that made it is not kept: the file may change again within one tick of the clock (git's racy
rule, Documentation/technical/racy-git).
"""

from __future__ import annotations

import hashlib
import os
import struct

from cafs import atomic, paths
from cafs.digest import checksum

MAGIC = b"CAFSSTC1"
RACY_NS = 2_000_000_000
_RECORD = struct.Struct("<QQqqqB32s")
_LIMIT = 1 << 30

Key = tuple[int, int]
Stamp = tuple[int, int, int]


class StatCache:
    """The remembered files of one root directory with one hash."""

    def __init__(self, root: str, hash_name: str, digest_size: int) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(root)) + b"\0" + hash_name.encode()).hexdigest()[:32]
        self.path = os.path.join(paths.cache(), "stat", name)
        self.digest_size = digest_size
        self._known: dict[Key, tuple[Stamp, int, bytes]] = {}
        self._seen: list[bytes] = []

    def load(self) -> None:
        """Read what the last scan left."""
        try:
            data = atomic.read_file(self.path, _LIMIT)
        except OSError:
            return
        body = data[len(MAGIC) + 16 :]
        if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : len(MAGIC) + 16] != checksum(body) or len(body) % _RECORD.size:
            return
        for device, inode, size, mtime_ns, ctime_ns, kind, digest in _RECORD.iter_unpack(body):
            self._known[device, inode] = ((size, mtime_ns, ctime_ns), kind, digest[: self.digest_size])

    def get(self, status: os.stat_result) -> tuple[int, bytes] | None:
        """(object kind, digest) if the file is as it was; the caller still asks whether the object is there."""
        found = self._known.get((status.st_dev, status.st_ino))
        if found and found[0] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns):
            return found[1], found[2]
        return None

    def add(self, status: os.stat_result, kind: int, digest: bytes, scan_start_ns: int) -> None:
        """Remember a file for the next scan, unless its ctime is too fresh to be trusted."""
        if status.st_ctime_ns < scan_start_ns - RACY_NS:
            stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            self._seen.append(_RECORD.pack(status.st_dev, status.st_ino, *stamp, kind, digest))

    def save(self) -> None:
        """Write what this scan saw.  A failure costs time at the next scan and nothing else."""
        body = b"".join(self._seen)
        try:
            paths.make_private(paths.cache(), os.path.dirname(self.path))
            atomic.replace_file(self.path, MAGIC + checksum(body) + body, 0o600)
        except OSError:
            pass
