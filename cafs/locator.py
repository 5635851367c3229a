"""The locator of an index: where each of its objects is, in index order, so that a mount reads no footer.

cafs-store(5), LOCATORS.  Derived and only a hint: what is read by it is checked against its digest all the same.
"""

from __future__ import annotations

import struct
from array import array
from itertools import count

from cafs import chunks
from cafs import format as fmt
from cafs.digest import CHUNK_LIST, DIGEST_SIZES, PLAIN, checksum
from cafs.errors import FormatError
from cafs.pack import FRAME, RAW_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cafs.index import Index
    from cafs.store import Store

MAGIC = b"CAFSLOC1"
_HEAD = struct.Struct("<8sIIII")
_PLACE = struct.Struct("<IIQ")

Place = tuple[str, int, int]
"""Pack name, offset, size of the frame."""


class Locator:
    """A decoded locator.  Nothing in it is to be believed."""

    def __init__(self, packs: list[str], places: bytes, chunk_places: dict[bytes, bytes]) -> None:
        self.packs = packs
        self._places = places
        self._chunks = chunk_places

    def __len__(self) -> int:
        return len(self._places) // _PLACE.size

    def place(self, number: int) -> Place | None:
        """Where the content of the NUMBERth file with content may be."""
        return self._decode(self._places[number * _PLACE.size : (number + 1) * _PLACE.size])

    def chunks(self) -> Iterable[bytes]:
        """The digests of all chunks."""
        return self._chunks

    def chunk(self, digest: bytes) -> Place | None:
        """Where a chunk may be."""
        return self._decode(self._chunks.get(digest, b""))

    def __iter__(self) -> Iterator[Place | None]:
        return (self._place(*row) for row in _PLACE.iter_unpack(self._places))

    def _decode(self, record: bytes) -> Place | None:
        return self._place(*_PLACE.unpack(record)) if len(record) == _PLACE.size else None

    def _place(self, pack: int, stored: int, offset: int) -> Place | None:
        if pack >= len(self.packs) or not FRAME.size <= stored <= FRAME.size + RAW_MAX:
            return None
        return self.packs[pack], offset, stored


def contents(index: Index) -> Iterator[tuple[bytes, int]]:
    """(digest, kind) of the content of every f and F entry that has any, in order."""
    digests, width = index.digest, index.hash_size
    for at, kind, size in zip(count(0, width), index.type, index.size, strict=False):
        if kind in b"fF" and size:
            yield bytes(digests[at : at + width]), CHUNK_LIST if kind == fmt.CHUNKED[0] else PLAIN


def ranks(index: Index) -> array[int]:
    """Entry -> its number in the locator, for entries that have content."""
    found, number = array("I"), 0
    for kind, size in zip(index.type, index.size, strict=True):
        found.append(number)
        number += kind in b"fF" and size > 0
    return found


def finder(store: Store, index: Index) -> Callable[[tuple[bytes, int]], Place | None] | None:
    """Where the objects of an index may be, by its locator; None if there is none."""
    found = store.get_locator(index.identity)
    if found is None:
        return None
    places = dict(zip(contents(index), found, strict=False))
    return lambda key: places[key] if key in places else found.chunk(key[0])


def encode(store: Store, objects: Iterable[tuple[bytes, int]], lists: Store | None = None) -> bytes:
    """The locator of the index that has these contents.  lists: a store that is nearer, to read chunk lists from.

    Raises NotFound if a chunk list is not there.
    """
    numbers: dict[str, int] = {}

    def place(digest: bytes, kind: int) -> bytes:
        found = next(store.locate(digest, kind), None)
        if found is None:
            return _PLACE.pack(0xFFFF_FFFF, 0, 0)
        return _PLACE.pack(numbers.setdefault(found[0], len(numbers)), found[2], found[1])

    places = bytearray()
    chunk_digests: set[bytes] = set()
    for digest, kind in objects:
        places += place(digest, kind)
        if kind == CHUNK_LIST:
            listed = chunks.decode((lists or store).read_object(digest, kind), store.hash_name, store.chunk_size)
            chunk_digests.update(chunk for _, chunk in listed.runs if chunk)
    chunk_rows = b"".join(digest + place(digest, PLAIN) for digest in sorted(chunk_digests))
    head = _HEAD.pack(MAGIC, len(numbers), len(places) // _PLACE.size, len(chunk_digests), 0)
    data = head + b"".join(map(bytes.fromhex, numbers)) + places + chunk_rows
    return data + checksum(data)


def decode(data: bytes, hash_name: str) -> Locator:
    """Read a locator.  Raises FormatError."""
    width = DIGEST_SIZES[hash_name]
    if len(data) < _HEAD.size + 16 or checksum(data[:-16]) != data[-16:]:
        raise FormatError("locator has a bad checksum")
    magic, packs, count, chunk_count, zero = _HEAD.unpack_from(data)
    places = _HEAD.size + packs * width
    rows = places + count * _PLACE.size
    row = width + _PLACE.size
    if magic != MAGIC or zero or rows + chunk_count * row + 16 != len(data):
        raise FormatError("locator of an unknown version, or its sizes do not add up")
    names = [data[at : at + width].hex() for at in range(_HEAD.size, places, width)]
    chunk_places = {data[at : at + width]: data[at + width : at + row] for at in range(rows, len(data) - 16, row)}
    return Locator(names, data[places:rows], chunk_places)
