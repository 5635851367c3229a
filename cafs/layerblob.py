"""A layer as a compressed tar, under its digest; and what layers have come to before, so that none is compressed twice.

The same bytes every time: members of 4 MiB in a row (RFC 1952, 2.2; RFC 8878, 3), so that all processors work on one.
What was made is noted in CACHE/layerblobs, a hint: a blob that is where it is wanted, or may be, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass

from cafs import atomic, image, paths, tarwrite
from cafs.errors import UsageError, quote
from cafs.ordered import ordered_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from cafs.store import Store

CODECS = ("gzip", "zstd")
_MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+"
_MEMBER = 4 << 20
_GZIP_LEVEL, _ZSTD_LEVEL = 6, 3
_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_NOTE_MAX = 1 << 12


@dataclass(frozen=True, slots=True)
class Blob:
    """digest: hex SHA-256; diff_id: that of the uncompressed bytes."""

    digest: str
    size: int
    diff_id: str = ""

    def descriptor(self, media_type: str) -> dict[str, Any]:
        """What points to it."""
        return {"mediaType": media_type, "digest": f"sha256:{self.digest}", "size": self.size}


def media_type(codec: str) -> str:
    """Of a layer (OCI image specification, layer.md)."""
    return _MEDIA_TYPE + codec


def check_codec(codec: str) -> str:
    """Raises UsageError."""
    if codec not in CODECS:
        raise UsageError(f"unknown compression {quote(codec)}", hint=" or ".join(CODECS))
    return codec


def write(layer: bytes, store: Store, directory: str, threads: int, codec: str, *, may_be_elsewhere: bool = False) -> Blob:
    """A layer in a directory of blobs.  may_be_elsewhere: if it was made before, it need not be here.

    Raises CafsError, OSError.
    """
    known = _recall(layer, store, codec)
    if known and (may_be_elsewhere or _is_here(known, directory)):
        return known
    made = _write(layer, store, directory, threads, codec)
    _note(layer, store, codec, made)
    return made


def _is_here(blob: Blob, directory: str) -> bool:
    try:
        with open(os.path.join(directory, blob.digest), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.digest
    except OSError:
        return False


def _note_path(layer: bytes, store: Store, codec: str) -> str:
    name = hashlib.sha256(f"{store.hash_name} {layer.hex()} {codec}".encode()).hexdigest()
    return os.path.join(paths.cache(), "layerblobs", name[:32])


def _recall(layer: bytes, store: Store, codec: str) -> Blob | None:
    try:
        found = Blob(**json.loads(atomic.read_file(_note_path(layer, store, codec), _NOTE_MAX)))
    except (OSError, ValueError, TypeError):
        return None
    is_sound = type(found.size) is int and all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in (found.digest, found.diff_id))
    return found if is_sound else None


def _note(layer: bytes, store: Store, codec: str, blob: Blob) -> None:
    path = _note_path(layer, store, codec)
    try:
        paths.make_private(paths.cache(), os.path.dirname(path))
        atomic.replace_hint(path, json.dumps(asdict(blob)).encode(), 0o600)
    except OSError:
        pass  # it is made again


def _write(layer: bytes, store: Store, directory: str, threads: int, codec: str) -> Blob:
    plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
    pieces = tarwrite.write(image.load_layer(store, layer), store, is_layer=True)
    fd, temporary = atomic.open_temporary(directory)
    try:
        try:
            for raw, data in ordered_map(_gzip if codec == "gzip" else _zstd, _joined(pieces), threads, window=2 * threads):
                plain.update(raw)
                packed.update(data)
                atomic.write_all(fd, data)
                size += len(data)
            os.fsync(fd)
        finally:
            os.close(fd)
        atomic.publish(temporary, os.path.join(directory, packed.hexdigest()), replace=True)
    except BaseException:
        atomic.unlink_quietly(temporary)
        raise
    return Blob(packed.hexdigest(), size, plain.hexdigest())


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of one size, whatever they came in."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _MEMBER:
            data = b"".join(waiting)
            for at in range(0, size - size % _MEMBER, _MEMBER):
                yield data[at : at + _MEMBER]
            waiting, size = [data[size - size % _MEMBER :]], size % _MEMBER
    if size:
        yield b"".join(waiting)


def _gzip(raw: bytes) -> tuple[bytes, bytes]:
    packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -15)
    body = packer.compress(raw) + packer.flush()
    return raw, _GZIP_HEAD + body + zlib.crc32(raw).to_bytes(4, "little") + (len(raw) & 0xFFFFFFFF).to_bytes(4, "little")


def _zstd(raw: bytes) -> tuple[bytes, bytes]:
    import zstandard

    return raw, zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(raw)
