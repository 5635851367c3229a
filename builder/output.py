"""Where a build's result goes beside the store: -o DEST, in our spelling and in docker's (type=oci,dest=FILE)."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import tempfile

from builder import flags as flagging
from cafs import atomic, checkout, destination, image, layerblob
from cafs import export as writing
from cafs.errors import RemoteError, UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.image import Image
    from cafs.store import Store

_PREFIXES = {
    "oci": "oci-archive:",
    "docker": "docker-archive:",
    "tar": "",
    "local": "",
    "registry": "docker://",
    "image": "docker://",
}
_FIELDS = {
    "oci": ("dest", "name", "compression"), "docker": ("dest", "name"), "tar": ("dest",), "local": ("dest",),
    "registry": ("name", "compression", "push"), "image": ("name", "compression", "push"),
}  # fmt: skip
_AS_IT_IS = {"oci-mediatypes": ("true",), "force-compression": ("true",), "unpack": ("true", "false"), "store": ("true",)}
"""Fields of docker's that can only be what they are here."""


class Output:
    """One -o.  kind: docker's type, '' if none was given.  place: in our spelling, '' for the store alone.

    names: of the image, beside the tags.  codec: of its layers.
    """

    __slots__ = ("codec", "kind", "names", "place")

    def __init__(self, kind: str, place: str, names: tuple[str, ...] = (), codec: str = "gzip") -> None:
        self.kind = kind
        self.place = place
        self.names = names
        self.codec = codec


def write(store: Store, found: Image, text: str, tags: tuple[str, ...]) -> None:
    """Write the image to one DEST.  Raises CafsError."""
    one = read(text, tags)
    threads = os.cpu_count() or 1
    if one.kind == "local":
        checkout.checkout(image.load_tree(store, found), store, one.place, merges=True)
    elif one.kind == "tar":
        with atomic.output(one.place) as out:
            writing.write_tar(found, store, out)
    elif one.kind in ("image", "registry"):
        for ref in one.names if one.kind == "image" else ():
            store.set_ref(ref, found.digest)
        for ref in (one.names or tags) if one.place else ():
            _push(store, found, one.place + ref, threads, one.codec)
    elif one.place.startswith("docker://"):
        _push(store, found, one.place, threads, one.codec)
    else:
        name = next(iter(one.names or tags), None)
        destination.write(found, store, one.place, threads, name, merges=True, codec=one.codec)


def is_stdout(text: str) -> bool:
    """Whether DEST is standard output, which nothing else may then be written to.  Raises UsageError."""
    return bool(re.fullmatch(r"(?:(?:oci|docker)-archive:)?-(?::.*)?", read(text, ()).place))


def read(text: str, tags: tuple[str, ...]) -> Output:
    """What DEST means; every field is heeded or refused.  Raises UsageError."""
    if not text.startswith("type="):
        if re.match(r"(?:dest|name|push|compression|tar)=", text):
            raise UsageError(f"-o {quote(text)} has no type=", hint="type=local,dest=DIRECTORY")
        return Output("", text)
    pairs = next(csv.reader([text]))
    fields = dict(pair.partition("=")[::2] for pair in pairs)
    kind = fields.pop("type")
    if kind not in _FIELDS:
        raise UsageError(f"unknown output type {quote(kind)}", hint=", ".join(_FIELDS))
    for name, value in fields.items():
        if name not in _FIELDS[kind] and value not in _AS_IT_IS.get(name, ()):
            raise UsageError(f"-o type={kind} has no {quote(f'{name}={value}')}", hint=", ".join(_FIELDS[kind]))
    names = tuple(filter(None, fields.get("name", "").split(",")))
    codec, place = layerblob.check_codec(fields.get("compression", "gzip")), fields.get("dest", "")
    if kind in ("image", "registry"):
        is_pushed = flagging.truth("push", fields.get("push", "true" if kind == "registry" else "false"))
        if is_pushed and not names and not tags:
            raise UsageError(f"-o type={kind} needs a name to push to", hint="name=REF, or -t REF")
        if kind == "image" and "compression" in fields and not is_pushed:
            raise UsageError("layers of the store have no compression of docker's", hint="push=true")
        return Output(kind, _PREFIXES[kind] if is_pushed else "", names, codec)
    if kind == "local" and not place:
        raise UsageError("-o type=local needs dest=DIRECTORY")
    return Output(kind, _PREFIXES[kind] + (place or "-"), names, codec)


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
