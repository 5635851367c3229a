"""Secrets of a pool: a file each, its owner's alone, that jobs name and nobody else keeps.

They go to a worker with the job that wants them, over its connection; neither the state nor any argument has them.
"""

from __future__ import annotations

import os
import re

from cafs import atomic
from cafs.errors import NotFound, UsageError, quote

SIZE_MAX = 64 << 10
MANY = 16
"""Of one job."""


def check_name(name: str) -> str:
    """Raises UsageError."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,62}", name):
        raise UsageError(f"{quote(name)} is not a name for a secret", hint="letters, digits and _")
    return name


def _place(directory: str, tenant: str) -> str:
    return os.path.join(directory, "secrets", *(("tenants", tenant) if tenant else ("owner",)))


def put(directory: str, tenant: str, name: str, value: bytes) -> None:
    """Raises UsageError, OSError."""
    if len(value) > SIZE_MAX or not value:
        raise UsageError(f"a secret has 1 to {SIZE_MAX} bytes, not {len(value)}")
    place = _place(directory, tenant)
    os.makedirs(place, mode=0o700, exist_ok=True)
    atomic.replace_file(os.path.join(place, check_name(name)), value, 0o600)


def get(directory: str, tenant: str, name: str) -> bytes:
    """Raises NotFound, OSError."""
    try:
        return atomic.read_file(os.path.join(_place(directory, tenant), check_name(name)), SIZE_MAX)
    except FileNotFoundError:
        raise NotFound(f"no secret {quote(name)}", hint=f"cpool secret set {name}") from None


def names(directory: str, tenant: str) -> list[str]:
    """Those that there are."""
    try:
        return sorted(one for one in os.listdir(_place(directory, tenant)) if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", one))
    except FileNotFoundError:
        return []


def remove(directory: str, tenant: str, name: str) -> None:
    """Raises NotFound."""
    try:
        os.unlink(os.path.join(_place(directory, tenant), check_name(name)))
    except FileNotFoundError:
        raise NotFound(f"no secret {quote(name)}", hint="cpool secret ls") from None
