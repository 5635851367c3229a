"""Making objects: bytes -> digest and, unless the store has it, the frame that holds it.  Shared by all sources of an index."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cafs import chunks, pack
from cafs.digest import CHUNK_LIST, PLAIN, hash_function
from cafs.errors import CafsError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cafs.format import Header
    from cafs.writer import Writer

_LEVEL = 1
_INCOMPRESSIBLE = 0.95


@dataclass(slots=True)
class Made:
    """The content of a file: its object, and the frames that are new (raw chunks before the list)."""

    kind: int
    digest: bytes
    frames: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    fresh: bool = True


class ObjectMaker:
    """Makes objects for one writer; without a writer, digests only.  `make` may be called on any thread, `put` on one."""

    def __init__(self, header: Header, writer: Writer | None) -> None:
        self.header = header
        self.writer = writer
        self._hash = hash_function(header.hash_name)
        self._local = threading.local()

    def make(self, data: bytes, kind: int = PLAIN) -> Made:
        """The object of DATA, compressed if that pays."""
        return self.make_all([data], kind)[0]

    def make_all(self, contents: Sequence[bytes], kind: int = PLAIN) -> list[Made]:
        """The objects of several contents: compressed in one call, for each call has to wait for the interpreter again."""
        made = [Made(kind, self._hash(data)) for data in contents]
        if not self.writer:
            return made
        has = self.writer.store.has
        new = [(one, data) for one, data in zip(made, contents, strict=True) if not has(one.digest, kind)]
        for (one, data), payload in zip(new, self._compress([data for _, data in new]), strict=True):
            small = len(payload) < _INCOMPRESSIBLE * len(data)
            one.frames.append((one.digest, kind, pack.encode_frame(data, kind, payload if small else None)))
        return made

    def make_list(self, size: int, runs: list[tuple[int, bytes]], path: bytes) -> Made:
        """The chunk list of a file of SIZE bytes at PATH."""
        assert sum(count for count, _ in runs) == -(-size // self.header.chunk_size)
        listed = chunks.ChunkList(self.header.hash_name, self.header.chunk_size, size, chunks.join_runs(runs)).encode()
        if len(listed) > chunks.LIST_MAX:
            raise CafsError(f"cannot index {quote(path)}: its chunk list is over {chunks.LIST_MAX} bytes")
        return self.make(listed, CHUNK_LIST)

    def put(self, made: Made) -> None:
        """Put the new frames."""
        if self.writer:
            for digest, kind, frame in made.frames:
                self.writer.put(digest, kind, frame)

    def _compress(self, contents: Sequence[bytes]) -> list[bytes]:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            import zstandard

            compressor = self._local.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        if len(contents) < 2 or not hasattr(compressor, "multi_compress_to_buffer"):
            return [compressor.compress(data) for data in contents]
        found = compressor.multi_compress_to_buffer(list(contents))
        return [found[at].tobytes() for at in range(len(contents))]  # the same bytes as `compress` makes


def is_zero(data: bytes) -> bool:
    """Whether a chunk is stored as a run of zeros."""
    return data[:1] == b"\0" and data == bytes(len(data))  # memcmp(3): strip() looks at one byte at a time
