"""Images of others as sources: docker-archive:, oci:, oci-archive:, docker-daemon:, docker://.

What the source says of its digests is checked, and nothing is named in the store before all of it holds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from cafs import oci, paths, stopping
from cafs.blobs import ArchiveBlobs, DirectoryBlobs, blob_name, digest_in
from cafs.errors import CafsError, CorruptError, RemoteError, UnsupportedError, UsageError, os_error, quote
from cafs.vtree import VirtualTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from cafs.tarindex import MemberReader

KINDS = ("docker-archive", "oci", "oci-archive", "docker-daemon", "docker")
_DEPTH_MAX = 4
_PINNED = re.compile(r"(//.+?)(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?@(sha256:[0-9a-f]{64})")


@dataclass
class ImageSource:
    """An image of others.  kind: one of KINDS; place: what follows the colon.  config: after `build`, what is kept of it."""

    kind: str
    place: str
    platform: oci.Platform | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def pin(self) -> str:
        """The digest by which an image of a registry was named, hex; '' if none was."""
        pinned = _PINNED.fullmatch(self.place) if self.kind == "docker" else None
        return pinned[2].partition(":")[2] if pinned else ""

    def build(self, reader: MemberReader) -> VirtualTree:
        """Read the image's layers and lay one over the other.  Raises CafsError."""
        with _opened(self.kind, self.place, self.platform) as (found, tag):
            if self.kind in ("oci", "docker"):
                return self._from_layout(DirectoryBlobs(str(found)), tag, reader)
            assert not isinstance(found, str)
            blobs = ArchiveBlobs(found, reader)
            if self.kind == "oci-archive":
                return self._from_layout(blobs, tag, reader)
            return self._from_saved(blobs, tag, reader)

    def _from_layout(self, blobs: ArchiveBlobs | DirectoryBlobs, tag: str | None, reader: MemberReader) -> VirtualTree:
        layout = oci.parse(blobs.read("oci-layout"), "oci-layout")
        if layout.get("imageLayoutVersion") != "1.0.0":
            raise UnsupportedError(f"OCI layout of an unknown version {layout.get('imageLayoutVersion')!r}")
        document, what = oci.parse(blobs.read("index.json"), "index.json"), "index.json"
        for _ in range(_DEPTH_MAX):
            if "manifests" not in document:
                break
            one = oci.choose(oci.descriptors(document, "manifests", what), tag, self.platform, repr(self.place))
            tag, what = None, f"manifest {_short(one.digest)}"
            document = oci.parse(oci.check_digest(blobs.read(blob_name(one.digest)), one.digest, what, one.size), what)
        described = oci.descriptor(document.get("config"), what)
        data = oci.check_digest(blobs.read(blob_name(described.digest)), described.digest, "config", described.size)
        layers = oci.descriptors(document, "layers", what)
        names = [blob_name(layer.digest) for layer in layers]
        promises = [(layer.digest, layer.size) for layer in layers]
        return self._lay(blobs, oci.parse(data, "config"), names, promises, reader)

    def _from_saved(self, blobs: ArchiveBlobs, tag: str | None, reader: MemberReader) -> VirtualTree:
        saved = oci.choose_saved(oci.parse_saved(blobs.read("manifest.json")), tag)
        data = blobs.read(saved.config)
        if promised := digest_in(saved.config):
            oci.check_digest(data, promised, "config")
        promises = [(digest_in(name) if name.startswith("blobs/") else None, None) for name in saved.layers]
        return self._lay(blobs, oci.parse(data, "config"), list(saved.layers), promises, reader)

    def _lay(
        self,
        blobs: ArchiveBlobs | DirectoryBlobs,
        config: dict[str, Any],
        names: list[str],
        promises: Sequence[tuple[str | None, int | None]],
        reader: MemberReader,
    ) -> VirtualTree:
        if self.platform and not self.platform.matches(config):
            raise UsageError(f"the image is for {config.get('os')}/{config.get('architecture')}")
        wanted = zip(promises, oci.diff_ids(config, len(names)), blobs.layers(names, reader), strict=True)
        tree = VirtualTree()
        for (digest, size), diff_id, layer in wanted:
            if digest not in (None, *layer.digests) or diff_id not in layer.diff_ids:
                raise CorruptError(f"layer {_short(digest or diff_id)} is not what its digest says")
            if size not in (None, layer.size):
                raise CorruptError(
                    f"layer {_short(digest or diff_id)} is of {layer.size} bytes, and its descriptor says {size}"
                )
            tree.put_layer(layer.members)
        self.config = oci.kept(config)
        return tree


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]


