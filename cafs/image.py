"""Images: a small manifest, and how a name on a command line becomes one.  cafs-store(5), IMAGES."""

from __future__ import annotations

import io
import json
import os
import re

from cafs.digest import DIGEST_SIZES
from cafs.errors import CafsError, FormatError, NotFound, UnsupportedError, UsageError, os_error, quote
from cafs.refs import pinned_ref, split_ref
from cafs.store import IMAGE_MAX, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.index import Index

METADATA = "erofs1"
"""The metadata image of an index, as a kind of meta file, named after its layout: erofs.py."""

_LAYERS_MAX = 1024


class Image:
    """A manifest.  digest: its identity.  layers: index digests, base first.  config: OCI image config ('config' part).

    metadata: digest of the metadata image of each layer; empty where there is none.
    """

    __slots__ = ("config", "digest", "layers", "metadata")

    def __init__(
        self, layers: tuple[bytes, ...], config: dict[str, Any], digest: bytes = b"", metadata: tuple[bytes, ...] = ()
    ) -> None:
        self.layers = layers
        self.config = config
        self.digest = digest
        self.metadata = metadata or (b"",) * len(layers)

    def encode(self) -> bytes:
        """The manifest's bytes: canonical JSON, so equal images have equal digests."""
        layers = [
            {"index": layer.hex()} | ({METADATA: metadata.hex()} if metadata else {})
            for layer, metadata in zip(self.layers, self.metadata, strict=True)
        ]
        found = {"cafs-image": 1, "config": self.config, "layers": layers}
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes, digest: bytes) -> Image:
    """Read a manifest.  Raises FormatError on anything that is not one of this version."""
    try:
        found = json.loads(data)
        version, config, layers = found.pop("cafs-image"), found.pop("config"), found.pop("layers")
        if len(layers) > _LAYERS_MAX:
            raise ValueError("too many layers")
        indexes = tuple(bytes.fromhex(layer.pop("index")) for layer in layers)
        metadata = tuple(bytes.fromhex(layer.pop(METADATA, "")) for layer in layers)
        if version != 1 or found or any(layers) or not isinstance(config, dict) or not 1 <= len(indexes) <= _LAYERS_MAX:
            raise ValueError("unknown field")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"image {digest.hex()} is not a manifest of this version: {error}") from None
    return Image(indexes, config, digest, metadata)


def put(store: Store, data: bytes, index: Index, config: dict[str, Any], below: Image | None = None) -> Image:
    """Store an index (DATA), its metadata image, and the manifest of an image of one layer, or one more than BELOW has.

    Objects must be there already.
    """
    layers, metadata = (below.layers, below.metadata) if below else ((), ())
    layer, made = put_index(store, data, index)
    return put_layers(store, (*layers, layer), config, (*metadata, made))


def put_index(store: Store, data: bytes, index: Index) -> tuple[bytes, bytes]:
    """Store an index (DATA) and its metadata image: the digests of both, b'' for one that cannot be."""
    from cafs import erofs

    try:
        made = store.put_meta(erofs.encode(index), METADATA)
    except UnsupportedError:
        made = b""  # only the fuse engine can mount it
    return store.put_meta(data, "index"), made


def put_layers(store: Store, layers: tuple[bytes, ...], config: dict[str, Any], metadata: tuple[bytes, ...] = ()) -> Image:
    """Store the manifest of an image whose layers are there.  Raises CafsError if it is too large."""
    if len(layers) > _LAYERS_MAX:
        raise CafsError(f"an image cannot have over {_LAYERS_MAX} layers", hint="cafs-index merge")
    image = Image(layers, config, metadata=metadata)
    data = image.encode()
    if len(data) > IMAGE_MAX:
        raise CafsError(f"the image's config is too large: {len(data)} bytes")
    image.digest = store.put_meta(data, "image")
    return image


def get(store: Store, digest: bytes) -> Image:
    """The manifest with this digest."""
    return decode(store.get_meta(digest, "image"), digest)


