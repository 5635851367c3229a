"""OCI and docker image documents: index, manifest, config.  Pure bytes <-> records; everything read is checked first.

Sources: OCI image spec v1.1 (image-layout.md, image-index.md, manifest.md, config.md, descriptor.md); docker's
image-spec v1.2 (manifest.json of `docker save`).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from cafs.errors import CorruptError, FormatError, NotFound, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

JSON_MAX = 4 << 20
LAYERS_MAX = 1024
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
REF_NAME = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What points to a blob.  digest: ALGORITHM:HEX.  size: bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str]
    platform: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Platform:
    """os/arch[/variant], in Go's words, as `normal` spells them."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def fitting(self) -> list[Platform]:
        """The platforms whose images run on this one, itself first (containerd's platforms, platformVector)."""
        found, older = [self], []
        number = int(self.variant[1:]) if re.fullmatch("v[0-9]", self.variant) else 0
        if self.architecture == "amd64":
            older = [f"v{one}" for one in range(number - 1, 1, -1)] + [""] * (number > 1)
        elif self.architecture == "arm64":
            older = [f"v{one}" for one in range(number - 1, 8, -1)] + [""] * (number > 8)
        elif self.architecture == "arm":
            older = [f"v{one}" for one in range(number - 1, 4, -1)]
        return found + [Platform(self.os, self.architecture, one) for one in older]

    def matches(self, found: dict[str, Any]) -> bool:
        """Whether an image of a config runs on this one; one that does not say, as builders leave out the variant, does."""
        has_all = found.get("variant") or found.get("architecture") != self.architecture
        return read_platform(found if has_all else {**found, "variant": self.variant}, self) in self.fitting()


_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armv7l": "arm", "armv6l": "arm/v6",
    "armhf": "arm/v7", "armel": "arm/v6",
}  # fmt: skip
_DEFAULTS = {("amd64", "v1"): "", ("arm64", "v8"): "", ("arm64", "8"): "", ("arm", ""): "v7"}
_KNOWN = ("amd64", "arm64", "arm", "386", "riscv64", "ppc64le", "s390x", "mips64le", "loong64", *_ARCHITECTURES)


def normal(system: str, architecture: str, variant: str = "") -> Platform:
    """As containerd's platforms.Normalize: one spelling for each platform."""
    architecture = architecture.lower()
    name, _, known = _ARCHITECTURES.get(architecture, architecture).partition("/")
    variant = (variant or known).lower()
    if re.fullmatch("[0-9]", variant) and name in ("arm", "arm64"):
        variant = f"v{variant}"
    return Platform(system.lower(), name, _DEFAULTS.get((name, variant), variant))


def read_platform(found: dict[str, Any], otherwise: Platform) -> Platform:
    """What an image's config or descriptor says.  otherwise: for what it does not say."""
    if not found.get("architecture"):
        return otherwise
    return normal(str(found.get("os") or otherwise.os), str(found["architecture"]), str(found.get("variant") or ""))


