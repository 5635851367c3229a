"""pool.toml: what a pool is to be.  Errors say in which line."""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import dataclass, field

from cafs import atomic
from cafs.errors import FormatError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.scaling import Policy

_MAX = 1 << 20
COMMENTED = """\
# What this pool is to be; cpool(1).  All of it may be left out.

[pool]
# store = "s3://bucket/store"       # where images are, as the workers see it (default: this machine's)

# For cpool simulate; nothing is launched yet.
# [[machines]]
# name = "m7i.xlarge"
# cpus = 4
# memory = 16000000000
# price = 0.2016                    # an hour

# [scaling]
# launch_s = 40                     # from the call to the first job
# idle_s = 60                       # how long an empty machine stays
# least_cpus = 0                    # spare capacity: at least so much,
# share = 0.0                       # this share of what runs,
# quantile = 0.0                    # and what came within one launch time, on this share of occasions
# machines = 10                     # at most
# price = 5.0                       # an hour, at most
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """store: as of --store, '' for this machine's."""

    store: str = ""
    machines: tuple[dict[str, Any], ...] = ()
    scaling: dict[str, float] = field(default_factory=dict)

    def policy(self) -> Policy:
        """For pool.scaling.  Without kinds of machines: of 16 processors, free of charge."""
        from pool.scaling import Kind, Policy

        kinds = tuple(Kind(**one) for one in self.machines) or (Kind("machine", 16.0),)
        found: dict[str, Any] = {"launch_s": 40.0, "machines": 10, **self.scaling}
        found["machines"] = int(found["machines"])
        found["launch_s"] = max(found["launch_s"], 1.0)  # what was asked for is counted in windows of it
        return Policy(kinds, **found)


_NUMBERS = ("launch_s", "idle_s", "least_cpus", "share", "quantile", "machines", "price")
_KNOWN: dict[str, dict[str, type]] = {
    "pool": {"store": str},
    "machines": {"name": str, "cpus": float, "memory": int, "gpus": int, "price": float},
    "scaling": dict.fromkeys(_NUMBERS, float),
}


def read(directory: str) -> Settings:
    """Of a pool.  Raises FormatError, naming the line."""
    path = os.path.join(directory, "pool.toml")
    return read_file(path) if os.path.exists(path) else Settings()


def read_file(path: str) -> Settings:
    """Raises FormatError, naming the line, OSError as CafsError."""
    try:
        text = atomic.read_file(path, _MAX).decode()
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    except UnicodeDecodeError:
        raise FormatError(f"{quote(path)} is not UTF-8") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line ([0-9]+)", str(error))
        raise FormatError(f"{path}:{line[1] if line else '?'}: {str(error).partition(' (')[0]}") from None
    for section, values in found.items():
        tables = values if section == "machines" and isinstance(values, list) else [values]
        if section not in _KNOWN or not all(isinstance(one, dict) for one in tables):
            raise FormatError(f"{path}:{_line_of(text, section)}: there is no {quote(section)}")
        for table in tables:
            _check(path, text, section, table)
    return Settings(found.get("pool", {}).get("store", ""), tuple(found.get("machines", [])), found.get("scaling", {}))


def _check(path: str, text: str, section: str, table: dict[str, Any]) -> None:
    known = _KNOWN[section]
    for name, value in table.items():
        where = f"{path}:{_line_of(text, name)}"
        if name not in known:
            raise FormatError(f"{where}: [{section}] has no {quote(name)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not isinstance(value, str) if known[name] is str else not is_number or (known[name] is int and value != int(value)):
            raise FormatError(f"{where}: {name} is not a {'text' if known[name] is str else 'number'}")
    if section == "machines" and not (table.get("name") and table.get("cpus")):
        raise FormatError(f"{path}:{_line_of(text, section)}: a kind of machine has a name and cpus")


def _line_of(text: str, word: str) -> int:
    pattern = re.compile(rf"^\s*\[?\s*{re.escape(word)}\b")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)
