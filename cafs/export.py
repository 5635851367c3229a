"""Images for others: a tar of the tree, an OCI layout, its archive, an archive as of `docker save`.  The same bytes every time.

No clock is read: dates are the image's own, else SOURCE_DATE_EPOCH, else 1970.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time

from cafs import atomic, image, layerblob, oci, tarwrite
from cafs.errors import CafsError, UsageError, os_error, quote
from cafs.layerblob import Blob

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from cafs.image import Image
    from cafs.store import Store

_CONFIG = "application/vnd.oci.image.config.v1+json"


def write_tar(found: Image, store: Store, out: BinaryIO) -> None:
    """The tree as one archive.  Raises CafsError."""
    for piece in tarwrite.write(image.load_tree(store, found), store):
        out.write(piece)


def write_layout(
    found: Image,
    store: Store,
    directory: str,
    tag: str | None,
    threads: int,
    codec: str = "gzip",
    *,
    may_lack_layers: bool = False,
) -> None:
    """An OCI layout; an existing one gains the image, and its tag names that.  Raises CafsError.

    codec: of layers, one of layerblob.CODECS.  may_lack_layers: those that were compressed before are only named in it.
    """
    blobs = os.path.join(directory, "blobs", "sha256")
    try:
        atomic.make_directory(blobs)
        layers = [
            layerblob.write(layer, store, blobs, threads, codec, may_be_elsewhere=may_lack_layers) for layer in found.layers
        ]
        config = _blob(oci_config(found, [layer.diff_id for layer in layers]), blobs)
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST_TYPES[0],
            "config": config.descriptor(_CONFIG),
            "layers": [layer.descriptor(layerblob.media_type(codec)) for layer in layers],
        }
        described = _blob(_json(manifest), blobs).descriptor(oci.MANIFEST_TYPES[0])
        if tag:
            described["annotations"] = {oci.REF_NAME: tag}
        atomic.replace_file(os.path.join(directory, "oci-layout"), _json({"imageLayoutVersion": "1.0.0"}))
        _add_to_index(os.path.join(directory, "index.json"), described)
    except OSError as error:
        raise os_error(f"cannot write {quote(directory)}", error) from error


def write_layout_archive(
    found: Image, store: Store, out: BinaryIO, tag: str | None, threads: int, scratch: str, codec: str = "gzip"
) -> None:
    """The same in a tar.  scratch: an empty directory for what has to be known before it can be written."""
    write_layout(found, store, scratch, tag, threads, codec)
    _archive(
        out, scratch, sorted(os.path.relpath(os.path.join(d, f), scratch) for d, _, names in os.walk(scratch) for f in names)
    )


def write_saved(found: Image, store: Store, out: BinaryIO, tag: str | None, threads: int, scratch: str) -> None:
    """An archive as of `docker save`, layers uncompressed."""
    layers = []
    for number, digest in enumerate(found.layers):
        path = os.path.join(scratch, f"layer-{number}")
        hashed = hashlib.sha256()
        with open(path, "wb") as file:
            for piece in tarwrite.write(image.load_layer(store, digest), store, is_layer=True):
                hashed.update(piece)
                file.write(piece)
        name = f"{hashed.hexdigest()}.tar"
        os.rename(path, os.path.join(scratch, name))
        layers.append(name)
    config = oci_config(found, [name.removesuffix(".tar") for name in layers])
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    tags = [tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest"] if tag else []
    documents = {config_name: config, "manifest.json": _json([{"Config": config_name, "RepoTags": tags, "Layers": layers}])}
    for name, data in documents.items():
        with open(os.path.join(scratch, name), "wb") as file:
            file.write(data)
    _archive(out, scratch, [*dict.fromkeys(layers), *documents])


def oci_config(found: Image, diff_ids: list[str]) -> bytes:
    """The image's config as the OCI image spec wants it (config.md)."""
    kept = found.config if "config" in found.config else {"config": found.config}
    platform = oci.host_platform()
    config: dict[str, Any] = {"architecture": platform.architecture, "os": platform.os, "created": _created()} | kept
    config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{one}" for one in diff_ids]}
    config["history"] = _history(config.get("history") or [], len(diff_ids), config["created"])
    return _json(config)


def _history(steps: list[dict[str, Any]], layers: int, created: str) -> list[dict[str, Any]]:
    """The steps, as many of them with a layer as there are layers: docker refuses an image with more.

    What was folded into one layer is the last one's.  An import's layers have lost their steps: those before the others.
    """
    found = [dict(step) for step in steps]
    with_layer = [step for step in found if not step.get("empty_layer")]
    for step in with_layer[: max(len(with_layer) - layers, 0)]:
        step["empty_layer"] = True
    first = next((at for at, step in enumerate(found) if not step.get("empty_layer")), len(found))
    missing = max(layers - len(with_layer), 0)
    for step in found[max(first - missing, 0) : first]:
        del step["empty_layer"]
    return [{"created": created, "created_by": "cafs-index export"}] * (missing - first) + found


def _created() -> str:
    text = os.environ.get("SOURCE_DATE_EPOCH") or "0"
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UsageError(f"SOURCE_DATE_EPOCH is {quote(text)}, which is no number of seconds")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(text)))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _blob(data: bytes, directory: str) -> Blob:
    digest = hashlib.sha256(data).hexdigest()
    atomic.replace_file(os.path.join(directory, digest), data)
    return Blob(digest, len(data))


def _add_to_index(path: str, described: dict[str, Any]) -> None:
    """Let a layout's index name one image more; another of the same tag, or the same without one, goes."""
    with atomic.locked(os.path.dirname(path)):  # another export may be adding its own
        _add_locked(path, described)


def _add_locked(path: str, described: dict[str, Any]) -> None:
    try:
        document = oci.parse(atomic.read_file(path, oci.JSON_MAX), "index.json")
    except FileNotFoundError:
        document = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPES[0], "manifests": []}
    before = document.get("manifests")
    if not isinstance(before, list) or not all(isinstance(one, dict) for one in before):
        raise CafsError(f"{quote(path)} is damaged")
    tag = (described.get("annotations") or {}).get(oci.REF_NAME)

    def is_replaced(one: dict[str, Any]) -> bool:
        other = (one.get("annotations") or {}).get(oci.REF_NAME)
        return other == tag if tag else one == described

    document["manifests"] = [one for one in before if not is_replaced(one)] + [described]
    atomic.replace_file(path, _json(document))


def _archive(out: BinaryIO, directory: str, names: list[str]) -> None:
    """The files as a plain tar, without dates and owners.  Python's own writer does: nothing in it is odd."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mode = os.stat(os.path.join(directory, name)).st_size, 0o644
            with open(os.path.join(directory, name), "rb") as file:
                archive.addfile(info, file)
