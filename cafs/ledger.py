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
    Present = tuple[Key, str, os.stat_result]

NAME = "ledger"
SYNCED = "synced"
_RECORD = struct.Struct("<32sB7xqqq")
_KEY_SIZE = 33
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

    def check(self, unsure: list[Present], is_wanted: Callable[[Key], bool]) -> list[str]:
        """Make sure of what `unsure` has found and is wanted; returns the names of the objects that were set aside."""
        bad = []
        for key, path, status in unsure:
            if not is_wanted(key):
                continue
            if self.verify(key, path):
                self.note(key, status)
            else:
                set_aside(self.root, path)
                bad.append(object_name(*key))
        return bad

    def unsure(self) -> list[Present]:
        """What is present and was not verified as it is, or what is known of that may have been lost."""
        known = self._load()
        pack = _RECORD.pack
        return [one for one in self.present() if pack(*one[0], *_stamp(one[2])) not in known]

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

    def present(self) -> Iterator[Present]:
        """What the cache has, with paths and what lstat(2) says."""
        width = len(self._hash(b""))
        top = paths.objects(self.root)
        for shard in filter(_SHARD.fullmatch, paths.listed(top)):
            directory = os.path.join(top, shard)
            for name in paths.listed(directory):
                key = _key(shard + name, width)
                if key is None:
                    continue
                path = f"{directory}/{name}"
                try:
                    yield key, path, os.lstat(path)
                except OSError:
                    continue  # it went meanwhile

    def _load(self) -> set[bytes]:
        """The records that can be relied on; a ledger that is mostly out of date is written anew."""
        path = os.path.join(self.root, NAME)
        try:
            data = atomic.read_file(path, _LEDGER_MAX)
        except OSError:
            return set()
        size = _RECORD.size
        rows = [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
        sure_ns = self._sure_until_ns()
        is_first = sure_ns < _FOREVER  # in this boot of the machine: what is unsure is forgotten, of all images
        kept = [row for row in rows if _RECORD.unpack(row)[4] <= sure_ns] if is_first else rows
        if is_first or len(rows) > _WASTE * 1024:
            latest = {row[:_KEY_SIZE]: row for row in kept}
            if is_first or len(rows) > _WASTE * len(latest):
                self._write_anew(b"".join(latest.values()), is_first=is_first)
        return set(kept)

    def _write_anew(self, data: bytes, *, is_first: bool) -> None:
        try:
            atomic.replace_file(os.path.join(self.root, NAME), data, 0o600)
            if is_first:
                sync(self.root)
        except OSError:
            pass

    def _sure_until_ns(self) -> int:
        """What changed later may not have reached the disk before the machine went down; all is sure if it has not since."""
        try:
            found = json.loads(atomic.read_file(os.path.join(self.root, SYNCED), 4096))
            return _FOREVER if found["boot_id"] == boot_id() else int(found["time_ns"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _key(name: str, width: int) -> Key | None:
    """The key of an object by its name in the cache, None if it is no such name."""
    text = name.removesuffix(CHUNK_LIST_SUFFIX)
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        return None
    return (digest, PLAIN if text == name else CHUNK_LIST) if len(digest) == width and digest.hex() == text else None


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
    now = time.time_ns()
    atomic.sync_file_system(root)
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
