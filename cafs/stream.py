"""Bringing a hot pack into the cache: one sequential read, ahead of the workload that it was recorded from.

A miss that the stream is about to bring waits for it, unless it is far ahead: then it is fetched at once.
"""

from __future__ import annotations

import logging
import threading

from cafs import pack, profile
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, CorruptError
from cafs.ordered import ordered_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cafs.cache import Cache
    from cafs.partial import ChunkedFile

    Key = tuple[bytes, int]
    Frame = tuple[bytes, int, int, int]  # name of the object, kind, offset, size of the frame

WINDOW = 1 << 20
_GAP = 128 << 10
_AT_ONCE = 4
_LIST_WAIT_S = 1.0
_AHEAD = 2 * WINDOW
_log = logging.getLogger(__name__)


class Stream:
    """One hot pack on its way into a cache.  files: where it may be in the store, as profile.chosen says.

    large, let_go: give and take the open file of a chunk list.  ended: set when no more will come.
    """

    def __init__(
        self, cache: Cache, files: list[str], large: Callable[[bytes], ChunkedFile], let_go: Callable[[bytes], None]
    ) -> None:
        self._cache = cache
        self._large = large
        self._let_go = let_go
        self.ended = threading.Event()
        self._files_asked = files
        self._file = files[0]
        self._waiting: dict[bytes, int] = {}  # name of an object -> offset
        self._position = 0
        self._is_known = False
        self._arrived = threading.Condition()
        self._files: dict[bytes, tuple[ChunkedFile, int]] = {}  # chunk -> where it belongs
        self._open: list[bytes] = []

    def run(self) -> bool:
        """Bring all of it; whether there was any.  What goes wrong is a line in the log; whoever waits goes on by himself."""
        try:
            frames = self._missing(self._frames())
            with self._arrived:
                self._waiting, self._is_known = {name: offset for name, _, offset, _ in frames}, True
                self._arrived.notify_all()
            for window, data in ordered_map(self._fetch, _windows(frames), _AT_ONCE, window=2 * _AT_ONCE):
                self._take(window, data)
        except FileNotFoundError:
            pass  # most images have none
        except (CafsError, OSError) as error:
            _log.warning("cannot bring profile %s: %s", self._file, error)
        finally:
            with self._arrived:
                self._waiting, self._is_known = {}, True
                self._arrived.notify_all()
            for digest in self._open:
                self._let_go(digest)
            self.ended.set()
        return self._position > 0

    def wait(self, digest: bytes) -> None:
        """Wait for an object, or a chunk, that is about to come, and at first for the list of what will."""
        name = self._cache.store.name_of(digest)

        def is_over() -> bool:
            return self._waiting.get(name, 1 << 62) - self._position > _AHEAD

        with self._arrived:
            if self._arrived.wait_for(lambda: self._is_known, _LIST_WAIT_S):
                self._arrived.wait_for(is_over, self._cache.limit_s / 2)

    def _frames(self) -> list[Frame]:
        """What is in the pack, in its order."""
        self._file, records = profile.find(self._cache.store, self._files_asked)
        return sorted((row[:4] for row in records.rows()), key=lambda row: row[2])

    def _missing(self, frames: list[Frame]) -> list[Frame]:
        """Those that the cache does not have, as far as names tell: in a scope they do not."""
        if self._cache.store.scope:
            return frames
        whole = [name for name, kind, _, _ in frames if kind == CHUNK_LIST and self._cache.is_there(name, CHUNK_LIST)]
        here = {chunk for name in whole for chunk in self._cache.kept_chunks(name)} | set(whole)
        return [frame for frame in frames if frame[0] not in here and not self._cache.is_there(frame[0], frame[1])]

    def _fetch(self, window: list[Frame]) -> tuple[list[Frame], bytes]:
        start, end = window[0][2], window[-1][2] + window[-1][3]
        return window, self._cache.store.backend.read_range(self._file, start, end - start)

    def _take(self, window: list[Frame], data: bytes) -> None:
        """Put a window into the cache, each object after it was verified."""
        store, view, start = self._cache.store, memoryview(data), window[0][2]
        pieces = (view[offset - start : offset - start + size] for _, _, offset, size in window)
        for (name, kind, offset, _), one in zip(window, pack.decode_frames(pieces), strict=True):
            if not isinstance(one, CorruptError) and one[1] == kind:
                digest = store.hash(one[0])
                if store.name_of(digest) == name:
                    self._keep(digest, kind, one[0])
            with self._arrived:
                self._waiting.pop(name, None)
                self._position = offset
                self._arrived.notify_all()

    def _keep(self, digest: bytes, kind: int, data: memoryview) -> None:
        if kind == CHUNK_LIST:
            self._cache.keep_list(digest, bytes(data))
            file = self._large(digest)
            self._open.append(digest)
            at = 0
            for count, chunk in file.listed.runs:
                if chunk:
                    self._files.setdefault(chunk, (file, at))
                at += count
        elif digest in self._files:
            file, number = self._files[digest]
            file.keep(number, data)
        elif not self._cache.is_there(digest, PLAIN):
            self._cache.keep(digest, PLAIN, data)


def _windows(frames: list[Frame]) -> Iterator[list[Frame]]:
    """Groups of frames of about WINDOW bytes."""
    window: list[Frame] = []
    for frame in frames:
        end = window[-1][2] + window[-1][3] if window else 0
        if window and (frame[2] + frame[3] - window[0][2] > WINDOW or frame[2] - end > _GAP):
            yield window
            window = []
        window.append(frame)
    if window:
        yield window
