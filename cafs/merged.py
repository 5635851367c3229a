"""The merged locator: all footers of a store as one sorted file in the cache, so that a look-up is one bisection.

cafs-store(5), LOCATORS.  Only a hint: rebuilt from the footers, damaged or missing counts as empty.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
import os
import struct
from bisect import bisect_left

from cafs import atomic, paths
from cafs.digest import DIGEST_SIZES, checksum
from cafs.pack import FRAME, RAW_MAX, Records, prefixes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAGIC = b"CAFSMRG1"
MERGE_PACKS = 16
"""So many packs that are not merged are looked up one by one; one more, and all are merged."""

MERGE_OBJECTS = 4096
"""The same for the objects in them, unless the merged part is over ten times as large: a merge rewrites everything."""

_HEAD = struct.Struct("<16sII")
_SIZE = struct.Struct("<Q")
_TAIL = struct.Struct(">IQI")
_BODY = len(MAGIC) + 16


class Merged:
    """An open merged locator.  packs: name -> size in bytes, in the order of their numbers."""

    def __init__(
        self, hash_name: str, packs: dict[str, int] | None = None, data: bytes | mmap.mmap = b"", start: int = 0
    ) -> None:
        self.hash_name = hash_name
        self.digest_size = DIGEST_SIZES[hash_name]
        self.record_size = self.digest_size + 1 + _TAIL.size
        self.packs = packs or {}
        self._names = list(self.packs)
        self._data = data
        self._count = (len(data) - start) // (8 + self.record_size)
        self._start = start + 8 * self._count
        self._prefixes = memoryview(data)[start : self._start].cast("Q")

    def __len__(self) -> int:
        return self._count

    def _record(self, number: int) -> bytes:
        at = self._start + number * self.record_size
        return self._data[at : at + self.record_size]

    def locate(self, digest: bytes, kind: int) -> Iterator[tuple[str, int, int]]:
        """(pack, offset, frame size) of every copy of an object."""
        key = digest + bytes([kind])
        prefix = int.from_bytes(digest[:8], "big")
        number = bisect_left(self._prefixes, prefix)
        while number < self._count:
            record = self._record(number)
            if record.startswith(key):
                pack, offset, stored = _TAIL.unpack_from(record, len(key))
                if pack < len(self._names) and FRAME.size <= stored <= FRAME.size + RAW_MAX:
                    yield self._names[pack], offset, stored
            elif record > key:
                return
            number += 1

    def records(self, numbers: Mapping[str, int]) -> Iterator[bytes]:
        """The records of the packs in NUMBERS, with these numbers, in order where the order of the packs is kept."""
        split = self.digest_size + 1
        renumbered = [numbers.get(name, -1) for name in self._names]
        for at in range(self._count):
            record = self._record(at)
            pack, offset, stored = _TAIL.unpack_from(record, split)
            if pack < len(renumbered) and renumbered[pack] >= 0:
                yield record[:split] + _TAIL.pack(renumbered[pack], offset, stored)


def path_of(identity: str, hash_name: str) -> str:
    """Where the merged locator of a store is kept.  identity: of its backend."""
    name = hashlib.sha256(os.fsencode(identity) + b"\0" + hash_name.encode()).hexdigest()[:32]
    return os.path.join(paths.cache(), "locator", name)


def load(identity: str, hash_name: str) -> Merged:
    """What was saved for a store; empty if there is nothing, or nothing sound."""
    try:
        fd = os.open(path_of(identity, hash_name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)  # in the cache, so on a local disk, and only ever replaced
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return Merged(hash_name)
    found = _open(hash_name, data)
    return Merged(hash_name) if found is None else found


def _open(hash_name: str, data: bytes | mmap.mmap) -> Merged | None:
    head = _BODY + _HEAD.size
    if len(data) < head or data[: len(MAGIC)] != MAGIC:
        return None
    if checksum(memoryview(data)[_BODY:]) != data[len(MAGIC) : _BODY]:
        return None
    name, count, zero = _HEAD.unpack_from(data, _BODY)
    row = DIGEST_SIZES[hash_name] + _SIZE.size
    start = head + count * row
    if name.rstrip(b"\0") != hash_name.encode() or zero or start > len(data):
        return None
    packs = {}
    for at in range(head, start, row):
        packs[data[at : at + row - _SIZE.size].hex()] = _SIZE.unpack_from(data, at + row - _SIZE.size)[0]
    found = Merged(hash_name, packs, data, start)
    return found if len(packs) == count and start + len(found) * (8 + found.record_size) == len(data) else None


def is_due(merged: Merged, footers: Mapping[str, Records]) -> bool:
    """Whether so much is outside of the merged part that merging pays."""
    objects = sum(map(len, footers.values()))
    return len(footers) > MERGE_PACKS or objects > max(MERGE_OBJECTS, len(merged) // 10)


def merge(identity: str, merged: Merged, footers: Mapping[str, Records], sizes: Mapping[str, int]) -> Merged:
    """Fold FOOTERS in and save the result; it is used from memory where it cannot be saved.

    sizes: of the packs that count, name -> bytes; what is merged of any other is dropped.
    """
    kept = [name for name in merged.packs if name in sizes]
    packs = {name: sizes[name] for name in [*kept, *sorted(footers)]}
    numbers = {name: number for number, name in enumerate(packs)}
    parts: list[Iterator[bytes]] = [merged.records({name: numbers[name] for name in kept})]
    parts += [_rows(records, numbers[name]) for name, records in sorted(footers.items())]
    head = _HEAD.pack(merged.hash_name.encode(), len(packs), 0)
    rows = b"".join(bytes.fromhex(name) + _SIZE.pack(size) for name, size in packs.items())
    records = b"".join(heapq.merge(*parts))
    body = head + rows + prefixes(records, merged.record_size).tobytes() + records
    data = MAGIC + checksum(body) + body
    path = path_of(identity, merged.hash_name)
    try:
        paths.make_private(paths.cache(), os.path.dirname(path))
        atomic.replace_file(path, data, 0o600)
    except OSError:
        pass
    saved = load(identity, merged.hash_name)
    if saved.packs != packs:  # it was not saved, or another process was later
        return Merged(merged.hash_name, packs, data, _BODY + len(head) + len(rows))
    return saved


def _rows(records: Records, number: int) -> Iterator[bytes]:
    for digest, kind, offset, stored, _ in records.rows():
        yield digest + bytes([kind]) + _TAIL.pack(number, offset, stored)
