"""Checking a store: read everything, name every kind of damage, mend what can be mended.  cafs-store(5), DAMAGE."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from cafs import atomic, chunks, erofs, image, leftovers, locator, pack, paths, profile, quota
from cafs.backend import CannotList
from cafs.bulk import read_frames
from cafs.digest import CHUNK_LIST, PLAIN, object_name
from cafs.directory import DirectoryBackend
from cafs.errors import CafsError, CorruptError, RemoteError, UnsupportedError, quote
from cafs.packs import PACK_LIST, parse_pack_list

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.index import Index
    from cafs.store import Store

Key = tuple[bytes, int]
_META = (".index", ".image", f".{image.METADATA}")
Whole = list[tuple[bytes, int, int, int]]
"""(digest, kind, offset, frame size) of the sound objects of a pack."""


@dataclass(frozen=True, slots=True)
class Finding:
    """problem: a stable word; subject: what it is about; repaired: whether it is mended now."""

    problem: str
    subject: str
    repaired: bool = False


def totals(store: Store) -> dict[str, object]:
    """What `cafs-store info` prints.  Sizes in bytes; None is not known, where nothing can be listed."""
    packs = store.pack_sizes()
    refs: int | None = None
    images: int | None = None
    try:
        refs, images = len(store.refs()), sum(kind == "image" for _, kind in store.meta_names())
    except CannotList:  # a web server
        pass
    return {
        "store": store.root,
        "hash": store.hash_name,
        "chunk_size": store.chunk_size,
        "refs": refs,
        "images": images,
        "packs": len(packs),
        "objects": sum(len(store.read_footer(name)) for name in packs),
        "stored_bytes": sum(packs.values()),
        "cache": paths.cache(),
        "cache_bytes": quota.size(paths.cache()),
    } | {f"cache_{name}": count for name, count in quota.read_stats(paths.cache()).as_dict().items()}


def check(store: Store, *, repair: bool = False) -> Iterator[Finding]:
    """Every finding, most basic first: leftovers, packs, meta, refs, then what images need.

    Repairing, which takes a directory, removes leftovers of dead writers, sets permissions right and moves a damaged pack out
    of the way (its name ends in '.bad'; good objects in it are put again first).  Nothing else is ever deleted.
    """
    if repair and not store.backend.is_local:
        raise UnsupportedError(f"cannot repair store {quote(store.root)}: only a store in a directory can be")
    store.is_checked = True
    yield from _leftovers(store, repair)
    good: set[Key] = set()
    for name in store.pack_sizes():
        yield from _check_pack(store, name, good, repair)
    store.refresh()
    images = {}
    unread = {f"meta/{one.name}" for one in store.backend.list("meta") if one.name.endswith(_META)}
    for digest, kind in store.meta_names():
        unread.discard(store.meta_name(digest, kind))
        try:
            data = store.get_meta(digest, kind)
            if kind == "image":
                images[digest] = image.decode(data, digest)
        except RemoteError:
            raise  # it says nothing of the store
        except CafsError:
            yield Finding("damaged-meta", f"{kind} {digest.hex()}")
        yield from _permissions(store, store.meta_name(digest, kind), repair)
    for name in sorted(unread):
        yield Finding("damaged-meta", name)
    yield from _check_pack_list(store, repair)
    yield from _check_refs(store, set(images))
    yield from _check_profiles(store, repair)
    for digest, found in images.items():
        for layer, metadata in zip(found.layers, found.metadata, strict=True):
            yield from _check_index(store, layer, metadata, digest, good, repair)


def _path(store: Store, name: str) -> str:
    """Path of a file of a store in a directory."""
    assert isinstance(store.backend, DirectoryBackend)
    return store.backend.path(name)


def _leftovers(store: Store, repair: bool) -> Iterator[Finding]:
    for kind, name in leftovers.find(store.backend):
        yield Finding(kind, name.removeprefix("leases/"), _remove(_path(store, name), repair) if repair else False)


def _remove(path: str, repair: bool) -> bool:
    if repair:
        atomic.unlink_quietly(path)
    return repair


def _permissions(store: Store, name: str, repair: bool) -> Iterator[Finding]:
    if not store.backend.is_local:
        return
    path = _path(store, name)
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return
    if mode & 0o222 or not mode & 0o400:
        if repair:
            os.chmod(path, 0o444)
        yield Finding("permissions", path, repair)


def _check_pack(store: Store, name: str, good: set[Key], repair: bool) -> Iterator[Finding]:
    try:
        records = store.read_footer(name)
    except RemoteError:
        raise
    except OSError as error:
        yield Finding("unreadable-pack", f"{name}: {error.strerror}")
        return
    except CafsError as error:
        saved = _salvage(store, _path(store, f"packs/{name}")) if repair else []
        good.update((digest, kind) for digest, kind, _, _ in saved)
        yield Finding("damaged-pack", f"{name}: {error}", repair and _set_aside(store, name, saved))
        return
    bad: list[str] = []
    whole: Whole = []
    rows = sorted(records.rows(), key=lambda row: row[2])
    try:
        for row, frame in zip(rows, read_frames(store, f"packs/{name}", [row[2:4] for row in rows]), strict=True):
            name_of, kind, offset, stored, _ = row
            try:
                digest = store.check_record(frame, name_of, kind)
                good.add((digest, kind))
                whole.append((digest, kind, offset, stored))
            except CorruptError:
                bad.append(object_name(name_of, kind))
    except OSError as error:
        yield Finding("unreadable-pack", f"{name}: {error.strerror}")
    mended = bool(bad) and repair and _set_aside(store, name, whole)
    for one in sorted(bad):
        yield Finding("damaged-object", f"{one} in pack {name}", mended)
    if not bad:
        yield from _permissions(store, f"packs/{name}", repair)


def _salvage(store: Store, path: str) -> Whole:
    """The sound frames of a pack whose footer cannot be used."""
    found = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = len(pack.PACK_MAGIC)
        while 0 <= at < size:
            stored = pack.frame_size(atomic.read_exactly(file.fileno(), pack.FRAME.size, at))
            try:
                raw, kind = pack.decode_frame(atomic.read_exactly(file.fileno(), stored, at))
                found.append((store.hash(raw), kind, at, stored))
                at += stored
            except CorruptError:
                at = _next_frame(file.fileno(), at + 1)
    return found


def _next_frame(fd: int, at: int) -> int:
    """Offset of the next thing that begins like a frame, -1 at the end."""
    while len(data := atomic.read_exactly(fd, 1 << 20, at)) >= len(pack.FRAME_MAGIC):
        if (found := data.find(pack.FRAME_MAGIC)) >= 0:
            return at + found
        at += len(data) - len(pack.FRAME_MAGIC) + 1
    return -1


def _set_aside(store: Store, name: str, whole: Whole) -> bool:
    """Put the good objects of a damaged pack into a new one, then move the pack out of the readers' sight."""
    from cafs.writer import Writer

    path = _path(store, f"packs/{name}")
    store.set_aside(name)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Writer(store) as writer:
            for digest, kind, offset, stored in whole:
                writer.put(digest, kind, atomic.read_exactly(fd, stored, offset))
    finally:
        os.close(fd)
    if store.is_set_aside(name):  # else the good objects made the same pack anew
        os.rename(path, path + ".bad")
        atomic.fsync_directory(os.path.dirname(path))
    store.write_pack_list()
    return True


