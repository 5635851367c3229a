"""Several layer indexes as the one tree that they make.  cafs-index(5), LAYERS.

All are read in step, in index order, so that memory is that of the loaded columns and the result.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from cafs import format as fmt
from cafs.errors import FormatError, UsageError, quote
from cafs.format import Entry, Header
from cafs.index import NO_PARENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cafs.index import Index

    Row = tuple[bytes, int, int]  # order key, layer, entry

_IMPLIED = -1
"""Stands for an entry: a directory is meant that no layer lists, 755 0 0 with mtime 0."""


def merge(indexes: Sequence[Index]) -> bytes:
    """The index file of the tree.  indexes: base first, a whole tree.  Raises UsageError, or FormatError if they do not fit."""
    base = indexes[0].header
    if base.is_layer:
        raise UsageError("the first index is a layer: what it lies on is missing")
    for index in indexes[1:]:
        if (index.header.hash_name, index.header.chunk_size) != (base.hash_name, base.chunk_size):
            raise UsageError("indexes of different hashes or chunk sizes do not mix")
    lines = [Header(base.hash_name, base.chunk_size).encode()]
    lines += (entry.encode() for entry in _entries(indexes))
    lines.append(fmt.encode_trailer(len(lines) - 1))
    return b"".join(lines)


def _entries(indexes: Sequence[Index]) -> Iterator[Entry]:
    """What is left of all entries, in order; only the first name of an inode has its attributes."""
    first: dict[tuple[int, int], bytes] = {}
    hiding: list[tuple[bytes, int]] = []  # (key of a directory, nothing of layers before this one shows below it)
    for key, rows in _groups(indexes):
        while hiding and not key.startswith(hiding[-1][0] + b"\0"):
            hiding.pop()
        shown = hiding[-1][1] if hiding else 0
        found, covers = _top([row for row in rows if row[0] >= shown], indexes, key)
        if covers >= 0:
            hiding.append((key if key != b"\0" else b"", max(covers, shown)))
        if found is None:
            continue
        layer, number = found
        if number == _IMPLIED:
            yield Entry(fmt.DIRECTORY, key.replace(b"\0", b"/"), 0o755)
        elif indexes[layer].kind(number) != fmt.WHITEOUT:
            yield _entry(indexes[layer], layer, number, first)


def _top(rows: list[tuple[int, int]], indexes: Sequence[Index], key: bytes) -> tuple[tuple[int, int] | None, int]:
    """What a path is in the end, and the last layer that hides what is below it, -1 if none does."""
    found: tuple[int, int] | None = None
    kind, covers = b"", -1
    for layer, number in rows:
        if number != _IMPLIED:
            found, kind = (layer, number), indexes[layer].kind(number)
            covers = covers if kind == fmt.DIRECTORY else layer
        elif kind in (b"", fmt.WHITEOUT):
            found, kind = (layer, number), fmt.DIRECTORY
        elif kind not in (fmt.DIRECTORY, fmt.OPAQUE):
            raise FormatError(
                f"a layer has something below {quote(key.replace(bytes(1), b'/'))}, which is no directory", rule=20
            )
    return found, covers


def _entry(index: Index, layer: int, number: int, first: dict[tuple[int, int], bytes]) -> Entry:
    path, inode = index.path(number), index.inode(number)
    if index.links.get(inode, 1) > 1:
        known = first.setdefault((layer, inode), path)
        if known != path:
            return Entry(fmt.HARDLINK, path, target=known)
    found = replace(index.entry(inode), path=path)
    return replace(found, type=fmt.DIRECTORY) if found.type == fmt.OPAQUE else found


def _groups(indexes: Sequence[Index]) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """(order key, [(layer, entry), …] from the base up) for every path."""
    last, rows = b"", list[tuple[int, int]]()
    for key, layer, entry in heapq.merge(*(_rows(index, layer) for layer, index in enumerate(indexes))):
        if rows and key != last:
            yield last, rows
            rows = []
        last = key
        rows.append((layer, entry))
    if rows:
        yield last, rows


def _rows(index: Index, layer: int) -> Iterator[Row]:
    """The keys of a layer in order, those of directories that it does not list but has something in as _IMPLIED."""
    listed = ((fmt.order_key(index.path(number)), layer, number) for number in range(len(index)))
    if not index.header.is_layer:
        return listed
    rows = list(listed)
    implied = {
        key[:at]
        for key, _, number in rows
        if index.parent[number] == NO_PARENT and index.kind(number) != fmt.WHITEOUT
        for at, byte in enumerate(key)
        if at and not byte
    }
    return iter(sorted([*rows, *((key, layer, _IMPLIED) for key in implied - {key for key, _, _ in rows})]))
