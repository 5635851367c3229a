"""The cache: verified objects as loose files on local disk, filled from a store on demand.  cafs-store(5), CACHE.

Files larger than a chunk are partial.py's.
Safe to delete at any time.  What was put by an earlier process is verified once by each process before its first use.
A miss is fetched once however many threads and processes ask: a lock in the process, and an open-file-description lock
(fcntl(2)) on one byte of a lock file, which the kernel drops when its owner dies.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from contextlib import contextmanager
from functools import cached_property

from cafs import atomic, linux, paths, quota
from cafs.digest import CHUNK_LIST, object_name
from cafs.errors import CafsError, os_error, quote
from cafs.ledger import Ledger, set_aside
from cafs.quota import Stats
from cafs.request import FETCH_LIMIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import ThreadPoolExecutor
    from typing import TypeVar

    from typing_extensions import Buffer

    from cafs.locator import Place
    from cafs.store import Store

    Result = TypeVar("Result")

_LOCK_POLL_S = 0.01
_OBJECT_MAX = 1 << 26
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 64 << 20
_BEHIND = 4
_FULL_FOR_S = 10.0
_log = logging.getLogger(__name__)

Key = tuple[bytes, int]


class Cache:
    """Objects of one store, by way of one cache directory.  Thread-safe."""

    def __init__(self, root: str, store: Store, *, limit_s: float = FETCH_LIMIT_S) -> None:
        self.root = root
        self.store = store
        self.limit_s = limit_s
        self._verified: dict[Key, tuple[int, int, int, int]] = {}
        self._guard = threading.Lock()
        self._in_flight: dict[Key, threading.Lock] = {}
        self._room = threading.Lock()
        self._full_until = 0.0
        self._rooms = 0
        self.evicted: Callable[[], None] = lambda: None
        """Called when something went from the cache for want of room."""
        self.stats = Stats()
        self.ledger = Ledger(root, store.hash_name, store.chunk_size)
        try:
            paths.make_private(root, paths.objects(root))
        except OSError as error:
            raise os_error(f"cannot use cache {quote(root)}", error) from error

    @cached_property
    def behind(self) -> ThreadPoolExecutor:
        """Threads for what nobody waits for."""
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(_BEHIND)

    def path(self, digest: bytes, kind: int) -> str:
        """Where an object is, if it is cached."""
        name = object_name(digest, kind)
        return os.path.join(paths.objects(self.root), name[:2], name[2:])

    def _list_path(self, digest: bytes) -> str:
        return os.path.join(self.root, "lists", digest.hex())

    def open(self, digest: bytes, kind: int, hint: Place | None = None) -> int:
        """A descriptor of the whole, verified object; the caller closes it.  hint: where in the store.  Raises CafsError."""
        fd = self.open_cached(digest, kind)
        if fd is not None:
            self.count_hit(os.fstat(fd).st_size)
            return fd
        with self.single_flight((digest, kind)):
            fd = self.open_cached(digest, kind)
            return self._fetch(digest, kind, hint) if fd is None else fd

    def is_there(self, digest: bytes, kind: int) -> bool:
        """Whether there is an object of this name; it may be damaged."""
        return os.path.lexists(self.path(digest, kind))

    def has(self, digest: bytes, kind: int) -> bool:
        """Whether the whole object is here and verified."""
        fd = self.open_cached(digest, kind)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def keep(self, digest: bytes, kind: int, data: Buffer) -> None:
        """Put an object that was verified.  Raises CafsError if that cannot be done."""
        self.count_miss(memoryview(data).nbytes)
        try:
            os.close(self.with_room(lambda: self._put(digest, kind, data), memoryview(data).nbytes))
        except OSError as error:
            raise os_error(f"cannot write to cache {quote(self.root)}", error) from error

    def count_hit(self, size: int) -> None:
        """SIZE bytes were here."""
        self.stats.hits += 1
        self.stats.bytes_saved += size

    def count_miss(self, size: int) -> None:
        """SIZE bytes were fetched."""
        self.stats.misses += 1
        self.stats.bytes_fetched += size

    def with_room(self, write: Callable[[], Result], size: int) -> Result:
        """Write SIZE bytes to the cache; if its disk is full, make room and do it once more.  Raises OSError."""
        before = self._rooms
        try:
            return write()
        except OSError as error:
            if error.errno not in _FULL or not self._make_room(size, before):
                raise
            return write()

    def _make_room(self, size: int, before: int) -> bool:
        """What was used longest ago goes; whether anything did since room was made BEFORE times.

        Also if there is room by the numbers: it may be file numbers, or a quota, that have run out.
        """
        with self._room:
            if self._rooms > before:
                return True
            if time.monotonic() < self._full_until:
                return False
            if not quota.evict(self.root, max(_ROOM, 2 * size)).files:
                self._full_until = time.monotonic() + _FULL_FOR_S
                return False
            self._rooms += 1
        self.evicted()
        return True

    def take_stats(self) -> Stats:
        """What was counted since the last time."""
        taken, self.stats = self.stats, Stats()
        return taken

    def read_list(self, digest: bytes, hint: Place | None = None) -> bytes:
        """The verified bytes of a chunk list.  It is kept in lists/: the name of the object is for the whole file."""
        from cafs.chunks import LIST_MAX

        path = self._list_path(digest)
        try:
            data = atomic.read_file(path, LIST_MAX)
            if self.store.hash(data) == digest:
                return data
        except OSError:
            pass
        with self.single_flight((digest, CHUNK_LIST)):
            data = self.store.read_object(digest, CHUNK_LIST, hint)
        self.keep_list(digest, data)
        return data

    def kept_chunks(self, digest: bytes) -> set[bytes]:
        """The chunks of a list that is kept here; none if it is not."""
        from cafs import chunks

        try:
            data = atomic.read_file(self._list_path(digest), chunks.LIST_MAX)
            listed = chunks.decode(data, self.store.hash_name, self.store.chunk_size)
        except (OSError, CafsError):
            return set()
        return {chunk for _, chunk in listed.runs if chunk}

    def keep_list(self, digest: bytes, data: bytes) -> None:
        """Put a chunk list that was verified, if that can be done."""
        path = self._list_path(digest)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            atomic.replace_hint(path, data, 0o444)
        except OSError as error:
            _log.warning("cannot write to cache %s: %s", self.root, error.strerror)

    def open_cached(self, digest: bytes, kind: int) -> int | None:
        """A descriptor of what is cached, None if it is not; verified once in each process.  What is damaged is set aside."""
        path = self.path(digest, kind)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        status = os.fstat(fd)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._verified.get((digest, kind))
        # The link count, and with it ctime, changes while an object is published: so ino, size and mtime decide.
        if known and known[:3] == stamp[:3]:
            return fd
        if status.st_size <= _OBJECT_MAX:
            try:
                if self.store.hash(atomic.read_exactly(fd, status.st_size, 0)) == digest:
                    self._verified[digest, kind] = stamp
                    return fd
            except OSError as error:
                _log.warning("cannot read cached object %s: %s", path, error.strerror)
        os.close(fd)
        self._quarantine(path)
        return None

    def _quarantine(self, path: str) -> None:
        _log.warning("cached object %s is damaged: set aside and fetched again", path)
        set_aside(self.root, path)

    def _fetch(self, digest: bytes, kind: int, hint: Place | None) -> int:
        data = self.store.read_object(digest, kind, hint)
        self.count_miss(len(data))
        try:
            return self.with_room(lambda: self._put(digest, kind, data), len(data))
        except OSError as error:
            if error.errno not in (*_FULL, errno.EROFS):
                raise os_error(f"cannot write to cache {quote(self.root)}", error) from error
            _log.warning("cannot write to cache %s: %s; serving from memory", self.root, error.strerror)
            fd = os.memfd_create("cafs-object", os.MFD_CLOEXEC)
            atomic.write_all(fd, data)
            return fd

    def _put(self, digest: bytes, kind: int, data: Buffer) -> int:
        """Make verified bytes visible.  No fsync: after a crash of the machine each process verifies before use."""
        path = self.path(digest, kind)
        temporary = atomic.temporary_name(os.path.dirname(path))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o444)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(temporary, flags, 0o444)
        try:
            atomic.write_all(fd, data)
            os.rename(temporary, path)  # over what is there, which is the same or damaged; whoever reads it keeps it
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            atomic.unlink_quietly(temporary)
            raise
        self._verified[digest, kind] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self.ledger.note((digest, kind), status)
        return fd

    @contextmanager
    def single_flight(self, key: Key) -> Iterator[None]:
        """Hold this while fetching the object; look again whether it came meanwhile."""
        with self._guard:
            lock = self._in_flight.setdefault(key, threading.Lock())
        if not lock.acquire(timeout=self.limit_s):
            raise CafsError(f"object {object_name(*key)} was not fetched within {self.limit_s:g} s")
        try:
            fd = self._lock_byte(key[0])
            try:
                yield
            finally:
                if fd >= 0:
                    os.close(fd)
        finally:
            lock.release()
            with self._guard:
                self._in_flight.pop(key, None)

    def _lock_byte(self, digest: bytes) -> int:
        """Lock one byte of the lock file, chosen by the digest.  After the limit, or without room for it, go on without."""
        try:
            fd = os.open(os.path.join(self.root, "fetch.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return -1
        start = int.from_bytes(digest[:7], "big")
        deadline = time.monotonic() + self.limit_s / 2
        while True:
            try:
                linux.lock_byte(fd, fcntl.F_WRLCK, start)
                return fd
            except OSError:
                if time.monotonic() > deadline:
                    return fd
                time.sleep(_LOCK_POLL_S)
