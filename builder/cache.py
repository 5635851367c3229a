"""The step cache: what a step with a key has made, in the store, so that all who share it share that.  cafs-store(5), STEPS.

A record is only a hint: one that names a layer which is not there any more counts as none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass

from cafs import atomic, paths
from cafs.errors import CafsError
from cafs.image import METADATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.store import Store
    from cafs.writer import Writer

_RECORD_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """layer: digest of the index, b'' if the step changed no files.  created: RFC 3339.  seconds: what the step took."""

    layer: bytes
    metadata: bytes
    created: str
    seconds: float


def key_of(parent: str, **definition: object) -> str:
    """The key of a step: of the one before it, and of all that it depends on."""
    data = json.dumps([parent, definition], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(data.encode("utf-8", "surrogateescape")).hexdigest()


def _name(store: Store, key: str) -> str:
    name = store.name_of(bytes.fromhex(key)).hex()
    return f"steps/{name[:2]}/{name}"


def find(store: Store, key: str) -> Record | None:
    """What a step has made before, if its layer is still there."""
    try:
        found = json.loads(store.backend.read(_name(store, key), _RECORD_MAX))
        layer, metadata = bytes.fromhex(found["index"]), bytes.fromhex(found["metadata"])
        record = Record(layer, metadata, str(found["created"]), float(found["seconds"]))
        if layer and not store.has_meta(layer, "index"):
            return None
        if layer:
            store.claim(store.meta_name(layer, "index"))
            store.claim(store.meta_name(metadata, METADATA)) if metadata else None
        return record
    except (OSError, CafsError, ValueError, KeyError, TypeError):
        return None


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
            put(writer.store, key, record)
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
                put(target, key, record)
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


def put(store: Store, key: str, record: Record) -> None:
    """Remember a step, whose layer is in the store.  Raises OSError."""
    found = {
        "created": record.created,
        "index": record.layer.hex(),
        "metadata": record.metadata.hex(),
        "seconds": round(record.seconds, 3),
    }
    store.backend.replace(_name(store, key), json.dumps(found, sort_keys=True).encode() + b"\n")
