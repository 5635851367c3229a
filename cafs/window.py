"""Fetching neighbours: a miss brings what lies near it in its pack, for what is read together lies together.

One ranged read for each block of a pack, however many ask; what was asked for is put into the cache first, the rest behind.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from cafs.bulk import check_frames
from cafs.digest import PLAIN
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.cache import Cache
    from cafs.locator import Locator

    Block = tuple[str, int]
    Frame = tuple[bytes, int, int]  # digest, offset, size of the frame
    Fetched = tuple[list[Frame], bytes]

SIZE = 1 << 21
"""Length of a block: what a line of 1 Gbit/s brings in 15 ms, so that a request and its bytes cost about the same.

The start of scikit-learn in a Debian tree took 756 requests without blocks; 62 and 63 MB with 1 MiB, 42 and 78 MB with this, 30
and 99 MB with 4 MiB.
"""

_GAP = 128 << 10
_BLOCK = 9
"""Beside the kinds of objects, for the locks of those who fetch."""

_log = logging.getLogger(__name__)


class Windows:
    """The blocks that are being fetched.  Thread-safe."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._flying: dict[Block, Future[Fetched]] = {}
        self._lock = threading.Lock()
        self._behind = ThreadPoolExecutor(2)

    def bring(self, locator: Locator, digest: bytes, place: tuple[str, int, int]) -> None:
        """Fetch an object's block.  Afterwards the object is in the cache, or has to be fetched by itself."""
        block = place[0], place[1] // SIZE
        with self._lock:
            future = self._flying.get(block)
            is_mine = future is None
            if future is None:
                future = self._flying[block] = Future()
        if is_mine:
            self._bring_first(locator, digest, place, block, future)
            return
        try:
            self._put_first(digest, future.result(self._cache.limit_s))
        except (CafsError, OSError, TimeoutError):
            pass

    def _bring_first(
        self, locator: Locator, digest: bytes, place: tuple[str, int, int], block: Block, future: Future[Fetched]
    ) -> None:
        """For all who ask for the block, also in other processes, which find it here when they have the lock."""
        try:
            with self._cache.single_flight((hashlib.sha256(f"{place[0]} {block[1]}".encode()).digest(), _BLOCK)):
                is_here = self._cache.is_there(digest, PLAIN)
                future.set_result(([], b"") if is_here else self._fetch(locator, place))
                self._put_first(digest, future.result())
        except (CafsError, OSError):
            if not future.done():
                future.set_result(([], b""))
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            raise
        finally:
            self._behind.submit(self._finish, block, future, digest)

    def _put_first(self, digest: bytes, fetched: Fetched) -> None:
        """Put what was asked for, unless it is here."""
        frames, data = fetched
        self._put([frame for frame in frames if frame[0] == digest and not self._is_here(frame)], frames, data)

    def _finish(self, block: Block, future: Future[Fetched], first: bytes) -> None:
        """Put the rest of a block, and forget it."""
        try:
            frames, data = future.result()
            self._put([frame for frame in frames if frame[0] != first and not self._is_here(frame)], frames, data)
        except (CafsError, OSError) as error:
            _log.warning("cannot keep what was fetched: %s", error)
        finally:
            with self._lock:
                del self._flying[block]

    def _fetch(self, locator: Locator, place: tuple[str, int, int]) -> Fetched:
        """The frames of a block that are near one another, around the one at PLACE, and the bytes of them all."""
        block = locator.block(place[0], place[1] // SIZE * SIZE, SIZE)
        frames = [frame for frame in block if frame[1] == place[1] or not self._is_here(frame)]
        at = next((number for number, frame in enumerate(frames) if frame[1] == place[1]), -1)
        if at < 0:
            return [], b""  # the locator contradicts itself
        first = last = at
        while first and frames[first][1] - (frames[first - 1][1] + frames[first - 1][2]) <= _GAP:
            first -= 1
        while last + 1 < len(frames) and frames[last + 1][1] - (frames[last][1] + frames[last][2]) <= _GAP:
            last += 1
        frames = frames[first : last + 1]
        start, end = frames[0][1], frames[-1][1] + frames[-1][2]
        return frames, self._cache.store.backend.read_range(f"packs/{place[0]}", start, end - start)

    def _is_here(self, frame: Frame) -> bool:
        return self._cache.is_there(frame[0], PLAIN)

    def _put(self, wanted: list[Frame], frames: list[Frame], data: bytes) -> None:
        """Into the cache, each after it was verified; what is damaged is left out: whoever needs it will ask again."""
        view, start = memoryview(data), frames[0][1] if frames else 0
        pieces = (((digest, PLAIN), view[offset - start : offset - start + size]) for digest, offset, size in wanted)
        for key, one in check_frames(self._cache.store, pieces):
            if one is not None:
                self._cache.keep(*key, one)
