"""Profiles: what a workload reads, in order, as one hot pack, so that the next cold start is one sequential read.

cafs-store(5), PROFILES.  It duplicates on purpose: derived, never part of an image's identity, and no place to look objects up.
"""

from __future__ import annotations

import os
import re

from cafs import atomic, pack
from cafs.backend import CannotList
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, CorruptError, NotFound, UsageError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cafs.record import Read
    from cafs.store import Store

    Key = tuple[bytes, int]

DEFAULT = "default"
ALL, NONE = "all", "none"
"""No names of profiles: what a mount may be asked to bring instead."""

_WINDOW = 8 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def file_name(store: Store, image: bytes, name: str) -> str:
    """Where a store keeps a profile.  Raises UsageError."""
    if not _NAME.fullmatch(name) or name in (ALL, NONE):
        raise UsageError(f"{quote(name)} is not a name of a profile", hint="lower-case letters, digits, '.', '_', '-'")
    return f"profiles/{store.name_of(image).hex()}/{name}"


def make(store: Store, image: bytes, reads: Iterable[Read], name: str = DEFAULT) -> int:
    """Store the hot pack of an image's reads; returns how many objects are in it.  Raises CafsError."""
    target = file_name(store, image, name)
    store.refresh()
    fd, temporary = atomic.open_temporary(store.backend.scratch(), 0o444)
    rows = []
    try:
        try:
            offset = len(pack.PACK_MAGIC)
            atomic.write_all(fd, pack.PACK_MAGIC)
            for digest, kind in _keys(store, reads):
                frame = store.read_frame(digest, kind)
                rows.append((store.name_of(digest), kind, offset, len(frame), pack.frame_raw_size(frame)))
                atomic.write_all(fd, frame)
                offset += len(frame)
            atomic.write_all(fd, pack.Records.build(store.hash_name, rows).encode_footer())
            os.fsync(fd)
        finally:
            os.close(fd)
        store.backend.publish(temporary, target)
    except OSError as error:
        raise os_error(f"cannot write to store {quote(store.root)}", error) from error
    finally:
        atomic.unlink_quietly(temporary)
    return len(rows)


def _keys(store: Store, reads: Iterable[Read]) -> Iterator[Key]:
    """The objects of reads, each once: of a large file its list before the first of its chunks.  What is gone is left out."""
    from cafs import chunks

    lists: dict[bytes, chunks.ChunkList] = {}
    seen: set[Key] = set()
    for read in reads:
        wanted: list[Key] = [(read.digest, PLAIN)]
        if read.kind == CHUNK_LIST:
            if read.digest not in lists:
                try:
                    data = store.read_object(read.digest, CHUNK_LIST)
                except NotFound:
                    continue
                lists[read.digest] = chunks.decode(data, store.hash_name, store.chunk_size)
            chunk = lists[read.digest].digest_at(read.offset // store.chunk_size)
            wanted = [(read.digest, CHUNK_LIST), *([(chunk, PLAIN)] if chunk else [])]
        for key in wanted:
            if key not in seen and store.has(*key):
                seen.add(key)
                yield key


def exists(store: Store, image: bytes, name: str) -> bool:
    """Whether there is such a profile; no, where that cannot be found out."""
    try:
        return store.backend.exists(file_name(store, image, name))
    except (CafsError, OSError):
        return False


def chosen(store: Store, image: bytes, wanted: str) -> str:
    """File of the profile that a mount brings, '' if none.  wanted: its name, '' for the default one, 'all' (that too), 'none'.

    Raises NotFound if one is asked for that is not there.
    """
    if wanted == NONE:
        return ""
    if wanted not in ("", ALL) and not exists(store, image, wanted):
        raise NotFound(f"image {image.hex()} has no profile {quote(wanted)}", hint="cafs-index profile")
    return file_name(store, image, DEFAULT if wanted in ("", ALL) else wanted)


def names(store: Store, image: bytes) -> list[str]:
    """Names of an image's profiles; where nothing can be listed the default one, if it is there.  Raises CafsError."""
    directory = f"profiles/{store.name_of(image).hex()}"
    try:
        return sorted(one.name for one in store.backend.list(directory) if _NAME.fullmatch(one.name))
    except FileNotFoundError:
        return []
    except CannotList:
        return [DEFAULT] if exists(store, image, DEFAULT) else []
    except OSError as error:
        raise os_error(f"cannot list store {quote(store.root)}", error) from error


def pieces(store: Store, file: str) -> Iterator[bytes]:
    """The bytes of a profile, frame by frame, each verified.  Raises CorruptError, OSError, RemoteError."""
    records = store.read_footer_of(file)
    yield pack.PACK_MAGIC
    at = start = len(pack.PACK_MAGIC)
    data = b""
    for name, kind, offset, size, _ in sorted(records.rows(), key=lambda row: row[2]):
        if offset != at:
            raise CorruptError(f"profile {file} has gaps")
        if offset + size > start + len(data):
            start, data = offset, store.backend.read_range(file, offset, max(size, _WINDOW))
        frame = data[offset - start : offset - start + size]
        store.check_record(frame, name, kind)
        yield frame
        at += size
    yield records.encode_footer()


def copy(source: Store, target: Store, image: bytes) -> None:
    """Bring an image's profiles to another store of the same scope; a damaged one stays behind.  Raises CafsError, OSError."""
    for name in names(source, image):
        if exists(target, image, name):
            continue
        fd, temporary = atomic.open_temporary(target.backend.scratch(), 0o444)
        try:
            try:
                for piece in pieces(source, file_name(source, image, name)):
                    atomic.write_all(fd, piece)
                os.fsync(fd)
            finally:
                os.close(fd)
            target.backend.publish(temporary, file_name(target, image, name))
        except CorruptError:
            continue
        finally:
            atomic.unlink_quietly(temporary)