def parse_platform(text: str) -> Platform:
    """os/arch[/variant], or os or arch alone, which this machine completes.  Raises FormatError."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[A-Za-z0-9_.-]+", part) for part in parts):
        raise FormatError(f"{quote(text)} is not a platform", hint="a platform is OS/ARCH[/VARIANT], like linux/arm64")
    if len(parts) > 1:
        return normal(*parts)
    here = host_platform()
    return normal(here.os, parts[0]) if parts[0].lower() in _KNOWN else normal(parts[0], here.architecture, here.variant)


def host_platform() -> Platform:
    """This machine's."""
    return normal("linux", os.uname().machine)


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.  Raises FormatError."""
    found = _json(data, what)
    if not isinstance(found, dict):
        raise FormatError(f"{what} is not a JSON object")
    return found


def _json(data: bytes, what: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    if len(data) > JSON_MAX:
        raise FormatError(f"{what} is over {JSON_MAX} bytes")
    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON: {error}") from None


def descriptor(found: Any, what: str) -> Descriptor:
    """Read a descriptor.  Raises FormatError; digests other than sha256 and sha512 are refused."""
    if not isinstance(found, dict):
        raise FormatError(f"{what} has a descriptor that is no object")
    digest, size = found.get("digest"), found.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise FormatError(f"{what} has a digest that is neither sha256:HEX nor sha512:HEX")
    if type(size) is not int or size < 0:
        raise FormatError(f"{what} has a descriptor without a size")
    notes, platform = found.get("annotations") or {}, found.get("platform") or {}
    if not isinstance(notes, dict) or not isinstance(platform, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise FormatError(f"{what} has a damaged descriptor")
    return Descriptor(str(found.get("mediaType") or ""), digest, size, notes, platform)


def descriptors(document: dict[str, Any], key: str, what: str) -> list[Descriptor]:
    """A list of descriptors.  Raises FormatError."""
    found = document.get(key)
    if not isinstance(found, list) or len(found) > LAYERS_MAX:
        raise FormatError(f"{what} has no list of {key}, or too long a one")
    return [descriptor(one, what) for one in found]


def choose(found: list[Descriptor], tag: str | None, platform: Platform | None, what: str) -> Descriptor:
    """The one manifest or index that is meant.  Raises NotFound, or FormatError if several may be."""
    if tag is not None:
        found = [one for one in found if one.annotations.get(REF_NAME) == tag]
        if not found:
            raise NotFound(f"{what} has no image {quote(tag)}")
    images = [one for one in found if one.media_type in (*INDEX_TYPES, *MANIFEST_TYPES, "")]
    if (platform and len(images) > 1) or any(one.platform for one in images):
        wanted = platform or host_platform()
        fitting = wanted.fitting()
        ranked = [(fitting.index(said), one) for one in images if (said := read_platform(one.platform, wanted)) in fitting]
        images = [one for rank, one in ranked if rank == min(ranked, key=lambda row: row[0])[0]]
        if not images:
            raise NotFound(f"{what} has no image for {wanted}", hint="--platform OS/ARCH[/VARIANT]")
    if len({one.digest for one in images}) > 1:
        names = sorted(one.annotations[REF_NAME] for one in images if REF_NAME in one.annotations)
        raise FormatError(f"{what} has several images", hint="name one: " + ", ".join(names) if names else None)
    if not images:
        raise NotFound(f"{what} has no image")
    return images[0]


def diff_ids(config: dict[str, Any], count: int) -> list[str]:
    """The digest of each uncompressed layer, base first.  Raises FormatError unless there are COUNT."""
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in found):
        raise FormatError("the image's config has no list of diff_ids")
    if len(found) != count:
        raise FormatError(f"the image's config has {len(found)} diff_ids for {count} layers")
    return found


def kept(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config is kept: all but what is about the source's layers.  History stays, without layers of its steps."""
    found = {key: value for key, value in config.items() if key not in ("rootfs", "history")}
    history = config.get("history")
    if isinstance(history, list) and all(isinstance(step, dict) for step in history):
        found["history"] = [step | {"empty_layer": True} for step in history]
    return found


@dataclass(frozen=True, slots=True)
class Saved:
    """One image of `docker save`: names of its config and layers in the archive, base first, and its tags."""

    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]


def parse_saved(data: bytes) -> list[Saved]:
    """Read a manifest.json.  Raises FormatError."""
    found = _json(data, "manifest.json")
    try:
        if not isinstance(found, list):
            raise TypeError("not a list")
        images = [Saved(one["Config"], tuple(one["Layers"]), tuple(one.get("RepoTags") or ())) for one in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"manifest.json is not of docker save: {error}") from None
    names = [name for one in images for name in (one.config, *one.layers, *one.tags)]
    if not all(isinstance(name, str) for name in names) or any(len(one.layers) > LAYERS_MAX for one in images):
        raise FormatError("manifest.json is not of docker save")
    return images


def choose_saved(images: list[Saved], tag: str | None) -> Saved:
    """The one that is meant.  Raises NotFound, FormatError."""
    if tag is not None:
        wanted = tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest"
        images = [one for one in images if {wanted, f"docker.io/{wanted}", f"docker.io/library/{wanted}"} & set(one.tags)]
        if not images:
            raise NotFound(f"the archive has no image {quote(tag)}")
    if len(images) > 1:
        names = sorted(name for one in images for name in one.tags)
        raise FormatError("the archive has several images", hint="name one: " + ", ".join(names) if names else None)
    if not images:
        raise NotFound("the archive has no image")
    return images[0]


def check_digest(data: bytes, digest: str, what: str, size: int | None = None) -> bytes:
    """DATA, if it is what a descriptor says.  Raises CorruptError."""
    import hashlib

    algorithm, _, wanted = digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != wanted:
        raise CorruptError(f"{what} is not what its digest says")
    if size not in (None, len(data)):
        raise CorruptError(f"{what} is of {len(data)} bytes, and its descriptor says {size}")
    return data
