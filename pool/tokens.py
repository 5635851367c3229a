"""Who may call functions over HTTP: tokens, of which a digest is kept, a line each.

A line is the label, the tenant (- for the owner) and the SHA-256 of the token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cafs import atomic
from cafs.errors import BusyError, NotFound, UsageError, os_error, quote
from pool import settings
from pool.tenants import OWNER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX = 1 << 20
_NOBODY = "-"


@dataclass(frozen=True, slots=True)
class Token:
    """digest: SHA-256 of it, in hexadecimal."""

    label: str
    tenant: str
    digest: str


def _path(directory: str) -> str:
    return os.path.join(directory, "tokens")


def read(directory: str) -> list[Token]:
    """Of a pool.  Raises CafsError."""
    try:
        lines = atomic.read_file(_path(directory), _MAX).decode("ascii", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise os_error(f"cannot read {quote(_path(directory))}", error) from error
    rows = [line.split() for line in lines]
    return [Token(row[0], OWNER if row[1] == _NOBODY else row[1], row[2]) for row in rows if len(row) == 3]


def _write(directory: str, tokens: list[Token]) -> None:
    text = "".join(f"{one.label} {one.tenant or _NOBODY} {one.digest}\n" for one in tokens)
    try:
        atomic.replace_file(_path(directory), text.encode(), 0o600)
    except OSError as error:
        raise os_error(f"cannot write {quote(_path(directory))}", error) from error


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(atomic.locked(directory))
        except OSError as error:
            raise os_error(f"cannot use {quote(directory)}", error) from error
        yield


def add(directory: str, label: str, tenant: str) -> str:
    """A new one; it is seen here and never again.  Raises CafsError."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", label):
        raise UsageError(f"{quote(label)} is not a label for a token")
    if tenant and tenant not in settings.read(directory).tenants:
        raise NotFound(f"no tenant {quote(tenant)}", hint="[tenants.NAME] in pool.toml")
    token = secrets.token_urlsafe(32)
    with _locked(directory):
        known = read(directory)
        if any(one.label == label for one in known):
            raise BusyError(f"there is a token {quote(label)}", hint=f"cpool fn token rm {label}")
        _write(directory, [*known, Token(label, tenant, _digest(token))])
    return token


def remove(directory: str, label: str) -> None:
    """Raises NotFound."""
    with _locked(directory):
        known = read(directory)
        if not any(one.label == label for one in known):
            raise NotFound(f"no token {quote(label)}", hint="cpool fn token ls")
        _write(directory, [one for one in known if one.label != label])


def tenant_of(tokens: list[Token], given: str) -> str | None:
    """Whose it is; None: nobody's.  As long for each, whatever it is."""
    digest, found = _digest(given), None
    for one in tokens:
        if hmac.compare_digest(one.digest, digest):
            found = one.tenant
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
