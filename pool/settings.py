"""pool.toml: what a pool is to be.  Errors say in which line."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass

from cafs import atomic
from cafs.errors import FormatError, quote

_MAX = 1 << 20
COMMENTED = """\
# What this pool is to be; cpool(1).  All of it may be left out.

[pool]
# store = "s3://bucket/store"       # where images are, as the workers see it (default: this machine's)
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """store: as of --store, '' for this machine's."""

    store: str = ""


_KNOWN = {"pool": {"store": str}}


def read(directory: str) -> Settings:
    """Raises FormatError, naming the line."""
    path = os.path.join(directory, "pool.toml")
    try:
        text = atomic.read_file(path, _MAX).decode()
    except FileNotFoundError:
        return Settings()
    except UnicodeDecodeError:
        raise FormatError(f"{quote(path)} is not UTF-8") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line ([0-9]+)", str(error))
        raise FormatError(f"{path}:{line[1] if line else '?'}: {str(error).partition(' (')[0]}") from None
    for section, values in found.items():
        known = _KNOWN.get(section)
        if known is None or not isinstance(values, dict):
            raise FormatError(f"{path}:{_line_of(text, section)}: there is no {quote(section)}")
        for name, value in values.items():
            if name not in known:
                raise FormatError(f"{path}:{_line_of(text, name)}: [{section}] has no {quote(name)}")
            if not isinstance(value, known[name]):
                raise FormatError(f"{path}:{_line_of(text, name)}: {name} is not a {known[name].__name__}")
    return Settings(**found.get("pool", {}))


def _line_of(text: str, word: str) -> int:
    pattern = re.compile(rf"^\s*\[?\s*{re.escape(word)}\b")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)
