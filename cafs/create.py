"""From a directory to an index: walk, hash, compress, put, in one ordered pipeline.

The walk yields entries in index order; threads hash and compress batches of files; results are consumed in order, so the
index and the packs are the same whatever the number of threads.  Without a store only the digests are made.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

from cafs import chunks, pack
from cafs import format as fmt
from cafs.atomic import read_exactly as _read_whole
from cafs.digest import CHUNK_LIST, PLAIN, hash_function
from cafs.errors import CafsError, FormatError, quote
from cafs.format import Entry, Header
from cafs.ordered import ordered_map
from cafs.statcache import StatCache
from cafs.walk import OPEN_FILE, Found, Walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from cafs.writer import Writer

    Compress = Callable[[bytes], bytes] | None
    Content: TypeAlias = "Made | CafsError | OSError | None"

_BATCH_FILES = 64
_BATCH_BYTES = 1 << 20
_LEVEL = 1
_INCOMPRESSIBLE = 0.95


@dataclass(slots=True)
class Made:
    """The content of a file: its object, and the frames that are new (raw chunks before the list)."""

    kind: int
    digest: bytes
    frames: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    fresh: bool = True


@dataclass(slots=True)
class _Batch:
    found: list[Found] = field(default_factory=list)
    size: int = 0


@dataclass
class Indexer:
    """One indexing run.

    writer: where objects go, None to make digests only.  threads: hashing threads, at least 1.
    cache: remembered digests, None to hash everything.  progress: called with (entries, bytes) now and then.
    """

    walk: Walk
    header: Header
    writer: Writer | None = None
    threads: int = 2
    cache: StatCache | None = None
    progress: Callable[[int, int], None] | None = None
    bytes_seen: int = 0
    files_read: int = 0
    _start_ns: int = 0
    _inodes: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _failed: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._hash = hash_function(self.header.hash_name)

    def run(self) -> bytes:
        """The whole index file.  Raises CafsError naming the file that could not be read or that changed."""
        self._start_ns = time.time_ns()
        lines = [self.header.encode()]
        for found, made in self._contents():
            line = self._entry(found, made)
            if line:
                lines.append(line)
            if self.progress and len(lines) % 500 == 0:
                self.progress(len(lines), self.bytes_seen)
        lines.append(fmt.encode_trailer(len(lines) - 1))
        return b"".join(lines)

    def _contents(self) -> Iterator[tuple[Found, Content]]:
        for batch in ordered_map(self._do_batch, self._batches(), self.threads, 4 * self.threads, _drop):
            yield from batch

    def _batches(self) -> Iterator[_Batch]:
        batch = _Batch()
        for found in self.walk.run():
            self._mark_hardlink(found)
            size = found.status.st_size if found.kind == fmt.FILE else 0
            batch.found.append(found)
            batch.size += size
            if len(batch.found) >= _BATCH_FILES or batch.size >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
        if batch.found:
            yield batch

    def _mark_hardlink(self, found: Found) -> None:
        """Only the first name of an inode has content."""
        status = found.status
        if found.kind != fmt.DIRECTORY and status.st_nlink > 1:
            first = self._inodes.setdefault((status.st_dev, status.st_ino), found.path)
            if first != found.path:
                found.kind, found.target = fmt.HARDLINK, first

    def _do_batch(self, batch: _Batch) -> list[tuple[Found, Content]]:
        """On a thread: hash the regular files of a batch.  Failures are returned, in their place."""
        results: list[tuple[Found, Content]] = []
        compress = _compressor() if self.writer else None
        for found in batch.found:
            made: Content = None
            if found.kind == fmt.FILE and found.status.st_size:
                try:
                    made = self._remembered(found)
                    if not made and found.status.st_size > self.header.chunk_size:
                        results.append((found, None))  # read when its turn comes, by all threads; the directory stays held
                        continue
                    made = made or self._read(found, compress)
                except (CafsError, OSError) as error:
                    made = error
            found.directory.release()
            results.append((found, made))
        return results

    def _remembered(self, found: Found) -> Made | None:
        hit = self.cache.get(found.status) if self.cache else None
        if not hit:
            return None
        kind, digest = hit
        if self.writer and not self._is_whole(kind, digest):
            return None
        return Made(kind, digest, fresh=False)

    def _is_whole(self, kind: int, digest: bytes) -> bool:
        """Whether the store has the object and, for a chunk list, every chunk."""
        assert self.writer
        if not self.writer.store.has(digest, kind):
            return False
        if kind == PLAIN:
            return True
        data = self.writer.store.read_object(digest, kind)
        listed = chunks.decode(data, self.header.hash_name, self.header.chunk_size)
        return all(self.writer.store.has(chunk) for _, chunk in listed.runs if chunk)

    def _read(self, found: Found, compress: Compress) -> Made:
        """The object of a file of at most one chunk."""
        with _opened(found) as fd:
            data = _read_whole(fd, found.status.st_size + 1, 0)
            if len(data) != found.status.st_size:
                raise _changed(found.path)
            return self._object(data, PLAIN, compress)

    def _read_large(self, found: Found) -> Made:
        """The chunk list of a larger file: its chunks are read by all threads and put in order."""
        size, step = found.status.st_size, self.header.chunk_size
        runs: list[tuple[int, bytes]] = []
        with _opened(found) as fd:

            def one(piece: tuple[int, int]) -> tuple[int, Made | None]:
                offset, count = piece
                if count < 0:
                    return -count, None
                data = _read_whole(fd, min(step, size - offset), offset)
                if len(data) != min(step, size - offset):
                    raise _changed(found.path)
                is_zero = data[0] == 0 and data == bytes(len(data))
                return 1, None if is_zero else self._object(data, PLAIN, _compressor() if self.writer else None)

            for count, made in ordered_map(one, _pieces(fd, size, step), self.threads, 2 * self.threads, lambda piece: None):
                runs.append((count, made.digest if made else b""))
                if made:
                    self._put_frames(made)
        listed = chunks.ChunkList(self.header.hash_name, step, size, chunks.join_runs(runs)).encode()
        if len(listed) > chunks.LIST_MAX:
            raise CafsError(f"cannot index {quote(found.path)}: its chunk list is over {chunks.LIST_MAX} bytes")
        return self._object(listed, CHUNK_LIST, _compressor() if self.writer else None)

    def _object(self, data: bytes, kind: int, compress: Compress) -> Made:
        digest = self._hash(data)
        made = Made(kind, digest)
        if compress and self.writer and not self.writer.store.has(digest, kind):
            payload = compress(data)
            small = len(payload) < _INCOMPRESSIBLE * len(data)
            made.frames.append((digest, kind, pack.encode_frame(data, kind, payload if small else None)))
        return made

    def _entry(self, found: Found, made: Content) -> bytes:
        """The line of an entry, after its objects are put.  Empty if it was skipped."""
        status = found.status
        if found.kind == fmt.HARDLINK:
            return b"" if found.target in self._failed else Entry(fmt.HARDLINK, found.path, target=found.target).encode()
        if found.kind == fmt.FILE and status.st_size and made is None:
            try:
                made = self._read_large(found)
            except OSError as error:
                made = error
            finally:
                found.directory.release()
        if isinstance(made, OSError):
            self._failed.add(found.path)
            self.walk.failed(found.path, made)
            return b""
        if isinstance(made, CafsError):
            raise made
        kind = found.kind
        if made:
            kind = fmt.CHUNKED if made.kind == CHUNK_LIST else fmt.FILE
            self._keep(made, found)
        is_device = kind in (fmt.CHAR_DEVICE, fmt.BLOCK_DEVICE)
        entry = Entry(
            type=kind,
            path=found.path,
            mode=0o777 if kind == fmt.SYMLINK else status.st_mode & 0o7777,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            size=status.st_size if found.kind == fmt.FILE else 0,
            digest=made.digest if made else b"",
            xattrs=found.xattrs,
            target=found.target,
            device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        )
        try:
            fmt.check_limits(entry)
        except FormatError as error:
            raise CafsError(f"cannot index {quote(found.path)}: {error}") from error
        return entry.encode()

    def _keep(self, made: Made, found: Found) -> None:
        self._put_frames(made)
        if self.cache and not found.xattrs:
            self.cache.add(found.status, made.kind, made.digest, self._start_ns)
        self.bytes_seen += found.status.st_size
        self.files_read += made.fresh

    def _put_frames(self, made: Made) -> None:
        if self.writer:
            for digest, kind, frame in made.frames:
                self.writer.put(digest, kind, frame)


@contextmanager
def _opened(found: Found) -> Iterator[int]:
    """The file's descriptor; that it is the one which was listed and did not change is checked on both ends."""
    fd = os.open(found.name, OPEN_FILE, dir_fd=found.directory.fd)
    try:
        if _stamp(os.fstat(fd)) != _stamp(found.status):
            raise _changed(found.path)
        yield fd
        if _stamp(os.fstat(fd)) != _stamp(found.status):
            raise _changed(found.path)
    finally:
        os.close(fd)


def _changed(path: bytes) -> CafsError:
    return CafsError(f"file {quote(path)} changed while the tree was read")


def _drop(batch: _Batch) -> None:
    for found in batch.found:
        found.directory.release()


def _stamp(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _compressor() -> Callable[[bytes], bytes]:
    import zstandard

    return zstandard.ZstdCompressor(level=_LEVEL).compress


def _pieces(fd: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, 1) for a chunk that has data, (offset, -N) for N chunks in a hole (lseek(2), SEEK_DATA)."""
    at = 0
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            data = size  # ENXIO: no data up to the end
        hole = -(-(size - at) // step) if data >= size else (data - at) // step
        yield at, -hole if hole else 1
        at += (hole or 1) * step
