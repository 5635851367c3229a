"""Reads of a mount: a node in, verified bytes out, from the cache or, on a miss, from the store with what lies near.

Shared by both file systems that are served through /dev/fuse: LAZY and the tree.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from itertools import islice

from cafs import atomic
from cafs.digest import CHUNK_LIST, PLAIN, object_name
from cafs.errors import CafsError, CorruptError, NotFound
from cafs.fusedev import FileSystem
from cafs.locator import locate
from cafs.packs import FORMAT_FILE
from cafs.partial import ChunkedFile
from cafs.serving import PREFETCH
from cafs.stream import Stream
from cafs.window import Windows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from cafs.cache import Cache
    from cafs.locator import Locator, Place
    from cafs.record import Recorder

    Key = tuple[bytes, int]
    Where = tuple[int, Place | None, Locator | None]  # size in bytes, where it is, whose place that is

_OPEN_MAX = 256
_LARGE_MAX = 64
_PAUSE_S = 0.5
_log = logging.getLogger(__name__)


class Reader(FileSystem):
    """Files of objects.  recorder: is told of every read.  Thread-safe."""

    def __init__(self, state: str, cache: Cache, recorder: Recorder | None = None) -> None:
        self.state = state
        self.cache = cache
        self.recorder = recorder
        self.brought: Callable[[], None] = lambda: None
        """Called when a profile has come."""
        self.streams: list[Stream] = []
        self._asked: set[str] = set()
        self._asking = threading.Lock()
        self._streaming: set[int] = set()
        self.windows = Windows(cache)
        self._open: OrderedDict[Key, int | ChunkedFile] = OrderedDict()
        self._users: dict[Key, int] = {}
        self._lock = threading.Lock()

    def key(self, node: int) -> Key:
        """Digest and kind of the object that is a file's content.  Raises OSError."""
        raise NotImplementedError

    def where(self, node: int) -> Where:
        """Its size, and where it is.  Raises OSError."""
        raise NotImplementedError

    def all_locators(self) -> list[Locator]:
        """Of the indexes of everything that is served."""
        raise NotImplementedError

    def look_for_requests(self) -> None:
        """Begin to bring what is asked for in state/prefetch: profiles, then all of some layers."""
        directory = os.path.join(self.state, PREFETCH)
        with self._asking:
            wanted = {}
            for name in os.listdir(directory):
                if name not in self._asked and not name.startswith("tmp."):
                    try:
                        wanted[name] = json.loads(atomic.read_file(os.path.join(directory, name), 1 << 20))
                    except (OSError, ValueError):
                        continue  # it was done just now
            self._asked.update(wanted)
            for name, what in sorted(wanted.items(), key=lambda pair: "profile" not in pair[1]):
                if "profile" in what:
                    stream = Stream(self.cache, what["profile"], self._large, self._let_large_go)
                    self.streams.append(stream)
                    threading.Thread(target=self._bring, args=(name, stream), daemon=True).start()
                else:
                    threading.Thread(target=self._complete, args=(name, what["layers"], what["rate"]), daemon=True).start()

    def _is_done(self, name: str) -> None:
        """Something was brought, or cannot be: it may be asked for again."""
        with self._asking:
            atomic.unlink_quietly(os.path.join(self.state, PREFETCH, name))
            self._asked.discard(name)

    def _bring(self, name: str, stream: Stream) -> None:
        self._streaming.add(threading.get_ident())
        try:
            is_any = stream.run()
        finally:
            self.streams.remove(stream)
            self._streaming.discard(threading.get_ident())
            self._is_done(name)
        if is_any:
            self.brought()

    def _complete(self, name: str, layers: list[str], rate: int) -> None:
        from cafs.complete import complete

        for stream in list(self.streams):
            stream.ended.wait()  # what is read first comes first
        locators = [one for one in self.all_locators() if one.index.hex() in layers]
        keys = (key for one in locators for key in one.objects())
        try:
            complete(self.cache, keys, locators, rate=rate, large=self._large, let_go=self._let_large_go)
        except (CafsError, OSError) as error:
            _log.warning("cannot bring all of the image: %s", error)
        finally:
            self._is_done(name)
        self.brought()

    def _large(self, digest: bytes) -> ChunkedFile:
        """The open large file of a chunk list, which the caller lets go."""

        def make() -> ChunkedFile:
            return ChunkedFile(self.cache, digest, *locate(self.all_locators(), digest, CHUNK_LIST))

        found = self._opened((digest, CHUNK_LIST), make)
        assert not isinstance(found, int)
        return found

    def _let_large_go(self, digest: bytes) -> None:
        self._let_go((digest, CHUNK_LIST))

    def read_ready(self, node: int, offset: int, size: int) -> Buffer | None:
        """What is at hand: of a file that is open here."""
        key = self.key(node)
        if self.recorder:
            self.recorder.saw(*key, offset, size)
        found = self._use(key)
        if found is None and key[1] == PLAIN:
            found = self._open_cached(key, node)
        if found is None:
            return None
        try:
            return os.pread(found, size, offset) if isinstance(found, int) else found.read_ready(offset, size)
        finally:
            self._let_go(key)

    def _open_cached(self, key: Key, node: int) -> int | ChunkedFile | None:
        """The open file of a small object that the cache has, which the caller lets go."""
        fd = self.cache.open_cached(*key)
        if fd is None:
            return None
        if os.fstat(fd).st_size != self.where(node)[0]:
            os.close(fd)
            return None
        self.cache.count_hit(os.fstat(fd).st_size)
        return self._keep_open(key, fd)

    def is_near(self, node: int) -> bool:
        return self.cache.is_there(*self.key(node))

    def read(self, node: int, offset: int, size: int) -> Buffer:
        """May wait for the store."""
        key = self.key(node)
        try:
            found = self._opened(key, lambda: self._make(key, node))
            try:
                if isinstance(found, int):
                    return os.pread(found, size, offset)
                return self._read_large(found, node, offset, size)
            finally:
                self._let_go(key)
        except CafsError as error:
            _log.error("reading %s: %s", self.describe(node), error)
            raise OSError(errno.EIO, str(error)) from error

    def _read_large(self, file: ChunkedFile, node: int, offset: int, size: int) -> bytes:
        whole, _, locator = self.where(node)
        if file.listed.size != whole:
            raise CafsError("chunk list is not of the size that the index says")
        if file.locator is None:
            file.locator = locator  # a stream has opened it
        for chunk in file.chunks_at(offset, size):
            self._await(chunk)
        return file.read(offset, size)

    def describe(self, node: int) -> str:
        """An object's name, for the log."""
        try:
            return f"object {object_name(*self.key(node))} of store {self.cache.store.root}"
        except OSError:
            return super().describe(node)

    def save(self) -> None:
        """Save what is known of large files; reads go on."""
        with self._lock:
            found = list(self._open.values())
        for one in found:
            if isinstance(one, ChunkedFile):
                one.save()

    def close(self) -> None:
        """When nobody reads any more."""
        while self._open:
            _, one = self._open.popitem()
            os.close(one) if isinstance(one, int) else one.close()

    def _use(self, key: Key) -> int | ChunkedFile | None:
        """The open file of an object if there is one, which the caller lets go."""
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                self._users[key] = self._users.get(key, 0) + 1
            return found

    def _opened(self, key: Key, make: Callable[[], int | ChunkedFile]) -> int | ChunkedFile:
        """The open file of an object, opened by MAKE if it is not, which the caller lets go."""
        found = self._use(key)
        return self._keep_open(key, self._patiently(make)) if found is None else found

    def _keep_open(self, key: Key, made: int | ChunkedFile) -> int | ChunkedFile:
        """Let others use a file that was just opened, unless one of them was first; the caller lets go what this returns."""
        with self._lock:
            found = self._open.setdefault(key, made)
            self._users[key] = self._users.get(key, 0) + 1
            closing = [self._open.pop(one) for one in self._too_many(key[1])]
        for one in [*closing, *([made] if made is not found else [])]:
            if isinstance(one, int):
                os.close(one)
            else:
                self.cache.behind.submit(one.close)  # which may have much to write, or to verify
        return found

    def _too_many(self, kind: int) -> set[Key]:
        """After one of KIND was opened, what was used longest ago of the files that nobody reads."""
        found = self._idle(self._open, len(self._open) - _OPEN_MAX)
        if kind == CHUNK_LIST:
            large = [one for one in self._open if one[1] == CHUNK_LIST]
            found |= self._idle(large, len(large) - _LARGE_MAX)
        return found

    def _idle(self, keys: Iterable[Key], count: int) -> set[Key]:
        """The first COUNT that nobody reads."""
        return set(islice((one for one in keys if one not in self._users and not self._is_busy(one)), max(count, 0)))

    def _is_busy(self, key: Key) -> bool:
        found = self._open[key]
        return not isinstance(found, int) and found.is_busy

    def _let_go(self, key: Key) -> None:
        with self._lock:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]

    def _patiently(self, make: Callable[[], int | ChunkedFile]) -> int | ChunkedFile:
        """A store that is away may come back: try until the limit.  What is damaged, or not in a store that is there, fails."""
        deadline = time.monotonic() + self.cache.limit_s
        while True:
            try:
                return make()
            except CorruptError:
                raise
            except CafsError as error:
                if time.monotonic() > deadline or (isinstance(error, NotFound) and self._is_there()):
                    raise
            time.sleep(_PAUSE_S)

    def _await(self, digest: bytes) -> None:
        """Wait for what a stream is about to bring; streams do not wait for one another."""
        if threading.get_ident() in self._streaming:
            return
        for stream in list(self.streams):
            stream.wait(digest)

    def _is_there(self) -> bool:
        try:
            return self.cache.store.backend.exists(FORMAT_FILE)
        except (CafsError, OSError):
            return False

    def _make(self, key: Key, node: int) -> int | ChunkedFile:
        digest, kind = key
        size, place, locator = self.where(node)
        if not self.cache.is_there(digest, kind):
            self._await(digest)
        if kind == CHUNK_LIST:
            return ChunkedFile(self.cache, digest, place, locator)
        if place and locator and not self.cache.is_there(digest, PLAIN):
            self.windows.bring(locator, digest, place)
        fd = self.cache.open(digest, PLAIN, place)
        if os.fstat(fd).st_size != size:
            os.close(fd)
            raise CafsError("object is not of the size that the index says")
        return fd
