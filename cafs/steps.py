"""Records of what the steps of builds have made: hints, by the key of the step.  cafs-store(5), STEPS."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.store import Store

KEPT_S = 7 * 86400
"""A step that was not used for longer keeps nothing from being collected."""

_RECORD_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """layer: digest of the index, b'' if the step changed no files.  created: RFC 3339.  seconds: what the step took."""

    layer: bytes
    metadata: bytes
    created: str
    seconds: float


def name_of(store: Store, key: str) -> str:
    """Of the file.  key: hexadecimal."""
    name = store.name_of(bytes.fromhex(key)).hex()
    return f"steps/{name[:2]}/{name}"


def read(store: Store, name: str) -> Record | None:
    """A record, None if there is none that is sound."""
    try:
        found = json.loads(store.backend.read(name, _RECORD_MAX))
        layer, metadata = bytes.fromhex(found["index"]), bytes.fromhex(found["metadata"])
        return Record(layer, metadata, str(found["created"]), float(found["seconds"]))
    except (OSError, CafsError, ValueError, KeyError, TypeError):
        return None


def write(store: Store, key: str, record: Record) -> None:
    """Raises OSError."""
    found = {
        "created": record.created,
        "index": record.layer.hex(),
        "metadata": record.metadata.hex(),
        "seconds": round(record.seconds, 3),
    }
    store.backend.replace(name_of(store, key), json.dumps(found, sort_keys=True).encode() + b"\n")


def note_use(store: Store, key: str) -> None:
    """It is wanted: it is kept for longer."""
    try:
        store.backend.touch(name_of(store, key))
    except (OSError, CafsError):
        pass  # a web server keeps nothing of ours


def kept(store: Store, age_s: float) -> tuple[Iterator[Record], list[str]]:
    """(records that were used within AGE_S, names of the others)."""
    try:
        listed = store.backend.list("steps")
    except FileNotFoundError:
        listed = []
    now = time.time()
    old = [f"steps/{one.name}" for one in listed if now - one.mtime_s > age_s]
    wanted = (read(store, f"steps/{one.name}") for one in listed if now - one.mtime_s <= age_s)
    return (record for record in wanted if record is not None and record.layer), old
