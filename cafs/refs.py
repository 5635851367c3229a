"""Names of images in a store: NAME[:TAG], as container tools spell them."""

from __future__ import annotations

import re

from cafs.errors import UsageError, quote

_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?::[0-9]+(?=/))?(?:/{_PART})*")
_DOCKER_HUB = re.compile(r"^(?:index\.)?docker\.io/(?:library/(?=[^/]+$))?|^library/(?=[^/]+$)")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def ref_name(ref: str) -> str:
    """Name of a ref's file: refs/NAME/TAG, with '+' for the slashes of NAME.  Raises UsageError."""
    name, tag = split_ref(ref)
    return f"refs/{name.replace('/', '+')}/{tag}"


def literal_name(ref: str) -> str:
    """Name of the file of a ref as it is spelt: an old store may hold docker.io/library/NAME.  Raises UsageError."""
    _, tag = split_ref(ref)
    head, _, last = ref.rpartition("/")
    name = f"{head}/{last.partition(':')[0]}" if head else last.partition(":")[0]
    return f"refs/{name.replace('/', '+')}/{tag}"


def split_ref(ref: str) -> tuple[str, str]:
    """NAME[:TAG] -> (name, tag), 'latest' where no tag is given.  Raises UsageError on anything that is no ref.

    As for docker, docker.io/library/NAME is NAME.
    """
    head, slash, last = _DOCKER_HUB.sub("", ref).rpartition("/")
    base, colon, tag = last.partition(":")
    name = head + slash + base
    if not colon:
        tag = "latest"
    if not _NAME.fullmatch(name) or len(name) > 255 or not _TAG.fullmatch(tag):
        raise UsageError(f"{quote(ref)} is not a ref", hint="a ref is NAME[:TAG], in lower case, like debian:12")
    return name, tag


def pinned_ref(digest: str) -> str:
    """The ref of what was imported by this digest of a registry, in hex."""
    return f"docker/{digest}:latest"


def is_ref(text: str) -> bool:
    """Whether TEXT could be a ref."""
    try:
        split_ref(text)
    except UsageError:
        return False
    return True
