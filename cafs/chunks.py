"""Chunk lists: the object of a file larger than one chunk.  cafs-store(5), CHUNK LISTS.

Text, canonical: a header line, then one line a run, 'COUNT DIGEST'; '-' as the digest is a run of zero bytes, which is
neither read nor stored.
"""

from __future__ import annotations

import re

from cafs.digest import DIGEST_SIZES
from cafs.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"cafs-chunks 1 "
SIZE_MAX = (1 << 63) - 1
LIST_MAX = 1 << 26
"""Largest chunk list in bytes: about 4 TB of file in which no two neighbouring chunks are equal."""


class ChunkList:
    """size: of the file, bytes.  runs: (number of chunks, raw digest or b'' for zeros), no two neighbours equal."""

    __slots__ = ("chunk_size", "hash_name", "runs", "size")

    def __init__(self, hash_name: str, chunk_size: int, size: int, runs: tuple[tuple[int, bytes], ...]) -> None:
        self.hash_name = hash_name
        self.chunk_size = chunk_size
        self.size = size
        self.runs = runs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkList) and self.encode() == other.encode()

    def __hash__(self) -> int:
        return hash(self.encode())

    def encode(self) -> bytes:
        """The one spelling."""
        head = MAGIC + f"{self.hash_name} {self.chunk_size} {self.size}\n".encode()
        return head + b"".join(b"%d %s\n" % (count, digest.hex().encode() or b"-") for count, digest in self.runs)

    def chunks(self) -> int:
        """Number of chunks, the last one may be short."""
        return -(-self.size // self.chunk_size)

    def digest_at(self, chunk: int) -> bytes:
        """Digest of chunk number CHUNK, empty for zeros."""
        for count, digest in self.runs:
            if chunk < count:
                return digest
            chunk -= count
        return b""

    def length_at(self, chunk: int) -> int:
        """Bytes in chunk number CHUNK."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)


def join_runs(runs: Iterable[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Merge neighbours that are equal."""
    joined: list[tuple[int, bytes]] = []
    for count, digest in runs:
        if joined and joined[-1][1] == digest:
            count += joined.pop()[0]
        joined.append((count, digest))
    return tuple(joined)


def decode(data: bytes, hash_name: str, chunk_size: int) -> ChunkList:
    """Read a list.  Raises FormatError unless it is the one spelling of a list of this store's hash and chunk size."""
    head = re.match(rb"cafs-chunks 1 %s %d ([1-9][0-9]{0,18})\n" % (hash_name.encode(), chunk_size), data)
    if not head or int(head[1]) > SIZE_MAX:
        raise FormatError("not a chunk list of this store", line=1)
    line = re.compile(rb"([1-9][0-9]{0,18}) (-|[0-9a-f]{%d})\n" % (2 * DIGEST_SIZES[hash_name]))
    left = -(-int(head[1]) // chunk_size)
    runs: list[tuple[int, bytes]] = []
    at, before = head.end(), b""
    while at < len(data):  # line by line: what is refused is refused before memory is taken for the rest
        row = line.match(data, at)
        if not row or row[2] == before or int(row[1]) > left:
            raise FormatError("chunk list is not in its one spelling, or does not add up", line=len(runs) + 2)
        at, before, left = row.end(), row[2], left - int(row[1])
        runs.append((int(row[1]), b"" if before == b"-" else bytes.fromhex(before.decode())))
    if left:
        raise FormatError("chunk list does not add up")
    return ChunkList(hash_name, chunk_size, int(head[1]), tuple(runs))
