"""Errors that a user can cause, and the exit code of each.  Anything else that is raised is a bug.

The codes are a contract with scripts; cafs(7), EXIT STATUS, prints the same table.
"""

from __future__ import annotations

import os

_QUOTED_MAX = 4095
OK, FAILED, USAGE, DIFFERS, NO_SUCH, CORRUPT, BUSY, REMOTE, UNSUPPORTED = range(9)


class CafsError(Exception):
    """A failure to be shown as one line, without a traceback.

    message: lower case, no final period, 'cannot VERB NOUN 'SUBJECT': REASON'.
    hint: what the user can do about it, or None.
    """

    exit_code = FAILED
    kind = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CafsError):
    """The arguments do not make sense together."""

    exit_code = USAGE
    kind = "usage"


class IncompleteError(CafsError):
    """Some of what was asked for is not there any more, or was left out."""

    exit_code = DIFFERS
    kind = "incomplete"


class NotFound(CafsError):
    """A named thing does not exist."""

    exit_code = NO_SUCH
    kind = "not-found"


class CorruptError(CafsError):
    """Stored bytes are not what their name or checksum says."""

    exit_code = CORRUPT
    kind = "corrupt"


class FormatError(CorruptError):
    """Bytes break a numbered reader rule of a format.

    line: 1-based line, or 0 where the format has no lines.  rule: the rule's number in the format's man page.
    """

    kind = "format"

    def __init__(self, message: str, *, line: int = 0, rule: int = 0, hint: str | None = None) -> None:
        where = f"line {line}: " if line else ""
        super().__init__(f"{where}{message}" + (f" (rule {rule})" if rule else ""), hint=hint)
        self.line = line
        self.rule = rule


class BusyError(CafsError):
    """Somebody else holds it; trying again may help."""

    exit_code = BUSY
    kind = "busy"


class RemoteError(CafsError):
    """Another machine, or the network, failed; trying again may help."""

    exit_code = REMOTE
    kind = "remote"


class UnsupportedError(CafsError):
    """A privilege, a kernel feature or a program is missing."""

    exit_code = UNSUPPORTED
    kind = "unsupported"


_KINDS = (CafsError, UsageError, IncompleteError, NotFound, CorruptError, BusyError, RemoteError, UnsupportedError)


def of_code(code: int, message: str, *, hint: str | None = None) -> CafsError:
    """What another process has said of an error, as the error that it was there."""
    found = next((kind for kind in _KINDS if kind.exit_code == code), CafsError)(message, hint=hint)
    found.exit_code = code
    return found


def os_error(what: str, error: OSError, *, hint: str | None = None) -> CafsError:
    """Say an OSError as 'WHAT: REASON', with the exit code that fits its errno."""
    kind: type[CafsError] = NotFound if isinstance(error, FileNotFoundError) else CafsError
    return kind(f"{what}: {error.strerror or error}", hint=hint)


def describe(error: OSError) -> str:
    """An OSError that nobody gave a noun, in our form."""
    name = error.filename if isinstance(error.filename, (str, bytes)) else None
    return f"cannot use '{os.fsdecode(name)}': {error.strerror or error}" if name else str(error.strerror or error)


def quote(name: str | bytes) -> str:
    """Put a name into single quotes for a message, control bytes and undecodable bytes as \\xHH; cut if no path is so long."""
    more = "..." if len(name) > _QUOTED_MAX else ""
    text = name[:_QUOTED_MAX].decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name[:_QUOTED_MAX]
    return "'" + "".join(_visible(c) for c in text) + more + "'"


def _visible(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 32 or 127 <= code < 160:
        return f"\\x{code:02x}"
    return char
