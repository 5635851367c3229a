"""The locator of an index: the objects that it needs, sorted by digest, with their sizes and where they are.

cafs-store(5), LOCATORS.  By it a mount finds an object without reading a footer, or the index.  Derived and only a hint: what
is read by it is checked against its digest all the same.  It is mapped, so that many processes share its memory.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from array import array
from itertools import count as counting

from cafs import atomic
from cafs.digest import CHUNK_LIST, DIGEST_SIZES, PLAIN, checksum
from cafs.errors import FormatError
from cafs.pack import FRAME, RAW_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from cafs.index import Index
    from cafs.packs import Packs

    Key = tuple[bytes, int]

Place = tuple[str, int, int]
"""Pack name, offset, size of the frame."""

MAGIC = b"CAFSLOC1"
CHUNK = 2
"""Beside PLAIN and CHUNK_LIST: a record that says only where a chunk is."""

_HEAD = struct.Struct("<8s16s16s64sII")
"""magic, checksum of the rest, hash name, digest of the index, number of packs, number of records."""

_TAIL = struct.Struct("<QIIQ")
_NUMBER = struct.Struct("<I")
_NOWHERE = 0xFFFF_FFFF
_OFFSET_MAX = 1 << 62


class Locator:
    """An open locator.  index: digest of the index that it is of.  data: its bytes.  Nothing in it is to be believed."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Raises FormatError."""
        if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
            raise FormatError("not a locator")
        _, check, name, index, packs, count = _HEAD.unpack_from(data)
        self.hash_name = name.rstrip(b"\0").decode("latin-1")
        width = DIGEST_SIZES.get(self.hash_name, 0)
        self._key = width + 1
        self._row = self._key + _TAIL.size
        self._start = _HEAD.size + packs * width
        self._order = self._start + count * self._row
        if not width or self._order + 4 * count != len(data) or checksum(memoryview(data)[24:]) != check:
            raise FormatError("locator has a bad checksum, or its sizes do not add up")
        self.index: bytes = index[:width]
        self.packs = [data[at : at + width].hex() for at in range(_HEAD.size, self._start, width)]
        self.data = data
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
            if self.data[at : at + self._key] < key:
                low = middle + 1
            else:
                high = middle
        at = self._start + low * self._row
        return low if low < self._count and self.data[at : at + self._key] == key else None

    def record(self, number: int) -> tuple[bytes, int, int, Place | None]:
        """(digest, kind, size of the file, where the object may be)."""
        at = self._start + number * self._row
        size, pack, stored, offset = _TAIL.unpack_from(self.data, at + self._key)
        is_place = pack < len(self.packs) and FRAME.size <= stored <= FRAME.size + RAW_MAX and offset < _OFFSET_MAX
        place = (self.packs[pack], offset, stored) if is_place else None
        return self.data[at : at + self._key - 1], self.data[at + self._key - 1], size, place

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """(digest, kind) of every file's object."""
        row = struct.Struct(f"<{self._key - 1}sB{self._row - self._key}x")
        with memoryview(self.data) as view, view[self._start : self._order] as rows:
            for digest, kind in row.iter_unpack(rows):
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
            if self.data[at + self._key - 1] == PLAIN and FRAME.size <= stored <= FRAME.size + RAW_MAX:
                found.append((bytes(self.data[at : at + self._key - 1]), offset, stored))
            low += 1
        return found

    def _at(self, rank: int) -> tuple[tuple[int, int], int, int]:
        """((pack, offset), size of the frame, record) of the object with so many before it in the order of the packs."""
        (record,) = _NUMBER.unpack_from(self.data, self._order + 4 * rank)
        at = self._start + min(record, self._count - 1) * self._row + self._key
        _, pack, stored, offset = _TAIL.unpack_from(self.data, at)
        return (pack, offset), stored, record

    def rows(self) -> Iterator[tuple[Key, Place | None]]:
        """Every record's object, a chunk as what it is, a plain one, and where it may be."""
        for number in range(self._count):
            digest, kind, _, place = self.record(number)
            yield (digest, kind if kind != CHUNK else PLAIN), place

    def place(self, digest: bytes, kind: int) -> Place | None:
        """Where an object may be."""
        number = self.find(digest, kind)
        return None if number is None else self.record(number)[3]

    def chunk(self, digest: bytes) -> Place | None:
        """Where a chunk may be."""
        return self.place(digest, CHUNK)


def locate(locators: Iterable[Locator], digest: bytes, kind: int) -> tuple[Place | None, Locator | None]:
    """Where an object is, by the first of these that knows it, and which that is."""
    found = next((one for one in locators if one.find(digest, kind) is not None), None)
    return (found.place(digest, kind), found) if found else (None, None)


def encode(store: Packs, index: Index, lists: Packs | None = None) -> bytes:
    """The locator of an index, as of the store's last `refresh`.  lists: a store that is nearer, to read chunk lists from.

    Raises NotFound if a chunk list is not there.
    """
    from cafs import chunks

    packs: dict[str, int] = {}
    rows: dict[bytes, bytes] = {}

    def add(digest: bytes, kind: int, size: int) -> None:
        found = next(store.locate(digest, kind if kind != CHUNK else PLAIN), None)
        place = (packs.setdefault(found[0], len(packs)), found[2], found[1]) if found else (_NOWHERE, 0, 0)
        rows[digest + bytes([kind])] = _TAIL.pack(size, *place)

    sizes = (size for kind, size in zip(index.type, index.size, strict=True) if kind in b"fF" and size)
    for (digest, kind), size in zip(contents(index), sizes, strict=True):
        add(digest, kind, size)
        if kind == CHUNK_LIST:
            listed = chunks.decode((lists or store).read_object(digest, kind), store.hash_name, store.chunk_size)
            for chunk in {chunk for _, chunk in listed.runs if chunk}:
                add(chunk, CHUNK, 0)
    keys = sorted(rows)
    places = [_TAIL.unpack(rows[key])[1::2] for key in keys]
    order = array("I", sorted(range(len(places)), key=places.__getitem__))
    if sys.byteorder == "big":
        order.byteswap()
    body = b"".join(map(bytes.fromhex, packs)) + b"".join(key + rows[key] for key in keys) + order.tobytes()
    rest = _HEAD.pack(MAGIC, b"", store.hash_name.encode(), index.identity, len(packs), len(rows))[24:] + body
    return MAGIC + checksum(rest) + rest


def load(path: str) -> Locator:
    """Map a locator.  Raises OSError, FormatError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return Locator(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise FormatError("locator is empty") from error
    finally:
        os.close(fd)


def save(path: str, data: Buffer) -> None:
    """Keep a locator; a reader sees all of it or none."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    atomic.replace_hint(path, data, 0o600)


def contents(index: Index) -> Iterator[tuple[bytes, int]]:
    """(digest, kind) of the content of every f and F entry that has any, in order."""
    from cafs import format as fmt

    digests, width = index.digest, index.hash_size
    for at, kind, size in zip(counting(0, width), index.type, index.size, strict=False):
        if kind in b"fF" and size:
            yield bytes(digests[at : at + width]), CHUNK_LIST if kind == fmt.CHUNKED[0] else PLAIN
