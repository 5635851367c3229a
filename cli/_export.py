"""Where `cafs-index export` writes to."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from typing import BinaryIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.image import Image
    from cafs.store import Store

_KINDS = ("oci", "oci-archive", "docker-archive")


def export(found: Image, store: Store, destination: str, threads: int) -> None:
    """Write the image to DEST of cafs-index(1).  Raises CafsError."""
    from cafs import export as writing
    from cafs.errors import UsageError, quote

    kind, colon, place = destination.partition(":")
    if colon and (kind in ("docker", "docker-daemon") or (kind in _KINDS and not place.partition(":")[0])):
        raise UsageError(f"cannot export to {quote(destination)}", hint="cafs-index export --help")
    if destination == "-" or (destination.endswith(".tar") and not colon):
        with _output(destination) as out:
            writing.write_tar(found, store, out)
    elif colon and kind in _KINDS:
        path, _, tag = place.partition(":")
        if kind == "oci":
            return writing.write_layout(found, store, path, tag or None, threads)
        write = writing.write_layout_archive if kind == "oci-archive" else writing.write_saved
        with _output(path) as out, _scratch(path) as scratch:
            write(found, store, out, tag or None, threads, scratch)
    else:
        _to_directory(found, store, destination)


def _to_directory(found: Image, store: Store, destination: str) -> None:
    import io

    from cafs import checkout, image
    from cafs.index import load

    checkout.checkout(load(io.BytesIO(image.read_index(store, found))), store, destination)


@contextmanager
def _scratch(path: str) -> Iterator[str]:
    """A directory beside the file that is written, for it must have room for as much; $TMPDIR for a pipe or a device."""
    is_file = path != "-" and (os.path.isfile(path) or not os.path.exists(path))
    beside = os.path.dirname(os.path.abspath(path)) if is_file else None
    with tempfile.TemporaryDirectory(prefix=".cafs-export-", dir=beside) as scratch:
        yield scratch


@contextmanager
def _output(path: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all; '-' is stdout, and what is no regular file is written in place."""
    from cafs import atomic
    from cafs.errors import os_error, quote

    if path == "-":
        yield sys.stdout.buffer
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as out:
                yield out
            return
        umask = os.umask(0)
        os.umask(umask)
        with atomic.replacing(os.path.abspath(path), 0o666 & ~umask) as out:
            yield out
    except OSError as error:
        raise os_error(f"cannot write {quote(path)}", error) from error
