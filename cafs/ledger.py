"""What the cache held when it was last verified: the kernel reads cached objects without asking, so a mount asks before it.

cafs-store(5), CACHE.  One record an object: size, mtime and ctime as they were when its content was verified.  What differs, is
not listed, or may have been lost with the machine is hashed again, and set aside if it is bad.  Rot beneath an
unchanged ctime is not seen.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time

from cafs import atomic, paths
from cafs.digest import CHUNK_LIST, CHUNK_LIST_SUFFIX, PLAIN, hash_function, object_name
from cafs.errors import CafsError
from cafs.lease import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Key = tuple[bytes, int]
    Stamp = tuple[int, int, int]

NAME = "ledger"
SYNCED = "synced"
_RECORD = struct.Struct("<32sB7xqqq")
_LEDGER_MAX = 1 << 32
_PIECE = 1 << 20
_WASTE = 4
_FOREVER = 1 << 63
_SHARD = re.compile("[0-9a-f]{2}")


class Ledger:
    """The ledger of a cache directory."""

    def __init__(self, root: str, hash_name: str, chunk_size: int) -> None:
        self.root = root
        self.hash_name = hash_name
        self.chunk_size = chunk_size
        self._hash = hash_function(hash_name)
        self._fd = -1

    def note(self, key: Key, status: os.stat_result) -> None:
        """An object was verified and has its name now.  A record that cannot be written costs a hash at the next mount."""
        try:
            if self._fd < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.open(os.path.join(self.root, NAME), flags, 0o600)
            os.write(self._fd, _RECORD.pack(key[0], key[1], *_stamp(status)))
            if not os.fstat(self._fd).st_nlink:
                os.close(self._fd)  # it was written anew, or deleted with the rest of the cache
                self._fd = -1
        except OSError:
            pass

    def check(self, is_wanted: Callable[[Key], bool]) -> list[str]:
        """Make sure of the cached objects that are wanted; returns the names of those that were set aside."""
        known = self._load()
        bad = []
        for key, path, status in self.present():
            if known.get(key) == _stamp(status) or not is_wanted(key):
                continue
            if self.verify(key, path):
                self.note(key, status)
            else:
                set_aside(self.root, path)
                bad.append(object_name(*key))
        return bad

    def verify(self, key: Key, path: str) -> bool:
        """Whether a cached object is what its name says."""
        try:
            if key[1] == CHUNK_LIST:
                return self._verify_chunks(key[0], path)
            return self._hash(atomic.read_file(path, 1 << 26)) == key[0]
        except (OSError, CafsError):
            return False

    def _verify_chunks(self, digest: bytes, path: str) -> bool:
        """Also that there are zeros where the list says so: in holes, which are not read, there are."""
        from cafs import chunks

        data = atomic.read_file(os.path.join(self.root, "lists", digest.hex()), chunks.LIST_MAX)
        size = self.chunk_size or int(data.split(b" ", 4)[3])
        listed = chunks.decode(data, self.hash_name, size)
        with open(path, "rb", buffering=0) as file:
            fd = file.fileno()
            if self._hash(data) != digest or os.fstat(fd).st_size != listed.size:
                return False
            at = 0
            for count, chunk in listed.runs:
                end = min((at + count) * size, listed.size)
                if not chunk and not _is_zero(fd, at * size, end):
                    return False
                for number in range(at, at + count if chunk else at):
                    if self._hash(atomic.read_exactly(fd, listed.length_at(number), number * size)) != chunk:
                        return False
                at += count
        return True

    def present(self) -> Iterator[tuple[Key, str, os.stat_result]]:
        """What the cache has, with paths and what lstat(2) says."""
        is_name = re.compile("[0-9a-f]{%d}" % (2 * len(self._hash(b"")) - 2)).match
        suffix = len(CHUNK_LIST_SUFFIX)
        top = paths.objects(self.root)
        for shard in filter(_SHARD.fullmatch, paths.listed(top)):
            with os.scandir(os.path.join(top, shard)) as entries:
                for entry in entries:
                    name, kind = entry.name, PLAIN
                    if name.endswith(CHUNK_LIST_SUFFIX):
                        name, kind = name[:-suffix], CHUNK_LIST
                    found = is_name(name)
                    if not found or found.end() != len(name):
                        continue
                    try:
                        yield (bytes.fromhex(shard + name), kind), entry.path, entry.stat(follow_symlinks=False)
                    except OSError:
                        continue  # it went meanwhile

    def _load(self) -> dict[Key, Stamp]:
        """The latest record of each object; a ledger that is mostly out of date is written anew."""
        path = os.path.join(self.root, NAME)
        try:
            data = atomic.read_file(path, _LEDGER_MAX)
        except OSError:
            return {}
        width = len(self._hash(b""))
        rows = _RECORD.iter_unpack(data[: len(data) - len(data) % _RECORD.size])
        found = {(digest[:width], kind): (size, mtime, ctime) for digest, kind, size, mtime, ctime in rows}
        sure_ns = self._sure_until_ns()
        kept = {key: stamp for key, stamp in found.items() if stamp[2] <= sure_ns}
        is_first = sure_ns < _FOREVER  # in this boot of the machine: what is unsure is forgotten, of all images
        if is_first or len(data) > _RECORD.size * _WASTE * max(len(found), 1024):
            try:
                atomic.replace_file(path, b"".join(_RECORD.pack(*key, *stamp) for key, stamp in kept.items()), 0o600)
                if is_first:
                    sync(self.root)
            except OSError:
                pass
        return kept

    def _sure_until_ns(self) -> int:
        """What changed later may not have reached the disk before the machine went down; all is sure if it has not since."""
        try:
            found = json.loads(atomic.read_file(os.path.join(self.root, SYNCED), 4096))
            return _FOREVER if found["boot_id"] == boot_id() else int(found["time_ns"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _is_zero(fd: int, start: int, end: int) -> bool:
    """Whether a range of a file holds nothing but zeros."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:
            return True  # no data up to the end
        if start < end and any(atomic.read_exactly(fd, min(_PIECE, end - start), start)):
            return False
        start += _PIECE
    return True


def sync(root: str) -> None:
    """Write the cache's file system to disk and note the time: what is older is safe from a crash of the machine."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        now = time.time_ns()
        from cafs import linux

        linux.syncfs(fd)
    finally:
        os.close(fd)
    atomic.replace_file(os.path.join(root, SYNCED), json.dumps({"boot_id": boot_id(), "time_ns": now}).encode(), 0o600)


def set_aside(root: str, path: str) -> None:
    """Move a damaged object into quarantine/, for a person to look at; the name is free for a good copy."""
    aside = os.path.join(root, "quarantine")
    try:
        os.makedirs(aside, mode=0o700, exist_ok=True)
        os.rename(path, os.path.join(aside, f"{os.path.basename(path)}.{os.urandom(4).hex()}"))
    except OSError:
        atomic.unlink_quietly(path)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
