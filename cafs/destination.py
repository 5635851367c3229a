"""Where an image is written to beside a store: DEST of cafs-index export, and of cbuild -o."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from contextlib import contextmanager

from cafs import atomic, checkout, image, paths
from cafs import export as writing
from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.image import Image
    from cafs.store import Store

_KINDS = ("oci", "oci-archive", "docker-archive")
_COMPRESSED = re.compile(r"\.(?:tar\.[a-z0-9]+|tgz|tbz2?|txz|tzst)$")


def write(
    found: Image,
    store: Store,
    destination: str,
    threads: int,
    name: str | None = None,
    *,
    merges: bool = False,
    codec: str = "gzip",
) -> None:
    """Write the image to DEST, as cafs-index(1) has it.  Raises CafsError.

    name: in a docker-archive, unless DEST says one.  merges: a directory may have something in it.  codec: of OCI layers.
    """
    kind, colon, place = destination.partition(":")
    if colon and (kind in ("docker", "docker-daemon") or (kind in _KINDS and not place.partition(":")[0])):
        raise UsageError(f"cannot export to {quote(destination)}", hint="cafs-index export --help")
    if colon and kind in _KINDS:
        path, _, tag = place.partition(":")
        if kind == "oci":
            return writing.write_layout(found, store, path, tag or None, threads, codec)
        with atomic.output(path) as out, _scratch(path) as scratch:
            if kind == "oci-archive":
                writing.write_layout_archive(found, store, out, tag or None, threads, scratch, codec)
            else:
                writing.write_saved(found, store, out, tag or name, threads, scratch)
    elif destination == "-" or destination.endswith(".tar"):
        with atomic.output(destination) as out:
            writing.write_tar(found, store, out)
    elif not paths.is_local(destination):
        near = difflib.get_close_matches(kind.lower(), _KINDS, 1)
        hint = f"did you mean {near[0]}:?" if near else f"a directory of that name is {quote('./' + destination)}"
        raise UsageError(f"cannot export to {quote(destination)}: unknown kind {quote(kind)}", hint=hint)
    elif _COMPRESSED.search(destination):
        hint = f"cafs-index export IMAGE - | gzip > {destination}"
        raise UsageError(f"cannot export to {quote(destination)}: a tar is written uncompressed", hint=hint)
    else:
        checkout.checkout(image.load_tree(store, found), store, destination, merges=merges)


@contextmanager
def _scratch(path: str) -> Iterator[str]:
    """A directory beside the file that is written, for it must have room for as much; $TMPDIR for a pipe or a device."""
    is_file = path != "-" and (os.path.isfile(path) or not os.path.exists(path))
    beside = os.path.dirname(os.path.abspath(path)) if is_file else None
    with tempfile.TemporaryDirectory(prefix=".cafs-export-", dir=beside) as scratch:
        yield scratch
