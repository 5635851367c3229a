"""Bringing all of an image into the cache: `cafs-store pull IMAGE`, and behind a mount `--prefetch all`."""

from __future__ import annotations

import threading
import time

from cafs import kept, paths, quota
from cafs.bulk import read_objects
from cafs.cache import Cache
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, UnsupportedError, os_error, quote
from cafs.locator import locate
from cafs.ordered import ordered_map
from cafs.partial import ChunkedFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cafs.locator import Locator

    Key = tuple[bytes, int]

_THREADS = 4


class Throttle:
    """Lets through so many bytes a second on average; 0 for as many as come.  Thread-safe."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free = time.monotonic()
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """SIZE bytes have come: wait until the next may."""
        if not self._rate:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            wait_s = self._free - time.monotonic()
        time.sleep(max(wait_s, 0))


def complete(
    cache: Cache,
    keys: Iterable[Key],
    locators: list[Locator],
    *,
    rate: int = 0,
    large: Callable[[bytes], ChunkedFile] | None = None,
    let_go: Callable[[bytes], None] = lambda digest: None,
) -> None:
    """Bring the objects that the cache does not have; large files chunk by chunk.  Raises CafsError.

    rate: bytes a second, 0: no limit.  large, let_go: give and take the open file of a chunk list, where others read it.
    """
    throttle = Throttle(rate)
    wanted = dict.fromkeys(keys)
    small = [key for key in wanted if key[1] == PLAIN and not cache.is_there(*key)]

    def find(key: Key) -> tuple[str, int, int] | None:
        return next((place for one in locators if (place := one.place(*key))), None)

    for key, data in read_objects(cache.store, small, find if locators else None, at_once=1 if rate else _THREADS):
        if isinstance(data, CafsError):
            raise data
        if not cache.is_there(*key):
            cache.keep(*key, data)
        throttle.take(data.nbytes)

    def grow(digest: bytes) -> None:
        place, where = locate(locators, digest, CHUNK_LIST)
        file = large(digest) if large else ChunkedFile(cache, digest, place, where)
        try:
            file.locator = file.locator or where
            step = file.listed.chunk_size
            for at in [at for at in range(0, file.listed.size, step) if file.chunks_at(at, 1)]:
                file.read(at, 1)
                throttle.take(min(step, file.listed.size - at))
        finally:
            let_go(digest) if large else file.close()

    lists = (digest for digest, kind in wanted if kind == CHUNK_LIST and not cache.is_there(digest, CHUNK_LIST))
    for _ in ordered_map(grow, lists, 1 if rate else _THREADS, window=2 * _THREADS):
        pass


def pull(address: str, name: str, rate: int) -> None:
    """Have the cache hold all of an image, and what mounts of it need, for use without the store.  Raises CafsError."""
    from cafs import treemount

    found, locators = _known(address, name)
    store, image = found.store, found.image
    treemount.keep(store, image, address)
    cache = Cache(paths.cache(), store)
    try:
        for layer, metadata in zip(image.layers, image.metadata, strict=True):
            kept.get_metadata(store, layer, metadata)
    except UnsupportedError:
        pass  # what only the fuse engine can mount
    except OSError as error:
        raise os_error(f"cannot write to cache {quote(cache.root)}", error) from error
    quota.note_use(cache.root, image.digest, _objects(locators))
    complete(cache, _objects(locators), locators, rate=rate)


def pin(address: str, name: str) -> None:
    """Let what the cache has of an image stay there.  Raises CafsError."""
    found, locators = _known(address, name)
    try:
        quota.pin(paths.cache(), found.image.digest, _objects(locators))
    except OSError as error:
        raise os_error("cannot pin the image", error) from error


def _known(address: str, name: str) -> tuple[kept.Found, list[Locator]]:
    """An image, and the locators of its layers."""
    found = kept.find(address, name)
    try:
        return found, [kept.get_locator(found.store, layer) for layer in found.image.layers]
    except OSError as error:
        raise os_error(f"cannot write to cache {quote(paths.cache())}", error) from error


def _objects(locators: list[Locator]) -> Iterator[Key]:
    return (key for one in locators for key in one.objects())
