"""Numbers in the header of a tar member."""

from __future__ import annotations

import re
from functools import lru_cache

SIZE_MAX = (1 << 63) - 1
"""Largest size of a file in bytes."""

_OCTAL = re.compile(rb"[0-7]+")


@lru_cache(4096)
def parse_number(field: bytes) -> int | None:
    """Octal text, or base-256 if the first bit is set (GNU); None if it is neither."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            number -= 1 << (8 * len(field) - 1)
        return number if -SIZE_MAX <= number <= SIZE_MAX else None
    text = field.strip(b" \0").partition(b"\0")[0].strip(b" ")
    if not text:
        return 0
    return int(text, 8) if _OCTAL.fullmatch(text) else None
