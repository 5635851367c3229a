"""The step cache: what a step with a key has made, in the store, so that all who share it share that.  cafs-store(5), STEPS.

A record is only a hint: one that names a layer which is not there any more counts as none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager

from cafs import atomic, paths, steps
from cafs.errors import CafsError
from cafs.image import METADATA
from cafs.steps import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.store import Store
    from cafs.writer import Writer


def key_of(parent: str, **definition: object) -> str:
    """The key of a step: of the one before it, and of all that it depends on."""
    data = json.dumps([parent, definition], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(data.encode("utf-8", "surrogateescape")).hexdigest()


def find(store: Store, key: str) -> Record | None:
    """What a step has made before, if its layer is still there."""
    record = steps.read(store, steps.name_of(store, key))
    try:
        if record and record.layer:
            if not store.has_meta(record.layer, "index"):
                return None
            store.claim(store.meta_name(record.layer, "index"))
            store.claim(store.meta_name(record.metadata, METADATA)) if record.metadata else None
    except (OSError, CafsError):
        return None
    if record:
        steps.note_use(store, key)
    return record


def bring(stores: list[Store], key: str, writer: Writer) -> Record | None:
    """The same from other stores, with the layer; what cannot be had counts as none."""
    from cafs.image import Image
    from cafs.transfer import copy_layers

    for other in stores:
        record = find(other, key)
        if record is None:
            continue
        try:
            if record.layer:
                copy_layers(Image((record.layer,), {}, metadata=(record.metadata,)), other, writer.store, writer)
            steps.write(writer.store, key, record)
            return record
        except (CafsError, OSError):
            continue
    return None


def send(records: dict[str, Record], source: Store, target: Store) -> None:
    """Bring steps, with their layers, to another store.  Raises CafsError."""
    from cafs.errors import os_error, quote
    from cafs.image import Image
    from cafs.transfer import copy_layers
    from cafs.writer import Writer

    rows = {record.layer: record.metadata for record in records.values() if record.layer}
    try:
        with Writer(target) as writer:
            if rows:
                copy_layers(Image(tuple(rows), {}, metadata=tuple(rows.values())), source, target, writer)
            for key, record in records.items():
                steps.write(target, key, record)
    except OSError as error:
        raise os_error(f"cannot write to store {quote(target.root)}", error) from error


@contextmanager
def alone(key: str) -> Iterator[None]:
    """Hold the right to make a step on this machine: who waits for it finds it made."""
    directory = os.path.join(paths.run(), "steps")
    paths.make_private(paths.run(), "steps")
    path = os.path.join(directory, key)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        atomic.unlink_quietly(path)  # who waits for this file goes on alone, at worst for nothing
        os.close(lock)