def resolve(store: Store, name: str) -> Image:
    """IMAGE of a command line: NAME[:TAG][@DIGEST], a digest, or a unique prefix of one (at least 8 digits).

    DIGEST may be that by which the image was imported from a registry.

    Raises NotFound, with the names that are nearest.
    """
    ref, at, wanted = name.partition("@")
    if at:
        title = split_ref(ref)[0]
        pinned = re.fullmatch(r"sha256:([0-9a-f]{64})", wanted)
        try:
            return resolve(store, wanted.removeprefix(store.hash_name + ":"))
        except NotFound:
            imported = store.get_ref(pinned_ref(pinned[1])) if pinned else None
            if imported is not None:
                return get(store, imported)
            hint = f"cafs-index create docker://{title}@{wanted}" if pinned else None
            raise NotFound(f"no image {quote(name)} in store {quote(store.root)}", hint=hint) from None
    if re.fullmatch(r"[0-9a-f]{8,128}", name):
        is_whole = len(name) == 2 * DIGEST_SIZES[store.hash_name]
        if is_whole and store.has_meta(bytes.fromhex(name), "image"):
            return get(store, bytes.fromhex(name))
        images = (digest for digest, kind in store.meta_names() if kind == "image") if not is_whole else ()
        found = sorted({digest for digest in images if digest.hex().startswith(name)})
        if len(found) > 1:
            raise UsageError(f"{quote(name)} is the beginning of {len(found)} image digests")
        if found:
            return get(store, found[0])
    try:
        digest = store.get_ref(name)
    except UsageError:
        if os.path.exists(name):
            raise UsageError(f"{quote(name)} is a file, and an image from a store is needed here") from None
        raise
    if digest is None:
        raise NotFound(f"no image {quote(name)} in store {quote(store.root)}", hint=_nearest(store, name))
    return get(store, digest)


def _nearest(store: Store, name: str) -> str | None:
    import difflib

    try:
        refs = store.refs()
    except CafsError:  # a web server lists nothing
        return None
    near = difflib.get_close_matches(name, list(dict.fromkeys(ref.removesuffix(":latest") for ref in refs)), 3, 0.5)
    if near:
        return "did you mean " + " or ".join(quote(ref) for ref in near) + "?"
    return "the store has no images yet" if not refs else None


def load_layer(store: Store, digest: bytes) -> Index:
    """One of a store's indexes.  Raises CafsError."""
    from cafs.index import load

    return load(io.BytesIO(store.get_meta(digest, "index")))


def load_tree(store: Store, image: Image) -> Index:
    """The index of an image; of several layers, that of the tree they make.  Raises CafsError."""
    if len(image.layers) == 1:
        return load_layer(store, image.layers[0])
    from cafs.index import load
    from cafs.layers import merge

    return load(io.BytesIO(merge([load_layer(store, layer) for layer in image.layers])))


def load_index(name: str, store_root: str) -> tuple[Index, bytes, Store | None]:
    """The index that IMAGE names: '-' (stdin), a path to an index file (it has a slash or is no ref that exists), or an image.

    Returns the index, the digest that names it (of the image, or of a bare index), and the store where one was asked.
    """
    from cafs.index import load

    if is_bare(name, store_root):
        try:
            with open(0 if name == "-" else name, "rb", closefd=name != "-") as stream:
                index = load(stream)
                return index, index.identity, None
        except OSError as error:
            raise os_error(f"cannot open index {quote(name)}", error) from error
        except FormatError as error:
            raise FormatError(f"index {quote(name)}: {error}", hint=error.hint) from None
    if "/" in name and not os.path.lexists(name) and name.startswith((".", "/")):
        raise NotFound(f"cannot open index {quote(name)}: No such file or directory")
    store = Store(store_root)
    image = resolve(store, name)
    index = load_tree(store, image)
    check_hash(index, name, store)
    return index, image.digest, store


def is_bare(name: str, store_root: str) -> bool:
    """Whether IMAGE is an index by itself: stdin, or a file (it has a slash, or is no ref that exists)."""
    return name == "-" or (_is_stream(name) and ("/" in name or not _is_ref(store_root, name)))


def check_hash(index: Index, name: str, store: Store) -> None:
    """Raise UsageError unless the index and the store have the same hash and chunk size: nothing mixes."""
    ours, theirs = (index.header.hash_name, index.header.chunk_size), (store.hash_name, store.chunk_size)
    if ours != theirs:
        raise UsageError(
            f"index {quote(name)} is of {ours[0]} and chunks of {ours[1]}, "
            f"store {quote(store.root)} of {theirs[0]} and {theirs[1]}",
            hint="nothing mixes: name another store with --store",
        )


def _is_stream(path: str) -> bool:
    """A file, or a pipe such as a shell's <(...)."""
    return os.path.exists(path) and not os.path.isdir(path)


def _is_ref(store_root: str, name: str) -> bool:
    try:
        return Store(store_root).get_ref(name) is not None
    except CafsError:
        return False
