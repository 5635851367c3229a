"""Large files in the cache: chunks are written where they belong in one growing file, which is linked when it is whole.

cafs-store(5), CACHE.  partial/NAME is the file, partial/NAME.map says which chunks are in it.  Neither waits for the disk: each
process verifies a chunk before it uses it for the first time, and after a crash of the machine so does a kernel mount.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
from bisect import bisect_right
from itertools import accumulate

from cafs import atomic, chunks
from cafs.digest import CHUNK_LIST, PLAIN, checksum, object_name
from cafs.errors import CafsError, CorruptError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from typing_extensions import Buffer

    from cafs.cache import Cache
    from cafs.chunks import ChunkList
    from cafs.locator import Locator, Place

MAP_MAGIC = b"CAFSMAP1"
_MAP_HEAD = struct.Struct("<QQ")
_SAVE_EVERY = 8
_AHEAD_MAX = 8
_TRACKED_MAX = 1 << 26
"""A file of more chunks (256 TiB of 4 MiB each) is not kept in the cache: its map would be too large."""

_log = logging.getLogger(__name__)


class ChunkedFile:
    """One large file of a mounted index.  Thread-safe.  Close it to save what is known of it."""

    def __init__(self, cache: Cache, digest: bytes, place: Place | None, locator: Locator | None) -> None:
        """place: of the chunk list; locator: of the chunks.  Raises CafsError."""
        self.cache = cache
        self.locator = locator
        data = cache.read_list(digest, place)
        self.listed: ChunkList = chunks.decode(data, cache.store.hash_name, cache.store.chunk_size)
        self.listed_digest = digest
        self.whole_path = cache.path(digest, CHUNK_LIST)
        self.path = os.path.join(cache.root, "partial", object_name(digest, CHUNK_LIST))
        self._lock = threading.Lock()
        self._verified: set[int] = set()
        self._unsaved = 0
        self._last = self._in_order = -1
        self._ahead = threading.Lock()
        self._flying: dict[int, Future[None]] = {}
        self._ends = list(accumulate(count for count, _ in self.listed.runs))
        self._is_linked = False
        self._needed = bytearray()
        self._fd, self._present = self._open()

    def _open(self) -> tuple[int, bytearray]:
        """The whole file if it is there, else the growing one; -1 where neither can be had."""
        if self.listed.chunks() > _TRACKED_MAX:
            return -1, bytearray()
        bits = bytearray(-(-self.listed.chunks() // 8))
        self._needed = self._all(len(bits))
        try:
            fd = os.open(self.whole_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            if os.fstat(fd).st_size == self.listed.size:
                self._is_linked = True
                return fd, bytearray(self._needed)
            os.close(fd)
            os.unlink(self.whole_path)
        except OSError:
            pass
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            fd = -1
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if os.fstat(fd).st_size != self.listed.size:
                atomic.unlink_quietly(self.path + ".map")  # of one that has gone
                os.ftruncate(fd, self.listed.size)
                return fd, bits
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            _log.warning("cannot write to cache %s: %s; serving from memory", self.path, error.strerror)
            return -1, bits
        self._merge_map(bits)
        return fd, bits

    def _all(self, size: int) -> bytearray:
        """The map of SIZE bytes in which every chunk is that is not a hole."""
        bits, number = bytearray(size), 0
        for count, digest in self.listed.runs:
            end = number + count if digest else number
            first, last = -(-number // 8), end // 8
            bits[first:last] = b"\xff" * (last - first)
            for one in (*range(number, min(8 * first, end)), *range(max(8 * last, number), end)):
                bits[one >> 3] |= 1 << (one & 7)
            number += count
        return bits

    def read(self, offset: int, size: int) -> bytes:
        """Verified bytes; fewer only at the end of the file.  May wait for the store.  Raises CafsError."""
        parts = list(self._parts(offset, size))
        self._look_ahead(parts)
        return b"".join(
            self._ready(number, within, length) or self._load(number, within, length) for number, within, length in parts
        )

    def read_ready(self, offset: int, size: int) -> bytes | None:
        """The same if nothing has to be fetched or verified for it, else None."""
        parts = list(self._parts(offset, size))
        found = [self._ready(*part) for part in parts]
        if None in found:
            return None
        self._look_ahead(parts)
        return found[0] if len(found) == 1 else b"".join(found)  # type: ignore[arg-type]

    def _look_ahead(self, parts: list[tuple[int, int, int]]) -> None:
        """Who goes from one chunk to the next will want the one after it: have it fetched, and more the longer it goes on."""
        for number, _, _ in parts:
            if number != self._last:
                self._in_order = self._in_order + 1 if number == self._last + 1 else 0
                self._last = number
                for ahead in range(number + 1, min(number + 1 + min(self._in_order, _AHEAD_MAX), self.listed.chunks())):
                    self._begin(ahead)

    def _begin(self, number: int) -> None:
        """Fetch a chunk behind, unless it is here or on its way."""
        with self._ahead:  # not _lock, which is held while the file is written to disk
            if self._fd < 0 or self._has(number) or number in self._flying or not self._digest(number):
                return
            self._flying[number] = self.cache.behind.submit(self._fetch_behind, number)

    def _fetch_behind(self, number: int) -> None:
        try:
            self._load(number, 0, 0)
        except (CafsError, OSError) as error:
            _log.debug("cannot read ahead: %s", error)  # who needs it will say
        finally:
            with self._ahead:
                self._flying.pop(number, None)

    @property
    def is_busy(self) -> bool:
        """Whether chunks are being fetched that nobody waits for."""
        return bool(self._flying)

    def keep(self, number: int, data: Buffer) -> None:
        """Put a chunk that was verified, if it is not there."""
        if self._fd < 0 or self._has(number) or memoryview(data).nbytes != self.listed.length_at(number):
            return
        try:
            self.cache.with_room(lambda: self._write(number, data), memoryview(data).nbytes)
        except OSError as error:
            _log.warning("cannot write to cache %s: %s", self.path, error.strerror)
            return
        self.cache.count_miss(memoryview(data).nbytes)
        self._mark(number)

    def chunks_at(self, offset: int, size: int) -> list[bytes]:
        """The digests of the chunks of a range that would have to be fetched."""
        return [self._digest(number) for number, _, _ in self._parts(offset, size) if not self._has(number)]

    def _parts(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, offset in it, length) of what makes up a range."""
        size = max(min(size, self.listed.size - offset), 0)
        while size:
            number, within = divmod(offset, self.listed.chunk_size)
            length = min(size, self.listed.length_at(number) - within)
            yield number, within, length
            offset += length
            size -= length

    def _digest(self, number: int) -> bytes:
        return self.listed.runs[bisect_right(self._ends, number)][1]

    def _ready(self, number: int, within: int, length: int) -> bytes | None:
        if number in self._verified:
            return atomic.read_exactly(self._fd, length, number * self.listed.chunk_size + within)
        return None if self._digest(number) else bytes(length)

    def _load(self, number: int, within: int, length: int) -> Buffer:
        """A part of a chunk that has to be verified, or fetched, unless somebody else did while we waited for the lock."""
        digest = self._digest(number)
        with self.cache.single_flight((digest, PLAIN)):
            if (ready := self._ready(number, within, length)) is not None:
                return ready
            return (self._cached(number, digest) or memoryview(self._fetch(number, digest)))[within : within + length]

    def _cached(self, number: int, digest: bytes) -> memoryview | None:
        """The chunk, if it is in the file and what it should be."""
        if self._fd < 0 or not self._has(number):
            return None
        data = atomic.read_exactly(self._fd, self.listed.length_at(number), number * self.listed.chunk_size)
        if self.cache.store.hash(data) == digest:
            self._verified.add(number)
            self.cache.count_hit(len(data))
            return memoryview(data)
        _log.warning("chunk %d of cached object %s is damaged: fetched again", number, os.path.basename(self.path))
        return None

    def _fetch(self, number: int, digest: bytes) -> Buffer:
        place = self.locator.chunk(digest) if self.locator is not None else None
        data = memoryview(self.cache.store.read_view(digest, PLAIN, place))
        self.cache.count_miss(len(data))
        if len(data) != self.listed.length_at(number):
            raise CorruptError(f"chunk {digest.hex()} is not of the size that its list says")
        if self._fd >= 0:
            try:
                self.cache.with_room(lambda: self._write(number, data), len(data))
            except OSError as error:
                _log.warning("cannot write to cache %s: %s; serving from memory", self.path, error.strerror)
                return data
            self._mark(number)
        return data

    def _write(self, number: int, data: Buffer) -> None:
        """Put a chunk in its place; also into a whole file in which it was damaged."""
        offset = number * self.listed.chunk_size
        if fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE:
            atomic.write_all_at(self._fd, data, offset)
            return
        path = f"/proc/self/fd/{self._fd}"
        os.chmod(path, 0o600)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                atomic.write_all_at(fd, data, offset)
            finally:
                os.close(fd)
        finally:
            os.chmod(path, 0o444)

    def _has(self, number: int) -> bool:
        return bool(self._present[number >> 3] >> (number & 7) & 1)

    def _mark(self, number: int) -> None:
        with self._lock:
            self._present[number >> 3] |= 1 << (number & 7)
            self._verified.add(number)
            self._unsaved += 1
            if self._unsaved >= _SAVE_EVERY or self._is_whole():
                self._save()

    def _is_whole(self) -> bool:
        return self._present == self._needed

    def _save(self) -> None:
        """Write the map, with what other processes know; give the file its name if nothing is missing."""
        self._unsaved = 0
        if self._is_linked:
            self.cache.ledger.note((self.listed_digest, CHUNK_LIST), os.fstat(self._fd))
            return
        try:
            self._merge_map(self._present)
            if self._is_whole():
                self._verify_all()
            head = _MAP_HEAD.pack(self.listed.size, self.listed.chunk_size)
            body = head + self._present
            atomic.replace_hint(self.path + ".map", MAP_MAGIC + checksum(body) + body, 0o600)
            if self._is_whole():
                os.fchmod(self._fd, 0o444)
                os.makedirs(os.path.dirname(self.whole_path), exist_ok=True)
                try:
                    os.link(self.path, self.whole_path)
                except FileExistsError:
                    pass
                atomic.unlink_quietly(self.path)
                atomic.unlink_quietly(self.path + ".map")
                self._is_linked = True
                self.cache.ledger.note((self.listed_digest, CHUNK_LIST), os.fstat(self._fd))
        except OSError as error:
            _log.warning("cannot write to cache %s: %s", self.path, error.strerror)

    def _verify_all(self) -> None:
        """Before the file is called whole: make sure of the chunks of which only the map says that they are there."""
        for number in range(self.listed.chunks()):
            digest = self._digest(number)
            if digest and number not in self._verified:
                data = atomic.read_exactly(self._fd, self.listed.length_at(number), number * self.listed.chunk_size)
                if self.cache.store.hash(data) == digest:
                    self._verified.add(number)
                else:
                    self._present[number >> 3] &= ~(1 << (number & 7))

    def _merge_map(self, bits: bytearray) -> None:
        """Add what the map on disk says; a damaged one says nothing."""
        try:
            data = atomic.read_file(self.path + ".map", 1 << 26)
        except OSError:
            return
        body = data[len(MAP_MAGIC) + 16 :]
        head = _MAP_HEAD.pack(self.listed.size, self.listed.chunk_size)
        if data != MAP_MAGIC + checksum(body) + body or not body.startswith(head) or len(body) != len(head) + len(bits):
            return
        for at, byte in enumerate(body[len(head) :]):
            bits[at] |= byte & self._needed[at]

    def save(self) -> None:
        """Save the map; the file stays open."""
        with self._lock:
            if self._fd >= 0 and self._unsaved:
                self._save()

    def close(self) -> None:
        """Save the map."""
        for one in list(self._flying.values()):
            one.result()
        with self._lock:
            if self._fd >= 0:
                if self._unsaved:
                    self._save()
                os.close(self._fd)
                self._fd = -1
