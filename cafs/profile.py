"""Profiles: what a workload reads, in order, as one hot pack, so that the next cold start is one sequential read.

cafs-store(5), PROFILES.  It duplicates on purpose: derived, never part of an image's identity, and no place to look objects up.
"""

from __future__ import annotations

import os
import re
from functools import partial

from cafs import atomic, pack
from cafs.backend import CannotList
from cafs.bulk import all_frames
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, CorruptError, NotFound, UsageError, os_error, quote
from cafs.kept import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cafs.image import Image
    from cafs.record import Read
    from cafs.store import Store

    Key = tuple[bytes, int]
    Row = tuple[bytes, int, int, int, int]

DEFAULT = "default"
ALL, NONE = "all", "none"
"""No names of profiles: what a mount may be asked to bring instead."""

_LAYERS = 4
"""So many of an image's layers, from the top, are asked for a profile."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(?<!\.of)")
OF = ".of"
_POINTER = re.compile(rb"([0-9a-f]{32}|[0-9a-f]{64})\n")


def file_name(store: Store, image: bytes, name: str) -> str:
    """Where a store keeps a profile.  Raises UsageError."""
    if not _NAME.fullmatch(name) or name in (ALL, NONE):
        raise UsageError(f"{quote(name)} is not a name of a profile", hint="lower-case letters, digits, '.', '_', '-'")
    return f"profiles/{store.name_of(image).hex()}/{name}"


def make(store: Store, image: Image, reads: Iterable[Read], name: str = DEFAULT) -> int:
    """Store the hot pack of an image's reads; returns how many objects are in it.  What is of no file of it is left out.

    Raises CafsError.
    """
    from cafs.image import load_layer
    from cafs.locator import contents

    target = file_name(store, image.digest, name)
    store.refresh()
    its_own = {key for layer in image.layers for key in contents(load_layer(store, layer))}
    all_reads = list(reads)
    reads = [read for read in all_reads if (read.digest, read.kind) in its_own]
    if all_reads and not reads:
        raise CafsError(
            f"nothing that was recorded is of image {image.digest.hex()[:12]}", hint="the record is of another image"
        )
    rows: list[Row] = []
    try:
        _write(store, target, _hot_pack(store, reads, rows))
        point(store, image, name)
    except OSError as error:
        raise os_error(f"cannot write to store {quote(store.root)}", error) from error
    return len(rows)


def _hot_pack(store: Store, reads: Iterable[Read], rows: list[Row]) -> Iterator[bytes]:
    """The bytes of a profile.  rows: to which its records are added."""
    yield pack.PACK_MAGIC
    offset = len(pack.PACK_MAGIC)
    for digest, kind in _keys(store, reads):
        frame = store.read_frame(digest, kind)
        rows.append((store.name_of(digest), kind, offset, len(frame), pack.frame_raw_size(frame)))
        yield frame
        offset += len(frame)
    yield pack.Records.build(store.hash_name, rows).encode_footer()


def _write(store: Store, file: str, pieces: Iterable[bytes]) -> None:
    """Put a profile into a store, in place of one that is there.  Raises OSError, CafsError."""
    fd, temporary = atomic.open_temporary(store.backend.scratch(), 0o444)
    try:
        try:
            for piece in pieces:
                atomic.write_all(fd, piece)
            os.fsync(fd)
        finally:
            os.close(fd)
        store.backend.publish(temporary, file)
    finally:
        atomic.unlink_quietly(temporary)


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


def chosen(store: Store, image: Image, wanted: str) -> list[str]:
    """Where to look for the profile that a mount brings, for `find`; empty if it is to bring none.

    wanted: its name, '' for the default one, 'all' (that too), 'none'.  Raises NotFound if one is named that is not there.
    """
    if wanted == NONE:
        return []
    name = DEFAULT if wanted in ("", ALL) else wanted
    layers = [_pointer(store, layer, name) for layer in reversed(image.layers[-_LAYERS:])]
    files = [file_name(store, image.digest, name), *layers]
    if wanted not in ("", ALL):
        try:
            find(store, files)
        except (CafsError, OSError) as error:
            hint = "cafs-index profile"
            raise NotFound(f"image {image.digest.hex()} has no profile {quote(wanted)}", hint=hint) from error
    return files


def find(store: Store, files: list[str]) -> tuple[str, pack.Records]:
    """The first profile of those that is there, and its records: of the image, else of one that has a layer of it.

    Raises FileNotFoundError, OSError, CafsError.
    """
    asked = [begin(store, partial(_ask, store, file, is_pointer=number > 0)) for number, file in enumerate(files)]
    problem: Exception | None = None
    for result in asked:
        try:
            found = result()
        except (CafsError, OSError) as error:
            problem = problem or error  # another one may do
            continue
        if found is not None:
            return found
    raise problem or FileNotFoundError(2, "No such file or directory", files[0])


def _ask(store: Store, file: str, *, is_pointer: bool) -> tuple[str, pack.Records] | None:
    try:
        if is_pointer:
            found = _POINTER.fullmatch(store.backend.read(file, 4096))
            if not found:
                return None
            file = f"profiles/{found[1].decode()}/{file.rpartition('/')[2].removesuffix(OF)}"
        return file, store.read_footer_of(file)
    except FileNotFoundError:
        return None


def _pointer(store: Store, layer: bytes, name: str) -> str:
    """The file that says whose profile may serve an image that has this layer."""
    return f"profiles/{store.name_of(layer).hex()}/{name}{OF}"


def point(store: Store, image: Image, name: str) -> None:
    """Let other images that have a layer of this one find its profile.  Raises CafsError, OSError."""
    data = f"{store.name_of(image.digest).hex()}\n".encode()
    for layer in image.layers[-_LAYERS:]:
        try:
            if store.backend.read(_pointer(store, layer, name), 4096) == data:
                continue
        except FileNotFoundError:
            pass
        store.backend.replace(_pointer(store, layer, name), data)


def names(store: Store, image: bytes) -> list[str]:
    """Names of an image's profiles; where nothing can be listed the default one, if it is there.  Raises CafsError."""
    directory = f"profiles/{store.name_of(image).hex()}"
    try:
        return sorted(one.name for one in store.backend.list(directory) if _NAME.fullmatch(one.name))
    except FileNotFoundError:
        return []
    except CannotList:
        return [DEFAULT] if store.backend.exists(file_name(store, image, DEFAULT)) else []
    except OSError as error:
        raise os_error(f"cannot list store {quote(store.root)}", error) from error


def pieces(store: Store, file: str) -> Iterator[bytes]:
    """The bytes of a profile, frame by frame, each verified.  Raises CorruptError, OSError, RemoteError."""
    records = store.read_footer_of(file)
    yield pack.PACK_MAGIC
    yield from all_frames(store, file, records)
    yield records.encode_footer()


def _is_same(source: Store, target: Store, file: str) -> bool:
    """Whether both have a profile with the same records; it may have been made anew."""
    try:
        return source.read_footer_of(file).encode_footer() == target.read_footer_of(file).encode_footer()
    except (CafsError, OSError):
        return False


def copy(source: Store, target: Store, image: Image) -> None:
    """Bring an image's profiles to another store of the same scope; a damaged one stays behind.  Raises CafsError, OSError."""
    for name in names(source, image.digest):
        file = file_name(source, image.digest, name)
        try:
            if not _is_same(source, target, file):
                _write(target, file, pieces(source, file))
        except CorruptError:
            continue
        point(target, image, name)
