"""Where a build's result goes beside the store: -o DEST, in our spelling and in docker's (type=oci,dest=FILE)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

from cafs import atomic, checkout, destination, image
from cafs import export as writing
from cafs.errors import RemoteError, UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.image import Image
    from cafs.store import Store

_PREFIXES = {"oci": "oci-archive:", "docker": "docker-archive:", "tar": "", "local": "", "registry": "docker://"}


def write(store: Store, found: Image, place: str, tags: tuple[str, ...]) -> None:
    """Write the image.  Raises CafsError."""
    place, kind = _spelled(place, tags)
    threads = os.cpu_count() or 1
    if place.startswith("docker://"):
        _push(store, found, place, threads)
    elif kind == "local":
        checkout.checkout(image.load_tree(store, found), store, place, merges=True)
    elif kind == "tar":
        with atomic.output(place) as out:
            writing.write_tar(found, store, out)
    elif place:
        destination.write(found, store, place, threads, tags[0] if tags else None, merges=True)


def _spelled(text: str, tags: tuple[str, ...]) -> tuple[str, str]:
    """(in our spelling, its type, '' if none was given)."""
    if not text.startswith("type="):
        return text, ""
    fields = dict(field.partition("=")[::2] for field in text.split(","))
    kind, place = fields.pop("type"), fields.pop("dest", "-")
    if kind == "image":  # it is in the store
        name = fields.get("name") or (tags[0] if tags else "")
        return (f"docker://{name}" if fields.get("push") == "true" else ""), kind
    if kind == "local" and place == "-":
        raise UsageError("-o type=local needs dest=DIRECTORY")
    if kind not in _PREFIXES:
        raise UsageError(f"unknown output type {quote(kind)}", hint=", ".join(_PREFIXES))
    if kind == "registry":
        place = fields.pop("name", tags[0] if tags else "")
    return _PREFIXES[kind] + place, kind


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