def parse(text: str, platform: str | None = None) -> ImageSource | None:
    """KIND:PLACE as a source; None if TEXT is a path.  Raises UsageError."""
    kind, colon, place = text.partition(":")
    if not colon or kind not in KINDS:
        return None
    if kind == "docker" and not place.startswith("//"):
        raise UsageError(f"{quote(text)} is not docker://REF")
    if not place.removeprefix("//"):
        raise UsageError(f"{quote(text)} names nothing")
    if kind == "docker" and (pinned := _PINNED.fullmatch(place)):
        place = f"{pinned[1]}@{pinned[2]}"  # a digest says it all, and skopeo takes no tag beside it
    return ImageSource(kind, place, oci.parse_platform(platform) if platform else None)


@contextmanager
def _opened(kind: str, place: str, platform: oci.Platform | None) -> Iterator[tuple[BinaryIO | str, str | None]]:
    """(directory, or stream of an archive; tag), from wherever it comes."""
    if kind == "docker":
        with _copied(f"docker:{place}", platform) as directory:
            yield directory, None
    elif kind == "docker-daemon":
        with _saved(place) as stream:
            yield stream, place
    elif kind == "oci":
        yield _split(place)
    elif place == "-" or place.startswith("-:"):
        yield sys.stdin.buffer, place[2:] or None
    else:
        path, tag = _split(place)
        try:
            file = open(path, "rb", buffering=0)
        except OSError as error:
            raise os_error(f"cannot read {quote(path)}", error) from error
        with file:
            yield file, tag


def _split(place: str) -> tuple[str, str | None]:
    """PATH[:TAG]; a path that is there may have colons."""
    if os.path.exists(place):
        return place, None
    path, colon, tag = place.partition(":")
    return path, tag if colon else None


def _program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise UnsupportedError(f"no {name}", hint=f"apt install {name}" if name == "skopeo" else None)
    return found


@contextmanager
def _copied(reference: str, platform: oci.Platform | None) -> Iterator[str]:
    """An OCI layout that skopeo copied from a registry, with skopeo's credentials; gone afterwards."""
    skopeo = _program("skopeo")
    os.makedirs(paths.cache(), mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="copy-", dir=paths.cache()) as directory:
        command = [
            skopeo,
            *_overrides(platform),
            "copy",
            "--quiet",
            *_tls(reference),
            "--",
            reference,
            f"oci:{directory}:image",
        ]
        null = subprocess.DEVNULL
        with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdin=null, stdout=null, stderr=said) as child:
            ended = os.pidfd_open(child.pid)
            try:
                stopping.wait(ended)
            except BaseException:
                child.kill()  # before the directory goes
                raise
            finally:
                os.close(ended)
            if child.wait():
                said.seek(0)
                raise RemoteError(f"cannot copy {quote(reference)}: {_reason(said.read(65536))}")
        yield directory


def _overrides(platform: oci.Platform | None) -> list[str]:
    if not platform:
        return []
    variant = [f"--override-variant={platform.variant}"] if platform.variant else []
    return [f"--override-os={platform.os}", f"--override-arch={platform.architecture}", *variant]


def _tls(reference: str) -> list[str]:
    """Registries on this machine need no certificate, as for docker."""
    host = re.match(r"docker://(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]+)?/", reference)
    return ["--src-tls-verify=false"] if host else []


def _reason(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    text = lines[-1] if lines else "skopeo failed"
    return text.rpartition('msg="')[2].removesuffix('"') if 'msg="' in text else text


@contextmanager
def _saved(reference: str) -> Iterator[BinaryIO]:
    """The archive that the docker on this machine writes of an image."""
    command = [_program("docker"), "save", "--", reference]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
        with child:
            assert child.stdout
            try:
                yield cast(BinaryIO, child.stdout)
            except CafsError:
                child.stdout.close()
                if not child.wait():
                    raise  # docker has done its part
        if child.returncode:
            said.seek(0)
            raise RemoteError(f"cannot save {quote(reference)}: {_reason(said.read(65536))}")
