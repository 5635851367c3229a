"""The bytes of a file of an index, from a store."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Pieces:
    """A file's content.  listed: (digest or b'' for zeros, bytes) of each run of it.  step: largest piece in bytes."""

    path: bytes
    listed: tuple[tuple[bytes, int], ...]
    step: int
    store: Store

    @property
    def runs(self) -> list[tuple[int, int, bool]]:
        """(offset, length, whether it has data), no two neighbours alike."""
        found: list[tuple[int, int, bool]] = []
        at = 0
        for digest, length in self.listed:
            if found and found[-1][2] == bool(digest):
                found[-1] = found[-1][0], found[-1][1] + length, bool(digest)
            else:
                found.append((at, length, bool(digest)))
            at += length
        return found

    def data(self, *, zeros: bool = False) -> Iterator[bytes]:
        """The verified bytes, at most one chunk at a time; runs of zeros only if they are asked for.  Raises CafsError."""
        for digest, length in self.listed:
            left = length
            while left and (digest or zeros):
                size = min(left, self.step)
                data = self.store.read_object(digest, PLAIN) if digest else bytes(size)
                if len(data) != size:
                    raise CorruptError(f"object of {quote(self.path)} is not of the size that the index says")
                yield data
                left -= size


def pieces(index: Index, entry: int, store: Store) -> Pieces:
    """The content of a regular file.  Raises UsageError for anything else."""
    inode = index.inode(entry)
    kind, path, size = index.kind(inode), index.path(entry), index.size[inode]
    if kind not in (fmt.FILE, fmt.CHUNKED):
        raise UsageError(f"{quote(path)} is not a regular file")
    step = index.header.chunk_size
    if kind == fmt.FILE:
        return Pieces(path, ((index.object(inode), size),) if size else (), step, store)
    data = store.read_object(index.object(inode), CHUNK_LIST)
    listed = chunks.decode(data, index.header.hash_name, step)
    if listed.size != size:
        raise CorruptError(f"chunk list of {quote(path)} is not of the size that the index says")
    runs, at = [], 0
    for count, digest in listed.runs:
        runs.append((digest, min(count * step, size - at)))
        at += count * step
    return Pieces(path, tuple(runs), step, store)


def write_content(index: Index, entry: int, store: Store, out: BinaryIO) -> None:
    """Write the verified content of a regular file, at most one chunk in memory.  Raises UsageError for anything else."""
    for data in pieces(index, entry, store).data(zeros=True):
        out.write(data)