def _check_refs(store: Store, images: set[bytes]) -> Iterator[Finding]:
    for path in store.strays():
        yield Finding("stray-file", path)
    for ref in store.refs():
        try:
            digest = store.get_ref(ref)
        except RemoteError:
            raise
        except CafsError:
            yield Finding("damaged-ref", ref)
            continue
        if digest is not None and digest not in images:
            yield Finding("ref-to-nowhere", ref)


def _check_pack_list(store: Store, repair: bool) -> Iterator[Finding]:
    """That packs/list and the directory agree; without it only readers that cannot list would notice."""
    sizes = store.pack_sizes()
    listed = dict(parse_pack_list(store.read_pack_list()))
    for gone in sorted(set(listed) - set(sizes)):
        yield Finding("missing-pack", gone)
    if listed != sizes and repair:
        store.write_pack_list()
    if set(sizes.items()) - set(listed.items()):
        yield Finding("stale-pack-list", PACK_LIST, repair)


def _check_index(store: Store, layer: bytes, metadata: bytes, owner: bytes, good: set[Key], repair: bool) -> Iterator[Finding]:
    """The index of an image, and every object that it needs."""
    try:
        index = image.load_layer(store, layer)
    except RemoteError:
        raise
    except CafsError as error:
        yield Finding("missing-meta", f"index {layer.hex()} of image {owner.hex()}: {error}")
        return
    yield from _check_metadata(store, index, metadata, repair)
    wanted = set(locator.contents(index))
    for digest, kind in sorted(wanted & good):
        if kind == CHUNK_LIST:
            try:
                listed = chunks.decode(store.read_object(digest, kind), store.hash_name, store.chunk_size)
                wanted |= {(chunk, PLAIN) for _, chunk in listed.runs if chunk}
            except CafsError as error:
                yield Finding("damaged-object", f"{object_name(digest, kind)}: {error}")
    for digest, kind in sorted(wanted - good):
        yield Finding("missing-object", f"{object_name(digest, kind)} of image {owner.hex()}")
    if wanted <= good:
        yield from _check_locator(store, index, layer, repair)


def _check_profiles(store: Store, repair: bool) -> Iterator[Finding]:
    """That each frame of a hot pack is what its record says; a damaged one goes: it can be made anew."""
    try:
        listed = store.backend.list("profiles")
    except FileNotFoundError:
        return
    for one in listed:
        name = f"profiles/{one.name}"
        if name.endswith(profile.OF):
            continue  # it says where to look, and can do no harm
        try:
            for _ in profile.pieces(store, name):
                pass
        except CorruptError:
            yield Finding("damaged-profile", name, _remove(_path(store, name), repair) if repair else False)
        except (CafsError, OSError) as error:
            yield Finding("damaged-profile", f"{name}: {error}")


def _check_metadata(store: Store, index: Index, metadata: bytes, repair: bool) -> Iterator[Finding]:
    """That a metadata image is there, and the one that the index gives."""
    if not metadata:
        return
    try:
        data = erofs.encode(index)
    except UnsupportedError:
        data = b""
    if store.hash(data) != metadata:
        yield Finding("wrong-metadata", f"{metadata.hex()} of index {index.identity.hex()}")
        return
    try:
        store.get_meta(metadata, image.METADATA)
    except CafsError:
        if repair:
            store.put_meta(data, image.METADATA)
        yield Finding("missing-meta", f"metadata image {metadata.hex()} of index {index.identity.hex()}", repair)


def _check_locator(store: Store, index: Index, layer: bytes, repair: bool) -> Iterator[Finding]:
    """That the index's locator is what the packs say; any copy of an object will do."""
    found = store.get_locator(layer)
    is_right = found is not None and all(
        found.place(digest, kind) in list(store.locate(digest, kind)) for digest, kind in locator.contents(index)
    )
    if not is_right:
        if repair:
            store.put_locator(layer, locator.encode(store, index))
        yield Finding("stale-locator", f"index {layer.hex()}", repair)
