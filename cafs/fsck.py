"""Checking a store: read everything, name every kind of damage, mend what can be mended.  cafs-store(5), DAMAGE."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass

from cafs import atomic, chunks, image, lease, locator, pack
from cafs import format as fmt
from cafs.digest import CHUNK_LIST, PLAIN, object_name
from cafs.errors import CafsError, CorruptError
from cafs.index import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.index import Index
    from cafs.store import Store

Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """problem: a stable word; subject: what it is about; repaired: whether it is mended now."""

    problem: str
    subject: str
    repaired: bool = False


def totals(store: Store) -> dict[str, object]:
    """What `cafs-store info` prints.  Sizes in bytes."""
    store.refresh()
    packs = store.pack_names()
    return {
        "store": store.root,
        "hash": store.hash_name,
        "chunk_size": store.chunk_size,
        "refs": len(store.refs()),
        "images": sum(kind == "image" for _, kind in store.meta_names()),
        "packs": len(packs),
        "objects": sum(len(store.read_footer(name)) for name in packs),
        "stored_bytes": sum(os.stat(store.pack_path(name)).st_size for name in packs),
    }


def check(store: Store, *, repair: bool = False) -> Iterator[Finding]:
    """Every finding, most basic first: leftovers, packs, meta, refs, then what images need.

    Repairing removes leftovers of dead writers, sets permissions right and moves a damaged pack out of the way
    (its name ends in '.bad'; good objects in it are put again first).  Nothing else is ever deleted.
    """
    yield from _leftovers(store, repair)
    good: set[Key] = set()
    for name in store.pack_names():
        yield from _check_pack(store, name, good, repair)
    store.refresh()
    images = {}
    for digest, kind in store.meta_names():
        try:
            data = store.get_meta(digest, kind)
            if kind == "image":
                images[digest] = image.decode(data, digest)
        except CafsError:
            yield Finding("damaged-meta", f"{kind} {digest.hex()}")
        yield from _permissions(store.meta_path(digest, kind), repair)
    yield from _check_pack_list(store, repair)
    yield from _check_refs(store, set(images))
    for digest, found in images.items():
        for layer in found.layers:
            yield from _check_index(store, layer, digest, good, repair)


def _leftovers(store: Store, repair: bool) -> Iterator[Finding]:
    """Leases of writers that died on this machine; temporary files when no writer is alive anywhere."""
    leases = os.path.join(store.root, "leases")
    alive = False
    for name in sorted(os.listdir(leases)):
        path = os.path.join(leases, name)
        if lease.is_dead(path):
            yield Finding("dead-lease", name, _remove(path, repair))
        else:
            alive = True
    if not alive:
        for directory, _, names in os.walk(store.root):
            for name in sorted(names):
                if name.startswith("tmp."):
                    path = os.path.join(directory, name)
                    yield Finding("leftover", os.path.relpath(path, store.root), _remove(path, repair))


def _remove(path: str, repair: bool) -> bool:
    if repair:
        atomic.unlink_quietly(path)
    return repair


def _permissions(path: str, repair: bool) -> Iterator[Finding]:
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return
    if mode & 0o222 or not mode & 0o400:
        if repair:
            os.chmod(path, 0o444)
        yield Finding("permissions", path, repair)


def _check_pack(store: Store, name: str, good: set[Key], repair: bool) -> Iterator[Finding]:
    path = store.pack_path(name)
    try:
        records = store.read_footer(name)
    except (CorruptError, OSError) as error:
        saved = _salvage(store, path) if repair else []
        good.update((digest, kind) for digest, kind, _, _ in saved)
        yield Finding("damaged-pack", f"{name}: {error}", repair and _set_aside(store, name, saved))
        return
    bad, whole = [], []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for digest, kind, offset, stored, _ in records.rows():
            frame = atomic.read_exactly(fd, stored, offset)
            try:
                raw, found_kind = pack.decode_frame(frame)
                if found_kind != kind or store.hash(raw) != digest:
                    raise CorruptError("content is not what its name says")
                good.add((digest, kind))
                whole.append((digest, kind, offset, stored))
            except CorruptError:
                bad.append(object_name(digest, kind))
    except OSError as error:
        yield Finding("unreadable-pack", f"{name}: {error.strerror}")
    finally:
        os.close(fd)
    mended = bool(bad) and repair and _set_aside(store, name, whole)
    for one in bad:
        yield Finding("damaged-object", f"{one} in pack {name}", mended)
    if not bad:
        yield from _permissions(path, repair)


def _salvage(store: Store, path: str) -> list[tuple[bytes, int, int, int]]:
    """(digest, kind, offset, size) of the sound frames of a pack whose footer cannot be used."""
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


def _set_aside(store: Store, name: str, whole: list[tuple[bytes, int, int, int]]) -> bool:
    """Put the good objects of a damaged pack into a new one, then move the pack out of the readers' sight."""
    from cafs.writer import Writer

    path = store.pack_path(name)
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
        except CafsError:
            yield Finding("damaged-ref", ref)
            continue
        if digest is not None and digest not in images:
            yield Finding("ref-to-nowhere", ref)


def _check_pack_list(store: Store, repair: bool) -> Iterator[Finding]:
    """That packs/list and the directory agree; without it only readers that cannot list would notice."""
    try:
        listed = set(atomic.read_file(store.pack_path("list"), 1 << 28).decode("latin-1").split())
    except FileNotFoundError:
        listed = set()
    names = set(store.pack_names())
    for gone in sorted(listed - names):
        yield Finding("missing-pack", gone)
    if listed != names and repair:
        store.write_pack_list()
    if names - listed:
        yield Finding("stale-pack-list", "packs/list", repair)


def _check_index(store: Store, layer: bytes, owner: bytes, good: set[Key], repair: bool) -> Iterator[Finding]:
    """The index of an image, and every object that it needs."""
    try:
        index = load(io.BytesIO(store.get_meta(layer, "index")))
    except CafsError as error:
        yield Finding("missing-meta", f"index {layer.hex()} of image {owner.hex()}: {error}")
        return
    wanted: set[Key] = set()
    for entry, kind in enumerate(index.type):
        if kind in b"fF" and index.size[entry]:
            wanted.add((index.object(entry), CHUNK_LIST if kind == fmt.CHUNKED[0] else PLAIN))
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


def _check_locator(store: Store, index: Index, layer: bytes, repair: bool) -> Iterator[Finding]:
    """That the index's locator is what the packs say; any copy of an object will do."""
    found = store.get_locator(layer)
    is_right = found is not None and all(
        found.place(number) in list(store.locate(digest, kind)) for number, (digest, kind) in enumerate(locator.contents(index))
    )
    if not is_right:
        if repair:
            store.put_locator(layer, locator.encode(store, locator.contents(index)))
        yield Finding("stale-locator", f"index {layer.hex()}", repair)
