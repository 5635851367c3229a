"""The cache's size and use: what was used longest ago goes first, by image; counters of hits and misses.  cafs-store(5), CACHE.

An object is as old as the last mount of any image that lists it, which a file an image records.  Access times are not used:
reads through an overlay leave them alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass

from cafs import atomic
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


@dataclass(slots=True)
class Stats:
    """hits: opens of content that the cache had; misses: fetches; in bytes what that saved and cost."""

    hits: int = 0
    misses: int = 0
    bytes_saved: int = 0
    bytes_fetched: int = 0


@dataclass(frozen=True, slots=True)
class Trimmed:
    """files, bytes: that went; left: bytes that the cache still holds."""

    files: int
    bytes: int
    left: int


def quota(root: str) -> int:
    """Bytes that the cache may hold: CAFS_CACHE_QUOTA (a number, K, M, G or T), else half of its file system."""
    text = os.environ.get("CAFS_CACHE_QUOTA", "")
    if not text:
        return shutil.disk_usage(root).total // 2
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text)
    if not match:
        raise UsageError(f"CAFS_CACHE_QUOTA is {quote(text)}, which is no size", hint="like 20G")
    return int(match[1]) * _UNITS[match[2]]


def note_use(root: str, image: bytes, objects: Iterable[tuple[bytes, int]]) -> None:
    """An image is used now.  objects: (digest, kind) of what it lists.  A failure makes it look older, no more."""
    path = os.path.join(root, "used", image.hex())
    try:
        os.utime(path)
    except OSError:
        data = b"".join(bytes([kind]) + digest for digest, kind in objects)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            atomic.replace_file(path, _MAGIC + bytes([len(image)]) + data, 0o600)
        except OSError:
            pass


def size(root: str) -> int:
    """Bytes on disk of all objects, whole and partial."""
    return sum(blocks for _, _, blocks in _files(root))


def trim(root: str, limit: int) -> Trimmed:
    """Bring the cache under LOW of LIMIT if it is over LIMIT.  What is open stays.  One process at a time does."""
    lock = os.open(os.path.join(root, "trim.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _trim(root, limit)
    except BlockingIOError:
        return Trimmed(0, 0, 0)
    finally:
        os.close(lock)


def _trim(root: str, limit: int) -> Trimmed:
    files = list(_files(root))
    left = sum(blocks for _, _, blocks in files)
    gone = freed = 0
    if left > limit:
        ages = _ages(root)
        for _, path, blocks in sorted(files, key=lambda file: (ages.get(file[0], -1), file[0])):
            if left <= LOW * limit:
                break
            if not _is_open(path):
                atomic.unlink_quietly(path)
                atomic.unlink_quietly(path + ".map")
                gone, freed, left = gone + 1, freed + blocks, left - blocks
    return Trimmed(gone, freed, left)


def _files(root: str) -> Iterator[tuple[str, str, int]]:
    """(object name, path, bytes on disk)."""
    objects = os.path.join(root, ".cafs-objects")
    for shard in _listed(objects):
        for name in _listed(os.path.join(objects, shard)):
            path = os.path.join(objects, shard, name)
            if not name.startswith("tmp."):
                yield shard + name, path, _blocks(path)
    for name in _listed(os.path.join(root, "partial")):
        path = os.path.join(root, "partial", name)
        if not name.endswith(".map") and not name.startswith("tmp."):
            yield name, path, _blocks(path)


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _blocks(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def _ages(root: str) -> dict[str, int]:
    """Object name -> rank of the last use, the oldest first; a damaged record says nothing."""
    used = os.path.join(root, "used")
    records = []
    for name in _listed(used):
        try:
            records.append((os.stat(os.path.join(used, name)).st_mtime_ns, name))
        except OSError:
            continue
    found: dict[str, int] = {}
    for rank, (_, name) in enumerate(sorted(records)):
        try:
            data = atomic.read_file(os.path.join(used, name), _RECORD_MAX)
        except OSError:
            continue
        width = 1 + (data[len(_MAGIC)] if data.startswith(_MAGIC) and len(data) > len(_MAGIC) else 0)
        body = data[len(_MAGIC) + 1 :]
        if width > 1 and not len(body) % width:
            for at in range(0, len(body), width):
                found[object_name(body[at + 1 : at + width], body[at])] = rank
    return found


def _is_open(path: str) -> bool:
    """Whether anybody has the file open: then no lease on it can be had (fcntl(2), F_SETLEASE)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
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
            atomic.replace_file(os.path.join(root, "stats"), json.dumps(asdict(Stats(**total))).encode(), 0o600)
        finally:
            os.close(lock)
    except OSError:
        pass
