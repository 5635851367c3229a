"""What the cache keeps of a store, so that what was mounted once mounts again: at once, and when the store is away.

cafs-store(5), CACHE.  All of it is derived, or verified by its digest; only a ref can be older than the store's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time

from cafs import atomic, locator, paths
from cafs.digest import CHUNK_SIZE, DIGEST_SIZES
from cafs.errors import CafsError, FormatError, NotFound, RemoteError, UsageError, quote
from cafs.image import METADATA, decode, load_layer, resolve
from cafs.packs import is_chunk_size
from cafs.refs import is_ref
from cafs.store import IMAGE_MAX, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from cafs.image import Image
    from cafs.locator import Locator

    Result = TypeVar("Result")

_METADATA_MAX = 1 << 32
_LIKELY = "sha256", CHUNK_SIZE
"""What a store is that was never asked: guessed, so that it can be asked for more at the same time."""

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_log = logging.getLogger(__name__)


class Found:
    """An image of a store.  warning: what the user should know about it, '' if nothing."""

    __slots__ = ("image", "store", "warning")

    def __init__(self, store: Store, image: Image, warning: str = "") -> None:
        self.store = store
        self.image = image
        self.warning = warning


def find(root: str, name: str) -> Found:
    """The image that NAME is in the store at ROOT; if that cannot be asked, as the cache knows it.  Raises CafsError."""
    known = _known_format(root)
    store = Store(root, known or _LIKELY)
    asked = begin(store, store.read_format)
    resolved = begin(store, lambda: resolve(store, name))
    try:
        format_now = asked()
    except (RemoteError, NotFound) as error:
        return _without_store(store, root, name, error)
    if format_now != known:
        _write("stores", _name_of(root), {"chunk_size": format_now[1], "hash": format_now[0]})
    if format_now != (known or _LIKELY):
        store = Store(root, format_now)
        return Found(store, _note(root, name, resolve(store, name)))
    try:
        return Found(store, _note(root, name, resolved()))
    except RemoteError as error:
        return _without_store(store, root, name, error)


def begin(store: Store, task: Callable[[], Result]) -> Callable[[], Result]:
    """Begin a task, on a thread if the store is far away; returns how to have its result."""
    return task if store.backend.is_local else on_thread(task)


def on_thread(task: Callable[[], Result]) -> Callable[[], Result]:
    """Begin a task; returns how to have its result."""
    import threading
    from concurrent.futures import Future

    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result


def _note(root: str, name: str, image: Image) -> Image:
    """Keep the manifest, and what NAME means."""
    path = _image_path(image.digest)
    try:
        os.utime(path)  # what is not used for long goes
    except OSError:
        try:
            paths.make_private(paths.cache(), os.path.dirname(path))
            atomic.replace_hint(path, image.encode(), 0o600)
        except OSError as error:
            _log.debug("cannot keep image: %s", error)
    if is_ref(name):
        _write("refs", _name_of(root, name), {"digest": image.digest.hex(), "time": int(time.time())})
    return image


def _without_store(store: Store, root: str, name: str, error: CafsError) -> Found:
    """The image as it was; by its digest nothing can be other than it was."""
    ref, at, digest = name.partition("@")
    wanted = digest.removeprefix(store.hash_name + ":") if at else name
    if re.fullmatch(r"[0-9a-f]{8,128}", wanted):
        kept = paths.listed(os.path.join(paths.cache(), "meta"))
        near = sorted(one.partition(".")[0] for one in kept if one.startswith(wanted) and one.endswith(".image"))
        if len(near) > 1:
            raise UsageError(f"{quote(wanted)} is the beginning of {len(near)} image digests")
        image = _kept_image(store, bytes.fromhex(near[0])) if near else None
        if image is not None:
            return Found(store, image)
    found = _read("refs", _name_of(root, ref))
    try:
        image = None if at else _kept_image(store, bytes.fromhex(found["digest"]))
        age_s = max(int(time.time()) - int(found["time"]), 0)
    except (KeyError, ValueError, TypeError):
        image = None
    if image is None:
        raise error
    return Found(store, image, f"{error}: {quote(name)} is as it was {_age(age_s)} ago")


def _age(seconds: int) -> str:
    size, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    count = seconds // size
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _kept_image(store: Store, digest: bytes) -> Image | None:
    try:
        data = atomic.read_file(_image_path(digest), IMAGE_MAX)
        return decode(data, digest) if store.hash(data) == digest else None
    except (OSError, FormatError):
        return None


def _image_path(digest: bytes) -> str:
    return os.path.join(paths.cache(), "meta", f"{digest.hex()}.image")


def _name_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _known_format(root: str) -> tuple[str, int] | None:
    found = _read("stores", _name_of(root))
    known = found.get("hash"), found.get("chunk_size")
    return known if known[0] in DIGEST_SIZES and is_chunk_size(known[1]) else None  # type: ignore[return-value]


def _read(kind: str, name: str) -> dict[str, Any]:
    path = os.path.join(paths.cache(), kind, name)
    try:
        found = json.loads(atomic.read_file(path, 4096))
        os.utime(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(kind: str, name: str, what: dict[str, Any]) -> None:
    """Only a hint: not kept where there is no room."""
    try:
        paths.make_private(paths.cache(), kind)
        atomic.replace_hint(os.path.join(paths.cache(), kind, name), json.dumps(what, sort_keys=True).encode(), 0o600)
    except OSError as error:
        _log.debug("cannot keep %s: %s", kind, error)


def get_metadata(store: Store, index: bytes, metadata: bytes, *, is_trusted: bool = False) -> str:
    """Path of a layer's metadata image, verified; it is made if the image names none.  Raises OSError, CafsError.

    is_trusted: the caller has just had it verified.
    """
    data = b""
    if not metadata:
        from cafs import erofs

        data = erofs.encode(load_layer(store, index))
        metadata = store.hash(data)
    path = os.path.join(paths.cache(), "metadata", metadata.hex())
    try:
        if (is_trusted and os.path.isfile(path)) or store.hash(atomic.read_file(path, _METADATA_MAX)) == metadata:
            os.utime(path)
            return path
    except OSError:
        pass
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    atomic.replace_hint(path, data or store.get_meta(metadata, METADATA, is_kept=False), 0o400)
    return path


def get_index(store: Store, digest: bytes) -> str:
    """Path of an index of a store, which was loaded once with every check.  Raises OSError, CafsError."""
    path = os.path.join(paths.cache(), "indexes", digest.hex())
    try:
        if store.hash(atomic.read_file(path, _METADATA_MAX)) == digest:
            os.utime(path)
            return path
    except OSError:
        pass
    data = store.get_meta(digest, "index", is_kept=False)
    check_index(data)
    paths.make_private(paths.cache(), "indexes")
    atomic.replace_hint(path, data, 0o400)
    return path


def check_index(data: bytes) -> None:
    """Load it with every check.  Raises FormatError."""
    import io

    from cafs.index import load

    load(io.BytesIO(data))


def get_locator(store: Store, layer: bytes) -> Locator:
    """The locator of a layer; it is made if the store has none.  Raises OSError, CafsError."""
    path = os.path.join(paths.cache(), "locators", layer.hex())
    try:
        found = locator.load(path)
        if found.index == layer:
            os.utime(path)
            return found
    except (OSError, FormatError):
        pass
    there = store.get_locator(layer)
    if there is None:
        store.refresh()
        there = locator.Locator(locator.encode(store, load_layer(store, layer)))
    locator.save(path, there.data)
    return there


def find_locators(store: Store, layers: list[bytes]) -> list[Locator]:
    """Those of the locators of layers that can be had; without one the store's footers are asked."""
    found = []
    for layer in layers:
        try:
            found.append(get_locator(store, layer))
        except (OSError, CafsError) as error:
            _log.debug("no locator of %s: %s", layer.hex(), error)
    return found
