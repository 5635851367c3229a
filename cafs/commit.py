"""The upper directory of an overlay as one more layer of the image that it was laid over."""

from __future__ import annotations

import io
import os
from dataclasses import replace

from cafs import format as fmt
from cafs import image, kept, linux, lookup
from cafs.create import Indexer
from cafs.errors import os_error, quote
from cafs.format import Header
from cafs.index import load
from cafs.indexing import FOLD_AT, claim_layers, ensure_locator, put_layer
from cafs.layers import merge
from cafs.upper import UpperWalk, prefix
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from cafs.format import Entry
    from cafs.image import Image
    from cafs.lookup import MappedIndex, Node
    from cafs.store import Store
    from cafs.walk import Found


def open_below(store: Store, layers: Iterable[bytes], known: dict[bytes, MappedIndex] | None = None) -> Node:
    """The root of the tree that layers make, base first.  known: layers that were opened before.  Raises CafsError, OSError."""
    known = {} if known is None else known
    found = []
    for layer in layers:
        if layer not in known:
            known[layer] = lookup.MappedIndex(kept.get_index(store, layer))
        found.append(known[layer])
    return lookup.root(found)


def make_layer(walk: UpperWalk, writer: Writer, threads: int = 2, *, latest_ns: int = -1) -> bytes:
    """The index of the layer, whose objects are put; one without entries if nothing was changed.

    latest_ns: what has changed later gets that time; -1: times stay as they are.  Raises CafsError.
    """
    store = writer.store
    header = Header(store.hash_name, store.chunk_size, is_layer=True)
    linux.raise_descriptor_limit()
    lines = [header.encode()]
    for entry in _changed(Indexer(walk, header, writer, threads).entries()):
        if 0 <= latest_ns < entry.mtime_ns:
            entry = replace(entry, mtime_ns=latest_ns)
        lines.append(entry.encode())
    lines.append(fmt.encode_trailer(len(lines) - 1))
    return b"".join(lines)


def _changed(entries: Iterable[tuple[Found, Entry]]) -> Iterator[Entry]:
    """Those that are not as they are below; a directory that is, only if something in it is not."""
    waiting: list[Entry] = []
    for found, entry in entries:
        while waiting and not entry.path.startswith(waiting[-1].path.rstrip(b"/") + b"/"):
            waiting.pop()
        if found.is_stub or (entry == found.below and entry.type == fmt.DIRECTORY):
            waiting.append(entry)
            continue
        if entry == found.below and found.status.st_nlink == 1:  # else another name may have to link to it
            continue
        yield from waiting
        waiting.clear()
        yield entry


def commit(
    store: Store, below: Image, upper: str, config: dict[str, Any], ref: str | None, stubs: Iterable[bytes] = ()
) -> Image:
    """Make an image of a container's files.  config: its OCI image config.  stubs: as of UpperWalk.  Raises CafsError.

    Nobody may write to the upper directory meanwhile.
    """
    with Writer(store) as writer:
        claim_layers(store, below)
        walk = UpperWalk(upper, open_below(store, below.layers), prefix(), frozenset(stubs))
        data = make_layer(walk, writer, os.cpu_count() or 1)
        writer.flush()
        try:
            made = add_layer(store, below, data, config)
            if ref is not None:
                store.set_ref(ref, made.digest)
        except OSError as error:
            raise os_error(f"cannot write to store {quote(store.root)}", error) from error
    return made


def add_to(store: Store, data: bytes) -> tuple[bytes, bytes]:
    """Put the index of a layer whose objects are there: the digests of it and of its metadata image."""
    index = load(io.BytesIO(data))
    ensure_locator(store, index)
    return image.put_index(store, data, index)


def add_layer(store: Store, below: Image, data: bytes, config: dict[str, Any]) -> Image:
    """The image with one layer more; one of a single layer if there are very many.  The layer's objects are there."""
    index = load(io.BytesIO(data))
    if not len(index):
        return image.put_layers(store, below.layers, config, below.metadata)
    if len(below.layers) < FOLD_AT:
        return put_layer(store, data, index, config, below)
    data = merge([*(image.load_layer(store, layer) for layer in below.layers), index])
    return put_layer(store, data, load(io.BytesIO(data)), config)
