"""Where a build's result goes beside the store: -o DEST, in our spelling and in docker's (type=oci,dest=FILE)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

from cafs import atomic, checkout, destination, image, layerblob
from cafs import export as writing
from cafs.errors import RemoteError, UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.image import Image
    from cafs.store import Store

_PREFIXES = {"oci": "oci-archive:", "docker": "docker-archive:", "tar": "", "local": "", "registry": "docker://"}
_IDLE = ("oci-mediatypes", "force-compression", "compression-level", "unpack")
"""Fields of docker's that are so anyway, or mean nothing here."""


def write(store: Store, found: Image, place: str, tags: tuple[str, ...]) -> None:
    """Write the image.  Raises CafsError."""
    kind, place, codec = _read(place, tags)
    threads = os.cpu_count() or 1
    if kind == "local":
        checkout.checkout(image.load_tree(store, found), store, place, merges=True)
    elif kind == "tar":
        with atomic.output(place) as out:
            writing.write_tar(found, store, out)
    elif place.startswith("docker://"):
        _push(store, found, place, threads, codec)
    elif place:
        destination.write(found, store, place, threads, tags[0] if tags else None, merges=True, codec=codec)


def is_stdout(text: str) -> bool:
    """Whether DEST is standard output, which nothing else may then be written to.  Raises UsageError."""
    return bool(re.fullmatch(r"(?:(?:oci|docker)-archive:)?-(?::.*)?", _read(text, ())[1]))


def _read(text: str, tags: tuple[str, ...]) -> tuple[str, str, str]:
    """(docker's type, '' if none was given; in our spelling; how layers are compressed).  Raises UsageError."""
    if not text.startswith("type="):
        return "", text, "gzip"
    fields = dict(field.partition("=")[::2] for field in text.split(","))
    kind, place, name = fields.pop("type"), fields.pop("dest", ""), fields.pop("name", tags[0] if tags else "")
    codec, is_pushed = layerblob.check_codec(fields.pop("compression", "gzip")), fields.pop("push", "false") == "true"
    if kind not in (*_PREFIXES, "image"):
        raise UsageError(f"unknown output type {quote(kind)}", hint=", ".join([*_PREFIXES, "image"]))
    if unknown := [field for field in fields if field not in _IDLE]:
        raise UsageError(f"-o type={kind} has no {quote(unknown[0])}", hint="dest, name, push, compression")
    if kind == "image":  # it is in the store
        return kind, f"docker://{name}" if is_pushed else "", codec
    if kind == "local" and not place:
        raise UsageError("-o type=local needs dest=DIRECTORY")
    return kind, _PREFIXES[kind] + (name if kind == "registry" else place or "-"), codec


def _push(store: Store, found: Image, place: str, threads: int, codec: str) -> None:
    """By skopeo(1), which knows registries and their credentials.

    A layer that was compressed before is named alone: most likely the registry has it, and skopeo asks that first.
    """
    problem = ""
    for may_lack_layers in (True, False):
        with tempfile.TemporaryDirectory(prefix="cafs-push-") as directory:
            writing.write_layout(found, store, directory, "push", threads, codec, may_lack_layers=may_lack_layers)
            problem = _copy(directory, place)
        if "no such file or directory" not in problem:
            break
    if problem:
        raise RemoteError(f"cannot push to {quote(place)}: {problem}")


def _copy(directory: str, place: str) -> str:
    """What skopeo says if it fails, else nothing.  Raises UnsupportedError."""
    host = re.sub(":[0-9]*$", "", place.removeprefix("docker://").partition("/")[0])
    secure = ["--dest-tls-verify=false"] if host in ("127.0.0.1", "localhost", "[::1]") else []
    try:
        command = ["skopeo", "--insecure-policy", "copy", "-q", *secure, f"oci:{directory}:push", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnsupportedError("no skopeo to push with", hint="apt install skopeo") from error
    return (done.stderr.strip() or "skopeo failed") if done.returncode else ""
