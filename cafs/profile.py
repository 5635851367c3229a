"""Profiles: what a workload reads, in order, as one hot pack, so that the next cold start is one sequential read.

cafs-store(5), PROFILES.  It duplicates on purpose: derived, never part of an image's identity, and no place to look objects up.
"""

from __future__ import annotations

import os
import re

from cafs import atomic, chunks, pack
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, NotFound, UsageError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cafs.record import Read
    from cafs.store import Store

    Key = tuple[bytes, int]

DEFAULT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def file_name(store: Store, image: bytes, name: str) -> str:
    """Where a store keeps a profile.  Raises UsageError."""
    if not _NAME.fullmatch(name):
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
    """File of the profile that a mount brings, '' if none.  wanted: its name, '' for the default one, or 'none'.

    Raises NotFound if one is asked for that is not there.
    """
    if wanted == "none":
        return ""
    if wanted and not exists(store, image, wanted):
        raise NotFound(f"image {image.hex()} has no profile {quote(wanted)}", hint="cafs-index profile")
    return file_name(store, image, wanted or DEFAULT)
