"""An index as a file of columns in the cache: mapped, not loaded, so that a mount begins at once and its pages are shared.

cafs-store(5), CACHE.  Derived, in this machine's byte order: a header, then each column of index.py as it is in memory; what
few entries have is three columns: their numbers, where each value ends, the values.  Links are counted for directories too.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
from array import array
from bisect import bisect_left
from itertools import accumulate

from cafs import paths
from cafs.digest import DIGEST_SIZES, checksum
from cafs.errors import FormatError
from cafs.format import Header
from cafs.index import NO_PARENT, Index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

MAGIC = b"CAFSCOL1"
_HEAD = struct.Struct("=8s16s16sQ64s")
"""magic, checksum of the rest, hash name, chunk size, digest of the index; then, for each column, its bytes."""

_LENGTH = struct.Struct("=Q")
_COLUMNS = (
    ("type", "B"),
    ("mode", "H"),
    ("uid", "I"),
    ("gid", "I"),
    ("mtime_ns", "q"),
    ("size", "q"),
    ("digest", "B"),
    ("parent", "I"),
    ("names", "B"),
    ("name_end", "Q"),
    ("_children", "I"),
    ("_children_start", "I"),
)
_SPARSE = ("rdev", "target", "xattrs", "hardlink", "links")
_PAIR, _NUMBER = struct.Struct("=II"), struct.Struct("=I")
_ALIGN = 8


class Sparse:
    """What few entries have: entry -> value, read only.  decode: of a value's bytes."""

    __slots__ = ("_data", "_decode", "_ends", "_keys")

    def __init__(self, keys: memoryview, ends: memoryview, data: memoryview, decode: Callable[[bytes], Any]) -> None:
        self._keys = keys
        self._ends = ends
        self._data = data
        self._decode = decode

    def get(self, entry: int, default: Any = None) -> Any:
        at = bisect_left(self._keys, entry)
        if at == len(self._keys) or self._keys[at] != entry:
            return default
        return self._decode(bytes(self._data[self._ends[at - 1] if at else 0 : self._ends[at]]))

    def __getitem__(self, entry: int) -> Any:
        found = self.get(entry)
        if found is None:
            raise KeyError(entry)
        return found

    def __contains__(self, entry: int) -> bool:
        return self.get(entry) is not None


_DECODE: dict[str, Callable[[bytes], Any]] = {
    "rdev": _PAIR.unpack,
    "target": bytes,
    "xattrs": bytes,
    "hardlink": lambda data: _NUMBER.unpack(data)[0],
    "links": lambda data: _NUMBER.unpack(data)[0],
}
_ENCODE: dict[str, Callable[[Any], bytes]] = {
    "rdev": lambda pair: _PAIR.pack(*pair),
    "target": bytes,
    "xattrs": bytes,
    "hardlink": _NUMBER.pack,
    "links": _NUMBER.pack,
}


def encode(index: Index) -> bytes:
    """The file."""
    parts = [memoryview(getattr(index, name)).cast("B") for name, _ in _COLUMNS]
    for name in _SPARSE:
        values = _links(index) if name == "links" else getattr(index, name)
        parts += map(memoryview, _encode_sparse(values, _ENCODE[name]))
    lengths = b"".join(_LENGTH.pack(part.nbytes) for part in parts)
    body = b"".join(piece for part in parts for piece in (part, bytes(-part.nbytes % _ALIGN)))
    hash_name = index.header.hash_name.encode()
    rest = _HEAD.pack(MAGIC, b"", hash_name, index.header.chunk_size, index.identity)[24:] + lengths + body
    return MAGIC + checksum(rest) + rest


def _links(index: Index) -> dict[int, int]:
    """Also of directories: 2, and one for each directory in it."""
    links = dict(index.links)
    for match in re.finditer(b"d", index.type):
        entry = match.start()
        links[entry] = 2
        if index.parent[entry] != NO_PARENT:
            links[index.parent[entry]] += 1
    return links


def _encode_sparse(values: Mapping[int, Any], encode: Callable[[Any], bytes]) -> Iterator[bytes]:
    keys = sorted(values)
    data = [encode(values[key]) for key in keys]
    yield array("I", keys).tobytes()
    yield array("Q", accumulate(map(len, data))).tobytes()
    yield b"".join(data)


def load(fd: int) -> Index:
    """An index whose columns are mapped.  fd: may be closed afterwards.  Raises OSError, FormatError."""
    try:
        data = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise FormatError("columns are empty") from error
    index = _open(data)
    data.madvise(mmap.MADV_DONTNEED)  # the checksum has touched all of it
    return index


def open_checked(path: str) -> tuple[int, Index]:
    """A descriptor of a file of columns that is sound, and what `load` makes of it.  Raises OSError, FormatError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return fd, load(fd)
    except BaseException:
        os.close(fd)
        raise


def _open(data: mmap.mmap) -> Index:
    count = len(_COLUMNS) + 3 * len(_SPARSE)
    start = _HEAD.size + count * _LENGTH.size
    if len(data) < start or data[: len(MAGIC)] != MAGIC:
        raise FormatError("not columns of an index")
    view = memoryview(data)
    _, check, name, chunk_size, identity = _HEAD.unpack_from(data)
    if checksum(view[24:]) != check:
        raise FormatError("columns have a bad checksum")
    hash_name = name.rstrip(b"\0").decode("latin-1")
    pieces: list[Any] = []
    for (length,) in _LENGTH.iter_unpack(view[_HEAD.size : start]):
        pieces.append(view[start : start + length])
        start += length + -length % _ALIGN
    made: Any = Index(Header(hash_name, chunk_size))  # a mapped column answers as an array does
    made.identity = identity[: DIGEST_SIZES[hash_name]]
    for (column, code), piece in zip(_COLUMNS, pieces, strict=False):
        setattr(made, column, piece.cast(code))
    for number, column in enumerate(_SPARSE):
        keys, ends, values = pieces[len(_COLUMNS) + 3 * number :][:3]
        setattr(made, column, Sparse(keys.cast("I"), ends.cast("Q"), values, _DECODE[column]))
    found: Index = made
    return found


def path_of(layers: Iterable[bytes]) -> str:
    """Where the columns of the tree are kept that these indexes make, base first."""
    return os.path.join(paths.cache(), "columns", hashlib.sha256(b"".join(layers)).hexdigest())
