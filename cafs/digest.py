"""Digests and the names of objects.

A store names its hash once and nothing mixes: ``sha256`` (the default; forgery needs breaking SHA-256) or ``xxh128`` (for
one trusted owner; fast, forgeable).  Sources: FIPS 180-4; the XXH3 specification (github.com/Cyan4973/xxHash/doc).
"""

from __future__ import annotations

import hashlib

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from typing_extensions import Buffer

    class Hasher(Protocol):
        """What hashlib and xxhash objects have in common."""

        def update(self, data: Buffer, /) -> None: ...
        def digest(self) -> bytes: ...
        def hexdigest(self) -> str: ...


OBJECTS = b".cafs-objects"
"""The directory of objects, in the root of both data layers: of the cache's part for them, and LAZY."""

DIGEST_SIZES = {"sha256": 32, "xxh128": 16}
CHUNK_SIZE = 4 << 20
CHUNK_MIN, CHUNK_MAX = 1 << 16, 1 << 26
"""A chunk size is a power of two in this range."""

CHUNK_LIST_SUFFIX = ".c"

PLAIN, CHUNK_LIST = 0, 1
"""The two kinds of object: the bytes of a file or chunk, and the list of a large file's chunks."""


def hasher(hash_name: str) -> Hasher:
    """Start a digest.  hash_name: a key of DIGEST_SIZES."""
    if hash_name == "sha256":
        return hashlib.sha256()
    import xxhash

    return xxhash.xxh3_128()


def hash_function(hash_name: str) -> Callable[[Buffer], bytes]:
    """The one-shot form of `hasher`: bytes -> digest of DIGEST_SIZES[hash_name] bytes."""
    if hash_name == "sha256":
        sha256 = hashlib.sha256
        return lambda data: sha256(data).digest()
    if hash_name == "xxh128":
        import xxhash

        return xxhash.xxh3_128_digest
    raise UsageError(f"unknown hash {quote(hash_name)}", hint="one of: " + ", ".join(DIGEST_SIZES))


def checksum(data: Buffer) -> bytes:
    """XXH3-128 (16 bytes), the checksum of frames, footers and state files: against accidents, not forgery."""
    import xxhash

    return xxhash.xxh3_128_digest(data)


def object_name(digest: bytes, kind: int) -> str:
    """The file name of an object: lower-case hex, with '.c' for a chunk list, so that neither can pass for the other."""
    return digest.hex() + (CHUNK_LIST_SUFFIX if kind == CHUNK_LIST else "")
