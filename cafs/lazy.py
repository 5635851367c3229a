"""LAZY: the flat file system of objects under a kernel mount, which fetches what the cache does not have.

/.cafs-objects/ab/cdef…, read-only, for overlayfs' data-only layers.  Which objects there are, and how large they are, say the
locators of the layers that are mounted: state/locators/N, numbered from 1, never changed.  A node is a locator's number and a
record's number in it, so nothing has to be remembered from one server to the next.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
import time
from collections import OrderedDict

from cafs import atomic, fusedev, locator
from cafs.digest import CHUNK_LIST, CHUNK_LIST_SUFFIX, DIGEST_SIZES, PLAIN, object_name
from cafs.erofs import OBJECTS
from cafs.errors import CafsError, CorruptError, FormatError, NotFound
from cafs.lazyd import IMAGES, LOCATORS, PREFETCH
from cafs.locator import Locator
from cafs.partial import ChunkedFile
from cafs.store import FORMAT_FILE
from cafs.stream import Stream
from cafs.window import Windows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from cafs.cache import Cache
    from cafs.record import Recorder

_OBJECTS_NODE = 2
_SHARD_NODE = 256
_LOCATOR_BITS = 32
_OPEN_MAX = 256
_PAUSE_S = 0.5
_DIRECTORY = stat.S_IFDIR | 0o755
_log = logging.getLogger(__name__)


class Lazy:
    """The answers.  state: directory of the locators.  noticed: called when there are new ones.  Thread-safe.

    recorder: is told of every read.
    """

    def __init__(
        self, state: str, cache: Cache, recorder: Recorder | None = None, noticed: Callable[[], None] = lambda: None
    ) -> None:
        self.state = state
        self.cache = cache
        self.recorder = recorder
        self.noticed = noticed
        self.brought: Callable[[], None] = lambda: None
        """Called when a profile has come."""
        self.streams: dict[str, Stream] = {}
        self._streaming: set[int] = set()
        self.windows = Windows(cache)
        self.locators: dict[int, Locator] = {}
        self._open: OrderedDict[int, int | ChunkedFile] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()
        self.look()

    def images(self) -> set[str]:
        """Digests of the images that are mounted."""
        return {name for name in os.listdir(os.path.join(self.state, IMAGES)) if re.fullmatch("(?:[0-9a-f]{2})+", name)}

    def look(self) -> bool:
        """Open the locators that are new; whether there are any."""
        found = False
        directory = os.path.join(self.state, LOCATORS)
        for name in sorted(os.listdir(directory)):
            number = int(name) if re.fullmatch("[1-9][0-9]{0,8}", name) else 0
            if not number or number in self.locators:
                continue
            try:
                found_locator = locator.load(os.path.join(directory, name))
            except (OSError, FormatError) as error:
                _log.error("cannot use locator %s: %s", name, error)
                continue
            if found_locator.hash_name == self.cache.store.hash_name:
                self.locators[number] = found_locator
                found = True
        self.noticed()
        self._look_for_streams()
        return found

    def _look_for_streams(self) -> None:
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
        node = self._find(object_name(digest, CHUNK_LIST).encode())
        if node is None:
            return None
        if not is_wanted:
            self._let_go(node)
            return None
        found = self._opened(node)
        return found if not isinstance(found, int) else None

    # --- what the protocol asks ----------------------------------------------------------------------------------

    def lookup(self, node: int, name: bytes) -> bytes:
        """Directories are there whether there is anything in them or not; names of files that are not there are not kept."""
        if node == fusedev.ROOT and name == OBJECTS:
            return fusedev.entry_out(_OBJECTS_NODE, self.getattr(_OBJECTS_NODE))
        if node == _OBJECTS_NODE and re.fullmatch(rb"[0-9a-f]{2}", name):
            shard = _SHARD_NODE + int(name, 16)
            return fusedev.entry_out(shard, self.getattr(shard))
        if _SHARD_NODE <= node < 2 * _SHARD_NODE:
            found = self._find(b"%02x%s" % (node - _SHARD_NODE, name))
            if found is not None:
                return fusedev.entry_out(found, self.getattr(found))
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def getattr(self, node: int) -> bytes:
        if node < 2 * _SHARD_NODE:
            return fusedev.attr(node, _DIRECTORY, 0, 2)
        _, _, size, _ = self._locator(node).record(node & 0xFFFF_FFFF)
        return fusedev.attr(node, stat.S_IFREG | 0o444, size)

    def read_ready(self, node: int, offset: int, size: int) -> Buffer | None:
        """What is at hand: of a file that is open here."""
        if self.recorder:
            digest, kind, _, _ = self._locator(node).record(node & 0xFFFF_FFFF)
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
            digest, kind, _, _ = self._locator(node).record(node & 0xFFFF_FFFF)
        except OSError:
            return f"node {node}"
        return f"object {object_name(digest, kind)} of store {self.cache.store.root}"

    def statfs(self) -> bytes:
        return fusedev.statfs_out()

    def save(self) -> None:
        """Save what is known of large files; reads go on."""
        with self._lock:
            found = list(self._open.values())
        for one in found:
            if isinstance(one, ChunkedFile):
                one.save()

    # --- objects -------------------------------------------------------------------------------------------------

    def _find(self, name: bytes) -> int | None:
        """The node of an object, in the first locator that has it; looks for new ones if none has."""
        text = name.decode("latin-1")
        kind = CHUNK_LIST if text.endswith(CHUNK_LIST_SUFFIX) else PLAIN
        text = text.removesuffix(CHUNK_LIST_SUFFIX)
        if not re.fullmatch("[0-9a-f]{%d}" % (2 * DIGEST_SIZES[self.cache.store.hash_name]), text):
            return None
        for again in (False, True):
            if again and not self.look():
                break
            for number, one in list(self.locators.items()):
                record = one.find(bytes.fromhex(text), kind)
                if record is not None:
                    return number << _LOCATOR_BITS | record
        return None

    def _locator(self, node: int) -> Locator:
        number = node >> _LOCATOR_BITS
        if number not in self.locators:
            self.look()
        if number not in self.locators or node & 0xFFFF_FFFF >= len(self.locators[number]):
            raise OSError(errno.ESTALE, "no such node")
        return self.locators[number]

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
            idle = [one for one in self._open if not self._users.get(one)]
            closing = [self._open.pop(one) for one in idle[: max(len(self._open) - _OPEN_MAX, 0)]]
        for one in [*closing, *([made] if made is not found else [])]:
            os.close(one) if isinstance(one, int) else one.close()
        return found

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
        where = self._locator(node)
        digest, kind, size, place = where.record(node & 0xFFFF_FFFF)
        if not self.cache.is_there(digest, kind):
            self._await(digest)
        if kind == CHUNK_LIST:
            file = ChunkedFile(self.cache, digest, place, where)
            if file.listed.size != size:
                file.close()
                raise CafsError("chunk list is not of the size that the index says")
            return file
        if place and not self.cache.is_there(digest, PLAIN):
            self.windows.bring(where, digest, place)
        fd = self.cache.open(digest, PLAIN, place)
        if os.fstat(fd).st_size != size:
            os.close(fd)
            raise CafsError("object is not of the size that the index says")
        return fd
