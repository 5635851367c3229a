"""The bytes of a file of an index, from a store."""

from __future__ import annotations

from cafs import chunks
from cafs import format as fmt
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CorruptError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from cafs.index import Index
    from cafs.store import Store


def write_content(index: Index, entry: int, store: Store, out: BinaryIO) -> None:
    """Write the verified content of a regular file, at most one chunk in memory.  Raises UsageError for anything else."""
    inode = index.inode(entry)
    kind = index.kind(inode)
    if kind not in (fmt.FILE, fmt.CHUNKED):
        raise UsageError(f"{quote(index.path(entry))} is not a regular file")
    size = index.size[inode]
    if not size:
        return
    if kind == fmt.FILE:
        data = store.read_object(index.object(inode), PLAIN)
        if len(data) != size:
            raise CorruptError(f"object of {quote(index.path(entry))} is not of the size that the index says")
        out.write(data)
        return
    for data in _chunks(index, inode, store):
        out.write(data)


def _chunks(index: Index, inode: int, store: Store) -> Iterator[bytes]:
    raw = store.read_object(index.object(inode), CHUNK_LIST)
    listed = chunks.decode(raw, index.header.hash_name, index.header.chunk_size)
    number = 0
    for count, digest in listed.runs:
        for _ in range(count):
            data = store.read_object(digest, PLAIN) if digest else bytes(listed.length_at(number))
            if len(data) != listed.length_at(number):
                raise CorruptError(f"chunk {number} of {quote(index.path(inode))} is not of its size")
            yield data
            number += 1
