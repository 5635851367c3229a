"""The objects of an image as one sorted file, for whoever has to find one by its digest without reading an index.

cafs-store(5), CACHE.  Derived from the image's indexes and locators; it is mapped, so that many processes share its memory.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from array import array

from cafs import atomic
from cafs.digest import DIGEST_SIZES, PLAIN, checksum
from cafs.errors import FormatError
from cafs.pack import FRAME, RAW_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cafs.index import Index
    from cafs.locator import Locator, Place
    from cafs.store import Store

MAGIC = b"CAFSOBJ1"
CHUNK = 2
"""Beside PLAIN and CHUNK_LIST: a record that says only where a chunk is."""

_HEAD = struct.Struct("<8s16s16s64sII")
"""magic, checksum of the rest, hash name, image digest, number of packs, number of records."""

_TAIL = struct.Struct("<QIIQ")
_NUMBER = struct.Struct("<I")
_NOWHERE = 0xFFFF_FFFF


class ObjectTable:
    """An open table.  image: digest of the image it is of.  Nothing in it is to be believed but sizes and names."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Raises FormatError."""
        if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
            raise FormatError("not a table of objects")
        _, check, name, image, packs, count = _HEAD.unpack_from(data)
        self.hash_name = name.rstrip(b"\0").decode("latin-1")
        width = DIGEST_SIZES.get(self.hash_name, 0)
        self._key = width + 1
        self._row = self._key + _TAIL.size
        self._start = _HEAD.size + packs * width
        self._order = self._start + count * self._row
        if not width or self._order + 4 * count != len(data) or checksum(memoryview(data)[24:]) != check:
            raise FormatError("table of objects is damaged")
        self.image: bytes = image[:width]
        self.packs = [data[at : at + width].hex() for at in range(_HEAD.size, self._start, width)]
        self._data = data
        self._count = int(count)

    def __len__(self) -> int:
        return self._count

    def find(self, digest: bytes, kind: int) -> int | None:
        """Number of an object's record."""
        key = digest + bytes([kind])
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            at = self._start + middle * self._row
            if self._data[at : at + self._key] < key:
                low = middle + 1
            else:
                high = middle
        at = self._start + low * self._row
        return low if low < self._count and self._data[at : at + self._key] == key else None

    def record(self, number: int) -> tuple[bytes, int, int, Place | None]:
        """(digest, kind, size of the file, where the object may be)."""
        at = self._start + number * self._row
        size, pack, stored, offset = _TAIL.unpack_from(self._data, at + self._key)
        is_place = pack < len(self.packs) and FRAME.size <= stored <= FRAME.size + RAW_MAX
        place = (self.packs[pack], offset, stored) if is_place else None
        return self._data[at : at + self._key - 1], self._data[at + self._key - 1], size, place

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """(digest, kind) of every file's object."""
        for number in range(self._count):
            digest, kind, _, _ = self.record(number)
            if kind != CHUNK:
                yield digest, kind

    def block(self, pack: str, start: int, size: int) -> list[tuple[bytes, int, int]]:
        """(digest, offset, size of the frame) of the plain objects that begin in a part of a pack, by offset."""
        number = self.packs.index(pack)
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if self._at(middle)[0] < (number, start):
                low = middle + 1
            else:
                high = middle
        found = []
        while low < self._count:
            (where, offset), stored, record = self._at(low)
            if where != number or offset >= start + size:
                break
            at = self._start + record * self._row
            if self._data[at + self._key - 1] == PLAIN:
                found.append((bytes(self._data[at : at + self._key - 1]), offset, stored))
            low += 1
        return found

    def _at(self, rank: int) -> tuple[tuple[int, int], int, int]:
        """((pack, offset), size of the frame, record) of the object with so many before it in the order of the packs."""
        (record,) = _NUMBER.unpack_from(self._data, self._order + 4 * rank)
        at = self._start + min(record, self._count - 1) * self._row + self._key
        _, pack, stored, offset = _TAIL.unpack_from(self._data, at)
        return (pack, offset), stored, record

    def chunk(self, digest: bytes) -> Place | None:
        """Where a chunk may be."""
        number = self.find(digest, CHUNK)
        return None if number is None else self.record(number)[3]


def encode(store: Store, image: bytes, layers: Iterable[Index]) -> bytes:
    """The table of an image, from its layers' indexes and their locators."""
    from cafs.locator import contents

    packs: dict[str, int] = {}
    rows: dict[bytes, bytes] = {}

    def add(digest: bytes, kind: int, size: int, place: Place | None) -> None:
        where = (packs.setdefault(place[0], len(packs)), place[2], place[1]) if place else (_NOWHERE, 0, 0)
        rows.setdefault(digest + bytes([kind]), _TAIL.pack(size, *where))

    for index in layers:
        found: Locator | None = store.get_locator(index.identity)
        sizes = (size for kind, size in zip(index.type, index.size, strict=True) if kind in b"fF" and size)
        for number, ((digest, kind), size) in enumerate(zip(contents(index), sizes, strict=True)):
            add(digest, kind, size, found.place(number) if found else None)
        for digest in found.chunks() if found else ():
            add(digest, CHUNK, 0, found.chunk(digest) if found else None)
    width = DIGEST_SIZES[store.hash_name]
    places = [_TAIL.unpack(row)[1::2] for _, row in sorted(rows.items())]
    order = array("I", sorted(range(len(places)), key=places.__getitem__))
    if sys.byteorder == "big":
        order.byteswap()
    body = b"".join(map(bytes.fromhex, packs)) + b"".join(key + row for key, row in sorted(rows.items())) + order.tobytes()
    rest = _HEAD.pack(MAGIC, b"", store.hash_name.encode(), image.ljust(width, b"\0"), len(packs), len(rows))[24:] + body
    return MAGIC + checksum(rest) + rest


def load(path: str) -> ObjectTable:
    """Map a table.  Raises OSError, FormatError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return ObjectTable(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise FormatError("table of objects is empty") from error
    finally:
        os.close(fd)


def save(path: str, data: bytes) -> None:
    """Keep a table; a reader sees all of it or none."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    atomic.replace_file(path, data, 0o600)
