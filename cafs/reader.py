"""Reads of a mount: a node in, verified bytes out, from the cache or, on a miss, from the store with what lies near.

Shared by both file systems that are served through /dev/fuse: LAZY and the tree.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import OrderedDict

from cafs import atomic
from cafs.digest import CHUNK_LIST, PLAIN, object_name
from cafs.errors import CafsError, CorruptError, NotFound
from cafs.fusedev import FileSystem
from cafs.lazyd import PREFETCH
from cafs.partial import ChunkedFile
from cafs.store import FORMAT_FILE
from cafs.stream import Stream
from cafs.window import Windows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cafs.cache import Cache
    from cafs.locator import Locator, Place
    from cafs.record import Recorder

    Content = tuple[bytes, int, int, Place | None, Locator | None]  # digest, kind, bytes, where it is, whose place that is

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
        self.brought = _nothing
        """Called when a profile has come."""
        self.streams: dict[str, Stream] = {}
        self._streaming: set[int] = set()
        self.windows = Windows(cache)
        self._open: OrderedDict[int, int | ChunkedFile] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    def content(self, node: int) -> Content:
        """What a file holds.  Raises OSError."""
        raise NotImplementedError

    def node_of(self, digest: bytes, kind: int) -> int | None:
        """A file that holds an object."""
        raise NotImplementedError

    def look_for_streams(self) -> None:
        """Begin to bring the profiles that are asked for: state/prefetch/N holds the name of a file of the store."""
        directory = os.path.join(self.state, PREFETCH)
        for name in sorted(os.listdir(directory)):
            if name in self.streams or name.startswith("tmp."):
                continue
            file = atomic.read_file(os.path.join(directory, name), 4096).decode()
            stream = self.streams[name] = Stream(self.cache, file, self._large)
            threading.Thread(target=self._bring, args=(stream,), daemon=True).start()

    def _bring(self, stream: Stream) -> None:
        self._streaming.add(threading.get_ident())
        if stream.run():
            self.brought()

    def _large(self, digest: bytes, is_wanted: bool) -> ChunkedFile | None:
        """The open large file of a chunk list, for a stream; or the end of that."""
        node = self.node_of(digest, CHUNK_LIST)
        if node is None:
            return None
        if not is_wanted:
            self._let_go(node)
            return None
        found = self._opened(node)
        return found if not isinstance(found, int) else None

    def read_ready(self, node: int, offset: int, size: int) -> Buffer | None:
        """What is at hand: of a file that is open here."""
        if self.recorder:
            digest, kind, _, _, _ = self.content(node)
            self.recorder.saw(digest, kind, offset, size)
        with self._lock:
            found = self._open.get(node)
            if found is None:
                return None
            self._open.move_to_end(node)
            self._users[node] = self._users.get(node, 0) + 1
        try:
            return os.pread(found, size, offset) if isinstance(found, int) else found.read_ready(offset, size)
        finally:
            self._let_go(node)

    def read(self, node: int, offset: int, size: int) -> Buffer:
        """May wait for the store."""
        try:
            found = self._opened(node)
            try:
                if isinstance(found, int):
                    return os.pread(found, size, offset)
                for chunk in found.chunks_at(offset, size):
                    self._await(chunk)
                return found.read(offset, size)
            finally:
                self._let_go(node)
        except CafsError as error:
            _log.error("reading %s: %s", self.describe(node), error)
            raise OSError(errno.EIO, str(error)) from error

    def describe(self, node: int) -> str:
        """An object's name, for the log."""
        try:
            digest, kind, _, _, _ = self.content(node)
        except OSError:
            return super().describe(node)
        return f"object {object_name(digest, kind)} of store {self.cache.store.root}"

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

    def _opened(self, node: int) -> int | ChunkedFile:
        """The open file of a node, which the caller lets go."""
        with self._lock:
            if node in self._open:
                self._users[node] = self._users.get(node, 0) + 1
                return self._open[node]
        made = self._patiently(node)  # without the lock: it may wait for the store
        with self._lock:
            found = self._open.setdefault(node, made)
            self._users[node] = self._users.get(node, 0) + 1
            closing = [self._open.pop(one) for one in self._too_many()]
        for one in [*closing, *([made] if made is not found else [])]:
            os.close(one) if isinstance(one, int) else one.close()
        return found

    def _too_many(self) -> list[int]:
        """What was used longest ago of the files that nobody reads: over _OPEN_MAX in all, or _LARGE_MAX large ones."""
        idle = [one for one in self._open if not self._users.get(one)]
        large = [one for one in idle if not isinstance(self._open[one], int)]
        return list({*idle[: max(len(self._open) - _OPEN_MAX, 0)], *large[: max(len(large) - _LARGE_MAX, 0)]})

    def _let_go(self, node: int) -> None:
        with self._lock:
            self._users[node] -= 1
            if not self._users[node]:
                del self._users[node]

    def _patiently(self, node: int) -> int | ChunkedFile:
        """A store that is away may come back: try until the limit.  What is damaged, or not in a store that is there, fails."""
        deadline = time.monotonic() + self.cache.limit_s
        while True:
            try:
                return self._make(node)
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
        for stream in list(self.streams.values()):
            stream.wait(digest)

    def _is_there(self) -> bool:
        try:
            return self.cache.store.backend.exists(FORMAT_FILE)
        except (CafsError, OSError):
            return False

    def _make(self, node: int) -> int | ChunkedFile:
        digest, kind, size, place, where = self.content(node)
        if not self.cache.is_there(digest, kind):
            self._await(digest)
        if kind == CHUNK_LIST:
            file = ChunkedFile(self.cache, digest, place, where)
            if file.listed.size != size:
                file.close()
                raise CafsError("chunk list is not of the size that the index says")
            return file
        if place and where and not self.cache.is_there(digest, PLAIN):
            self.windows.bring(where, digest, place)
        fd = self.cache.open(digest, PLAIN, place)
        if os.fstat(fd).st_size != size:
            os.close(fd)
            raise CafsError("object is not of the size that the index says")
        return fd


def _nothing() -> None:
    pass
