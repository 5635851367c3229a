"""From a directory to an index: walk, hash, compress, put, in one ordered pipeline.

The walk yields entries in index order; threads hash and compress batches of files; results are consumed in order, so the
index and the packs are the same whatever the number of threads.  Without a store only the digests are made.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field

from cafs import chunks
from cafs import format as fmt
from cafs.atomic import read_exactly as _read_whole
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, FormatError, quote
from cafs.format import Entry, Header
from cafs.objects import Made, ObjectMaker, is_zero
from cafs.ordered import ordered_map
from cafs.statcache import StatCache
from cafs.walk import OPEN_FILE, Found, Walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from cafs.upper import UpperWalk
    from cafs.writer import Writer

    Content: TypeAlias = "Made | CafsError | OSError | None"

_BATCH_FILES = 128
_BATCH_BYTES = 1 << 21


@dataclass(slots=True)
class _Batch:
    """Entries in order; those at READS are files whose content is still to be made, SIZE bytes in all."""

    entries: list[tuple[Found, Content]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    size: int = 0


@dataclass
class Indexer:
    """One indexing run.

    writer: where objects go, None to make digests only.  threads: hashing threads, at least 1.
    cache: remembered digests, None to hash everything.  progress: called with (entries, bytes) now and then.
    """

    walk: Walk | UpperWalk
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
        self._maker = ObjectMaker(self.header, self.writer)

    def run(self) -> bytes:
        """The whole index file.  Raises CafsError naming the file that could not be read or that changed."""
        lines = [self.header.encode()]
        lines += (entry.encode() for _, entry in self.entries())
        lines.append(fmt.encode_trailer(len(lines) - 1))
        return b"".join(lines)

    def entries(self) -> Iterator[tuple[Found, Entry]]:
        """Each entry, in order, after its objects are put.  Raises CafsError as `run` does."""
        self._start_ns = time.time_ns()
        for number, (found, made) in enumerate(self._contents()):
            entry = found.ready or self._entry(found, made)
            if entry:
                yield found, entry
            if self.progress and number % 500 == 0:
                self.progress(number, self.bytes_seen)

    @property
    def left_out(self) -> int:
        """Number of xattrs that an index does not list."""
        return self.walk.left_out

    @property
    def skipped(self) -> list[tuple[bytes, str]]:
        """What could not be read, and why."""
        return self.walk.skipped

    def _contents(self) -> Iterator[tuple[Found, Content]]:
        done = ordered_map(
            self._read_batch,
            self._batches(),
            self.threads,
            window=4 * self.threads,
            drop=_drop,
            is_light=lambda batch: not batch.reads,
        )
        for entries in done:
            yield from entries

    def _batches(self) -> Iterator[_Batch]:
        batch = _Batch()
        for found in self.walk.run():
            self._mark_hardlink(found)
            self._add(batch, found)
            if len(batch.entries) >= _BATCH_FILES or batch.size >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
        if batch.entries:
            yield batch

    def _add(self, batch: _Batch, found: Found) -> None:
        """Look a file up in the cache; if it is not there, a thread will read it, or, if it is large, all will in its turn."""
        made: Content = None
        if found.ready:
            found.directory.release()
            batch.entries.append((found, None))
            return
        size = found.status.st_size if found.kind == fmt.FILE else 0
        if size:
            try:
                made = self._remembered(found)
            except (CafsError, OSError) as error:
                made = error
        if size and not made and size <= self.header.chunk_size:
            batch.reads.append(len(batch.entries))
            batch.size += size
        elif not size or made:
            found.directory.release()
        batch.entries.append((found, made))

    def _mark_hardlink(self, found: Found) -> None:
        """Only the first name of an inode has content."""
        status = found.status
        if found.kind not in (fmt.DIRECTORY, fmt.OPAQUE) and status.st_nlink > 1 and not found.ready:
            first = self._inodes.setdefault((status.st_dev, status.st_ino), found.path)
            if first != found.path:
                found.kind, found.target = fmt.HARDLINK, first

    def _read_batch(self, batch: _Batch) -> list[tuple[Found, Content]]:
        """On a thread: read, hash and compress.  Failures are returned, in their place."""
        read: list[tuple[int, bytes]] = []
        for at in batch.reads:
            found = batch.entries[at][0]
            try:
                read.append((at, self._read(found)))
            except (CafsError, OSError) as error:
                batch.entries[at] = found, error
            found.directory.release()
        for (at, _), made in zip(read, self._maker.make_all([data for _, data in read]), strict=True):
            batch.entries[at] = batch.entries[at][0], made
        return batch.entries

    def _remembered(self, found: Found) -> Made | None:
        if found.content:
            return Made(*found.content, fresh=False)
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

    def _read(self, found: Found) -> bytes:
        """The content of a file of at most one chunk."""
        fd = _open(found)
        try:
            data = _read_whole(fd, found.status.st_size, 0)
            _check_unchanged(fd, found)
        finally:
            os.close(fd)
        if len(data) != found.status.st_size:
            raise _changed(found.path)
        return data

    def _read_large(self, found: Found) -> Made:
        """The chunk list of a larger file: its chunks are read by all threads and put in order."""
        size, step = found.status.st_size, self.header.chunk_size
        runs: list[tuple[int, bytes]] = []
        fd = _open(found)
        try:

            def one(piece: tuple[int, int]) -> tuple[int, Made | None]:
                offset, count = piece
                if count < 0:
                    return -count, None
                data = _read_whole(fd, min(step, size - offset), offset)
                if len(data) != min(step, size - offset):
                    raise _changed(found.path)
                return 1, None if is_zero(data) else self._maker.make(data)

            for count, made in ordered_map(one, _pieces(fd, size, step), self.threads, window=2 * self.threads):
                runs.append((count, made.digest if made else b""))
                if made:
                    self._maker.put(made)
            _check_unchanged(fd, found)
        finally:
            os.close(fd)
        return self._maker.make_list(size, runs, found.path)

    def _entry(self, found: Found, made: Content) -> Entry | None:
        """An entry, after its objects are put.  None if it was skipped."""
        status = found.status
        if found.kind == fmt.HARDLINK:
            return None if found.target in self._failed else Entry(fmt.HARDLINK, found.path, target=found.target)
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
            return None
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
        return entry

    def _keep(self, made: Made, found: Found) -> None:
        self._maker.put(made)
        if self.cache and not found.content:
            self.cache.add(found.status, made.kind, made.digest, self._start_ns)
        self.bytes_seen += found.status.st_size
        self.files_read += made.fresh


def _open(found: Found) -> int:
    return os.open(found.name, OPEN_FILE, dir_fd=found.directory.fd)


def _check_unchanged(fd: int, found: Found) -> None:
    """After reading: that the file is still the one which was listed, as it was then."""
    now, then = os.fstat(fd), found.status
    if (now.st_ctime_ns, now.st_mtime_ns, now.st_size, now.st_ino, now.st_dev) != (
        then.st_ctime_ns, then.st_mtime_ns, then.st_size, then.st_ino, then.st_dev
    ):  # fmt: skip
        raise _changed(found.path)


def _changed(path: bytes) -> CafsError:
    return CafsError(f"file {quote(path)} changed while the tree was read")


def _drop(batch: _Batch) -> None:
    for at in batch.reads:
        batch.entries[at][0].directory.release()


def _pieces(fd: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, 1) for a chunk that has data, (offset, -N) for N chunks in a hole (lseek(2), SEEK_DATA)."""
    at = 0
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EINVAL):
                raise
            data = size if error.errno == errno.ENXIO else at  # no data up to the end; or a file system without holes
        hole = -(-(size - at) // step) if data >= size else (data - at) // step
        yield at, -hole if hole else 1
        at += (hole or 1) * step
