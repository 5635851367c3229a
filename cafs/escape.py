"""The one spelling of a byte string inside a field of an index.  cafs-index(5), ESCAPING.

Space, backslash, C0 and C1 controls, DEL and every byte that a strict UTF-8 decoder rejects are written \\xHH.  Inside the
xattr field ',' and '=' are escaped as well.  Everything else stands for itself.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(rb"[!-\[\]-~]*")
_PLAIN_XATTR = re.compile(rb"[!-+\--<>-\[\]-~]*")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_STRAY = re.compile(rb"\\(?!x[0-9a-f]{2})")


def _escape_char(char: str, extra: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # what surrogateescape makes of a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0x20 or char == "\\" or 0x7F <= code <= 0x9F or char in extra:
        return "".join(f"\\x{byte:02x}" for byte in char.encode())
    return char


def escape(raw: bytes) -> bytes:
    """Spell a path or a symlink target."""
    if _PLAIN.fullmatch(raw):
        return raw
    return "".join(_escape_char(c, "") for c in raw.decode("utf-8", "surrogateescape")).encode()


def escape_xattr(raw: bytes) -> bytes:
    """Spell an xattr's name or value: ',' and '=' separate there, so they are escaped too."""
    if _PLAIN_XATTR.fullmatch(raw):
        return raw
    return "".join(_escape_char(c, ",=") for c in raw.decode("utf-8", "surrogateescape")).encode()


def unescape(text: bytes) -> bytes:
    """The bytes that a spelling stands for.  Raises ValueError on a backslash that begins no \\xHH."""
    if b"\\" not in text:
        return text
    if _STRAY.search(text):
        raise ValueError("backslash without xHH")
    return _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), text)


def is_canonical(text: bytes) -> bool:
    """Whether TEXT is the one spelling of what it stands for."""
    if _PLAIN.fullmatch(text):
        return True
    try:
        return escape(unescape(text)) == text
    except ValueError:
        return False
