"""A scope: a part of a store that only those find who have its secret, and whose names only they can make.

cafs-store(5), SCOPES; what it does not protect: cafs(7), SECURITY.  An address ending in '#scope=FILE' means one.
Source of the construction: HMAC, RFC 2104, with SHA-256.
"""

from __future__ import annotations

import os
import stat

from cafs.errors import CafsError, UsageError, os_error, quote

_MARK = "#scope="
_SECRET_MIN, _SECRET_MAX = 16, 4096


class Scope:
    """id: 32 hexadecimal digits, where in a store the scope is."""

    __slots__ = ("_key", "id")

    def __init__(self, secret: bytes) -> None:
        import hmac

        self.id = hmac.digest(secret, b"cafs scope 1 id", "sha256").hex()[:32]
        self._key = hmac.digest(secret, b"cafs scope 1 names", "sha256")

    def name(self, digest: bytes) -> bytes:
        """What stands in this scope for a digest; of the same size."""
        import hmac

        return hmac.digest(self._key, digest, "sha256")[: len(digest)]

    def address(self, url: str) -> str:
        """Where the scope is in the store at URL."""
        base, mark, query = url.partition("?") if url.startswith("s3://") else (url, "", "")
        return f"{base.rstrip('/')}/scopes/{self.id}{mark}{query}"


def split(address: str) -> tuple[str, str]:
    """(address of the store, secret file or '').  Raises UsageError if a scope is meant and no file is named."""
    url, mark, path = address.partition(_MARK)
    if mark and not path:
        raise UsageError("a scope is named without a secret file", hint="an unset variable?")
    return url, path


def join(url: str, path: str) -> str:
    """The address of a scope.  Raises UsageError if URL names one already."""
    if _MARK in url:
        raise UsageError("two scopes are named", hint=f"leave out --scope, or {quote(_MARK + split(url)[1])}")
    return url + _MARK + path


def read(path: str) -> Scope:
    """The scope of a secret file: 16 to 4096 bytes; a line end at the end does not count.  Raises CafsError."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_SECRET_MAX + 1)
    except OSError as error:
        raise os_error(f"cannot read secret {quote(path)}", error) from error
    if stat.S_ISREG(mode) and mode & 0o007:
        raise CafsError(f"secret {quote(path)} can be read by everybody", hint=f"chmod o= {path}")
    secret = secret.rstrip(b"\r\n")
    if not _SECRET_MIN <= len(secret) <= _SECRET_MAX:
        raise CafsError(
            f"secret {quote(path)} is not of {_SECRET_MIN} to {_SECRET_MAX} bytes", hint="head -c 32 /dev/urandom | base64"
        )
    return Scope(secret)
