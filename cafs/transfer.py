"""Copying an image from one store to another: only what is missing there moves, whole packs where all of one is.

What arrives is checked before it is put.  An interrupted copy leaves whole packs behind, which the next one finds.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

from cafs import atomic, candidates, chunks, erofs, locator, pack, profile
from cafs.bulk import MANY_AT_ONCE, all_frames, by_pack, read_frames, read_objects
from cafs.digest import CHUNK_LIST, PLAIN, object_name
from cafs.errors import CafsError, CorruptError, NotFound, UsageError, os_error, quote
from cafs.image import METADATA
from cafs.index import load
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.bulk import Frame, Key
    from cafs.image import Image
    from cafs.index import Index
    from cafs.store import Store

_WHOLE = 0.95
"""A pack of which at least this share is missing is copied as it is."""


@dataclass(slots=True)
class Moved:
    """What a copy moved.  objects, bytes: stored forms of objects; packs: those copied whole."""

    objects: int = 0
    bytes: int = 0
    packs: int = 0


def copy(
    found: Image, source: Store, target: Store, ref: str | None, progress: Callable[[int, int], None] | None = None
) -> Moved:
    """Bring an image to TARGET and let REF name it there; the ref is set last.  Raises CafsError."""
    if (source.hash_name, source.chunk_size) != (target.hash_name, target.chunk_size):
        raise UsageError(
            f"store {quote(target.root)} is of {target.hash_name}, {quote(source.root)} of {source.hash_name}: nothing mixes"
        )
    moved = Moved()
    try:
        name = target.meta_name(found.digest, "image")
        if not target.backend.exists(name) or name in candidates.names(target.backend):
            with Writer(target) as writer:
                _Copy(source, target, writer, moved, progress).run(found)
                if ref:
                    target.set_ref(ref, found.digest)
        elif ref and target.get_ref(ref) != found.digest:
            target.set_ref(ref, found.digest)
        if source.scope_id == target.scope_id:
            profile.copy(source, target, found)
    except OSError as error:
        raise os_error(f"cannot write to store {quote(target.root)}", error) from error
    return moved


def copy_layers(found: Image, source: Store, target: Store, writer: Writer) -> None:
    """Bring the layers of an image, of which no store need have a manifest, to where WRITER writes.

    Raises CafsError, OSError.
    """
    _Copy(source, target, writer, Moved(), None).layers(found)


def wanted(store: Store, index: Index) -> list[Key]:
    """Every object that an index needs, in index order, then the chunks of its large files.  Raises CafsError."""
    found = dict.fromkeys(locator.contents(index))
    lists = {}
    listed_in = [key for key in found if key[1] == CHUNK_LIST]
    for key, data in read_objects(store, listed_in, at_once=MANY_AT_ONCE):
        if isinstance(data, CafsError):
            raise data
        lists[key] = bytes(data)
    for key in list(found):
        if key in lists:
            listed = chunks.decode(lists[key], store.hash_name, store.chunk_size)
            found.update(dict.fromkeys((chunk, PLAIN) for _, chunk in listed.runs if chunk))
    return list(found)


@dataclass(slots=True)
class _Copy:
    source: Store
    target: Store
    writer: Writer
    moved: Moved
    progress: Callable[[int, int], None] | None

    def run(self, found: Image) -> None:
        self.layers(found)
        self.target.put_meta(self.source.get_meta(found.digest, "image"), "image")

    def layers(self, found: Image) -> None:
        """All but the manifest."""
        self.source.refresh()
        layers = {layer: self.source.get_meta(layer, "index") for layer in found.layers}
        indexes = {layer: load(io.BytesIO(data)) for layer, data in layers.items()}
        keys = dict.fromkeys(key for index in indexes.values() for key in wanted(self.source, index))
        packs, gone = by_pack(self.source, [key for key in keys if not self.writer.has(*key)])
        if gone:
            raise NotFound(f"store {quote(self.source.root)} has no object {object_name(*gone[0])}", hint="cafs-store fsck")
        sizes = self.source.pack_sizes()
        is_same = self.source.scope_id == self.target.scope_id  # else a pack's footer is none there
        for name, frames in packs.items():
            is_most = sum(size for _, _, size in frames) >= _WHOLE * sizes.get(name, 1 << 62)
            if not (is_same and is_most and self._whole_pack(name)):
                self._frames(name, frames)
        self.writer.flush()
        for layer, data in layers.items():
            self.target.put_locator(layer, locator.encode(self.target, indexes[layer], self.source))
            self.target.put_meta(data, "index")
        for layer, metadata in zip(found.layers, found.metadata, strict=True):
            if metadata:
                self.target.put_meta(self._metadata(metadata, indexes[layer]), METADATA)

    def _metadata(self, digest: bytes, index: Index) -> bytes:
        """A metadata image; made anew if the source has none that is sound."""
        try:
            return self.source.get_meta(digest, METADATA)
        except (NotFound, CorruptError):
            data = erofs.encode(index)
            if self.source.hash(data) != digest:
                raise
            return data

    def _frames(self, name: str, frames: list[Frame]) -> None:
        """Some objects of a pack."""
        places = [(offset, size) for _, offset, size in frames]
        for (key, _, _), frame in zip(frames, read_frames(self.source, f"packs/{name}", places), strict=True):
            try:
                self.source.check_frame(frame, *key)
            except CorruptError:
                frame = self.source.read_frame(*key)
            self.writer.put(*key, frame)
            self._count(1, len(frame))

    def _whole_pack(self, name: str) -> bool:
        """All objects of a pack, under the same name; False, and nothing was done, if any of it is damaged."""
        before = self.moved.objects, self.moved.bytes
        fd, temporary = atomic.open_temporary(self.target.backend.scratch(), 0o444)
        try:
            try:
                records = self._write_pack(name, fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            self.writer.publish(temporary, name, records)
        except CorruptError:
            self.moved.objects, self.moved.bytes = before
            return False
        finally:
            atomic.unlink_quietly(temporary)
        self.moved.packs += 1
        return True

    def _write_pack(self, name: str, fd: int) -> pack.Records:
        records = self.source.read_footer(name)
        atomic.write_all(fd, pack.PACK_MAGIC)
        for frame in all_frames(self.source, f"packs/{name}", records):
            atomic.write_all(fd, frame)
            self._count(1, len(frame))
        atomic.write_all(fd, records.encode_footer())
        return records

    def _count(self, objects: int, size: int) -> None:
        self.moved.objects += objects
        self.moved.bytes += size
        if self.progress and self.moved.objects % 500 == 0:
            self.progress(self.moved.objects, self.moved.bytes)
