"""The cache's size and use: what was used longest ago goes first, by image; counters of hits and misses.  cafs-store(5), CACHE.

An object is as old as the last mount of any image that lists it, which a file an image records.  Access times are not used:
reads through an overlay leave them alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from contextlib import contextmanager

from cafs import atomic, paths
from cafs.digest import object_name
from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LOW = 0.8
"""A cache over its quota is brought down to this share of it."""

_MAGIC = b"CAFSUSE1"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RECORD_MAX = 1 << 31
_PINNED = "pinned"
_LEFT_AFTER_S = 3600
_F_SETSIG = 10
_DERIVED = ("columns", "indexes", "layerblobs", "locators", "meta", "metadata", "refs", "stores", "used")
_UNUSED_AFTER_S = 90 * 86400


class Stats:
    """hits: opens of content that the cache had; misses: fetches; in bytes what that saved and cost."""

    __slots__ = ("bytes_fetched", "bytes_saved", "hits", "misses")

    def __init__(self, hits: int = 0, misses: int = 0, bytes_saved: int = 0, bytes_fetched: int = 0) -> None:
        self.hits = hits
        self.misses = misses
        self.bytes_saved = bytes_saved
        self.bytes_fetched = bytes_fetched

    def as_dict(self) -> dict[str, int]:
        """By name, in alphabetical order."""
        return {name: getattr(self, name) for name in self.__slots__}


class Trimmed:
    """files, bytes: that went; left: bytes that the cache still holds."""

    __slots__ = ("bytes", "files", "left")

    def __init__(self, files: int, size: int, left: int) -> None:
        self.files = files
        self.bytes = size
        self.left = left


def quota(root: str) -> int:
    """Bytes that the cache may hold: CAFS_CACHE_QUOTA (a number, K, M, G or T), else half of its file system."""
    text = os.environ.get("CAFS_CACHE_QUOTA", "")
    if not text:
        disk = os.statvfs(root)
        return disk.f_blocks * disk.f_frsize // 2
    found = parse_size(text)
    if found is None:
        raise UsageError(f"CAFS_CACHE_QUOTA is {quote(text)}, which is no size", hint="like 20G")
    return found


def parse_size(text: str) -> int | None:
    """Bytes: a number, or one with K, M, G or T behind it, large or small as docker has them; None if it is neither."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGTkmgt]?)", text)
    return int(match[1]) * _UNITS[match[2].upper()] if match else None


def note_use(root: str, image: bytes, objects: Iterable[tuple[bytes, int]]) -> None:
    """An image is used now.  objects: (digest, kind) of what it lists.  A failure makes it look older, no more."""
    path = os.path.join(root, "used", image.hex())
    try:
        os.utime(path)
    except OSError:
        kinds = [bytes([kind]) for kind in range(256)]
        data = b"".join([kinds[kind] + digest for digest, kind in objects])
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            atomic.replace_hint(path, _MAGIC + bytes([len(image)]) + data, 0o600)
        except OSError:
            pass


def still_used(root: str, images: Iterable[str]) -> None:
    """Images, by their digests in hex, that have been mounted for long are as if mounted now."""
    for image in images:
        try:
            os.utime(os.path.join(root, "used", image))
        except OSError:
            continue


def size(root: str) -> int:
    """Bytes on disk of all objects, whole and partial."""
    return sum(blocks for _, _, blocks in _files(root))


