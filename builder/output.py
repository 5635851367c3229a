"""Where a build's result goes beside the store: -o DEST, in our spelling and in docker's (type=oci,dest=FILE)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager

from cafs import atomic, checkout, image
from cafs import export as writing
from cafs.errors import RemoteError, UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.image import Image
    from cafs.store import Store

_KINDS = ("oci", "oci-archive", "docker-archive")
_TYPES = {"oci": "oci-archive:", "docker": "docker-archive:", "tar": "", "local": "", "registry": "docker://"}


def write(store: Store, found: Image, destination: str, tags: tuple[str, ...]) -> None:
    """Write the image.  Raises CafsError."""
    place, is_tar = _spelled(destination, tags)
    if not place:
        return
    kind, colon, rest = place.partition(":")
    threads = os.cpu_count() or 1
    if place.startswith("docker://"):
        _push(store, found, place, threads)
    elif colon and kind in _KINDS:
        path, _, tag = rest.partition(":")
        name = tag or (tags[0] if tags and kind == "docker-archive" else None)
        if not path:
            raise UsageError(f"cannot write to {quote(destination)}: no file is named")
        if kind == "oci":
            return writing.write_layout(found, store, path, name, threads)
        write = writing.write_layout_archive if kind == "oci-archive" else writing.write_saved
        with atomic.output(path) as out, _scratch(path) as scratch:
            write(found, store, out, name, threads, scratch)
    elif is_tar or place == "-" or place.endswith(".tar"):
        with atomic.output(place) as out:
            writing.write_tar(found, store, out)
    else:
        checkout.checkout(image.load_tree(store, found), store, place)


def _spelled(destination: str, tags: tuple[str, ...]) -> tuple[str, bool]:
    """(in our spelling, whether it is a tar of the tree)."""
    if not destination.startswith("type="):
        return destination, False
    fields = dict(field.partition("=")[::2] for field in destination.split(","))
    kind, place = fields.pop("type"), fields.pop("dest", "-")
    if kind == "image":  # it is in the store
        name = fields.get("name") or (tags[0] if tags else "")
        return (f"docker://{name}" if fields.get("push") == "true" else ""), False
    if kind == "local" and place == "-":
        raise UsageError("-o type=local needs dest=DIRECTORY")
    if kind not in _TYPES:
        raise UsageError(f"unknown output type {quote(kind)}", hint=", ".join(_TYPES))
    if kind == "registry":
        place = fields.pop("name", tags[0] if tags else "")
    return _TYPES[kind] + place, kind == "tar"


@contextmanager
def _scratch(path: str) -> Iterator[str]:
    is_file = path != "-" and (os.path.isfile(path) or not os.path.exists(path))
    beside = os.path.dirname(os.path.abspath(path)) if is_file else None
    with tempfile.TemporaryDirectory(prefix=".cafs-export-", dir=beside) as scratch:
        yield scratch


def _push(store: Store, found: Image, place: str, threads: int) -> None:
    """By skopeo(1), which knows registries and their credentials."""
    with tempfile.TemporaryDirectory(prefix="cafs-push-") as directory:
        writing.write_layout(found, store, directory, "push", threads)
        host = re.sub(":[0-9]*$", "", place.removeprefix("docker://").partition("/")[0])
        secure = ["--dest-tls-verify=false"] if host in ("127.0.0.1", "localhost", "[::1]") else []
        try:
            command = ["skopeo", "--insecure-policy", "copy", "-q", *secure, f"oci:{directory}:push", place]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UnsupportedError("no skopeo to push with", hint="apt install skopeo") from error
        if done.returncode:
            raise RemoteError(f"cannot push to {quote(place)}: {done.stderr.strip()}")