def trim(root: str, limit: int) -> Trimmed:
    """Bring the cache under LOW of LIMIT if it is over LIMIT.  What is open or pinned stays.  One process at a time does."""
    try:
        with _lock(root, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove_leftovers(root)
            files = list(_files(root))
            total = sum(blocks for _, _, blocks in files)
            return _remove_oldest(root, files, total - LOW * limit if total > limit else 0)
    except BlockingIOError:
        return Trimmed(0, 0, 0)


def evict(root: str, need: int) -> Trimmed:
    """Free NEED bytes, whatever the quota: the disk is full.  What is open or pinned stays."""
    with _lock(root, fcntl.LOCK_EX):
        _remove_leftovers(root)
        return _remove_oldest(root, list(_files(root)), need)


@contextmanager
def _lock(root: str, how: int) -> Iterator[None]:
    lock = os.open(paths.data(root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # a file of its own might find no room
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)


def _remove_oldest(root: str, files: list[tuple[str, str, int]], need: float) -> Trimmed:
    left = sum(blocks for _, _, blocks in files)
    gone = freed = 0
    if need > 0:
        ages, kept = _ages(root), _pinned_names(root)
        for name, path, blocks in sorted(files, key=lambda file: (ages.get(file[0], -1), file[0])):
            if freed >= need:
                break
            if name not in kept and not _is_open(path):
                atomic.unlink_quietly(path)
                atomic.unlink_quietly(path + ".map")
                gone, freed, left = gone + 1, freed + blocks, left - blocks
    return Trimmed(gone, freed, left)


def _remove_leftovers(root: str) -> None:
    """Files that processes were writing when they were killed, and what was derived for images not used for a long time."""
    objects = paths.objects(root)
    for directory in () if pinned(root) else _DERIVED:  # which of it pinned images need is not known here
        for name in paths.listed(os.path.join(root, directory)):
            _remove_if_older(os.path.join(root, directory, name), _UNUSED_AFTER_S)
    for directory in [os.path.join(root, "partial"), *(os.path.join(objects, shard) for shard in paths.listed(objects))]:
        for name in paths.listed(directory):
            if name.startswith("tmp."):
                _remove_if_older(os.path.join(directory, name), _LEFT_AFTER_S)


def _remove_if_older(path: str, age_s: float) -> None:
    try:
        if time.time() - os.lstat(path).st_mtime > age_s:
            os.unlink(path)
    except OSError:
        pass


def pin(root: str, image: bytes, objects: Iterable[tuple[bytes, int]]) -> None:
    """Let an image stay in the cache, whatever the quota.  objects: as for `note_use`.  Raises OSError."""
    note_use(root, image, objects)
    os.makedirs(os.path.join(root, _PINNED), mode=0o700, exist_ok=True)
    with open(os.path.join(root, _PINNED, image.hex()), "wb"):
        pass


def unpin(root: str, image: bytes) -> bool:
    """Let it be as any other; whether it was pinned."""
    try:
        os.unlink(os.path.join(root, _PINNED, image.hex()))
        return True
    except FileNotFoundError:
        return False


def pinned(root: str) -> set[str]:
    """Digests of the images that are pinned."""
    return set(paths.listed(os.path.join(root, _PINNED)))


def _pinned_names(root: str) -> set[str]:
    """Names of the objects that pinned images list."""
    return {name for image in pinned(root) for name in _names_in(os.path.join(root, "used", image))}


def _files(root: str) -> Iterator[tuple[str, str, int]]:
    """(object name, path, bytes on disk)."""
    objects = paths.objects(root)
    for shard in paths.listed(objects):
        for name in paths.listed(os.path.join(objects, shard)):
            path = os.path.join(objects, shard, name)
            if not name.startswith("tmp."):
                yield shard + name, path, _blocks(path)
    for name in paths.listed(os.path.join(root, "partial")):
        path = os.path.join(root, "partial", name)
        if not name.endswith(".map") and not name.startswith("tmp."):
            yield name, path, _blocks(path)


def _blocks(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def _ages(root: str) -> dict[str, int]:
    """Object name -> rank of the last use, the oldest first."""
    used = os.path.join(root, "used")
    records = []
    for name in paths.listed(used):
        try:
            records.append((os.stat(os.path.join(used, name)).st_mtime_ns, name))
        except OSError:
            continue
    found: dict[str, int] = {}
    for rank, (_, name) in enumerate(sorted(records)):
        found.update(dict.fromkeys(_names_in(os.path.join(used, name)), rank))
    return found


def _names_in(path: str) -> Iterator[str]:
    """Names of the objects in a record of used/; a damaged one says nothing."""
    try:
        data = atomic.read_file(path, _RECORD_MAX)
    except OSError:
        return
    width = 1 + (data[len(_MAGIC)] if data.startswith(_MAGIC) and len(data) > len(_MAGIC) else 0)
    body = data[len(_MAGIC) + 1 :]
    if width > 1 and not len(body) % width:
        for at in range(0, len(body), width):
            yield object_name(body[at + 1 : at + width], body[at])


def _is_open(path: str) -> bool:
    """Whether anybody has the file open: then no lease on it can be had (fcntl(2), F_SETLEASE)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)  # who opens it meanwhile has us told, and SIGIO would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no leases on this file system
    finally:
        os.close(fd)
    return False


def read_stats(root: str) -> Stats:
    """The counters of all processes so far."""
    try:
        found = json.loads(atomic.read_file(os.path.join(root, "stats"), 4096))
        return Stats(**{name: int(found[name]) for name in Stats.__slots__})
    except (OSError, ValueError, KeyError, TypeError):
        return Stats()


def add_stats(root: str, more: Stats) -> None:
    """Add a process's counters; they are lost if that cannot be done."""
    try:
        lock = os.open(os.path.join(root, "stats.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = read_stats(root)
            total = {name: getattr(before, name) + getattr(more, name) for name in Stats.__slots__}
            atomic.replace_hint(os.path.join(root, "stats"), json.dumps(total).encode(), 0o600)
        finally:
            os.close(lock)
    except OSError:
        pass
