"""RUN --mount: a comma-separated list of fields, each from a closed set; nothing of it is ever joined into mount options.

Source: BuildKit's Dockerfile reference, RUN --mount.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly", "rw": "readwrite"}
_KEYS = {
    "bind": {"target", "source", "from", "readonly", "readwrite"},
    "cache": {"id", "target", "readonly", "readwrite", "sharing", "from", "source", "mode", "uid", "gid"},
    "tmpfs": {"target", "size"},
    "secret": {"id", "target", "required", "mode", "uid", "gid", "env"},
    "ssh": {"id", "target", "required", "mode", "uid", "gid"},
}
_SHARING = ("shared", "private", "locked")


@dataclass(frozen=True, slots=True)
class Mount:
    """One of them, with defaults in; target '' where a secret is only a variable."""

    kind: str
    target: str
    source: str = ""
    from_: str = ""
    id: str = ""
    is_readonly: bool = False
    sharing: str = "shared"
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    size: int = 0
    required: bool = False
    env: str = ""


def split_fields(text: str) -> list[tuple[str, str]]:
    """(name, value), names in lower case and without aliases; 'true' where no value is given.  Raises ValueError."""
    try:
        (row,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError):
        raise ValueError(f"--mount '{text}' is not a list of fields") from None
    found = []
    for field in row:
        name, equals, value = field.partition("=")
        name = name.strip().lower()
        found.append((_ALIASES.get(name, name), value if equals else "true"))
    return found


def parse(text: str, absolute: Callable[[str], str], expand: Callable[[str], str]) -> Mount:
    """absolute: makes a target so; expand: variables.  Raises ValueError."""
    fields: dict[str, str] = {}
    for name, value in split_fields(text):
        if name == "from" and "$" in value:
            raise ValueError("no variables in from=: define a stage with FROM and use that")
        fields[name] = expand(value)
    kind = fields.pop("type", "bind")
    if kind not in _KEYS:
        raise ValueError(f"unknown mount type '{kind}'")
    for name in fields:
        if name not in _KEYS[kind]:
            raise ValueError(f"a mount of type {kind} has no '{name}'")
    is_readonly = _bool(fields, "readonly") if "readonly" in fields else kind == "bind" and not _bool(fields, "readwrite")
    target = fields.get("target", "")
    identity = fields.get("id", "")
    if kind == "secret":
        identity = identity or target.rpartition("/")[2]
        if not identity:
            raise ValueError("a secret needs an id or a target")
        target = target or ("" if fields.get("env") else f"/run/secrets/{identity}")
    elif kind == "ssh":
        identity = identity or "default"
    # Without a target a mount is on the working directory, but for secrets and agents, which have places of their own.
    target = absolute(target) if target or kind in ("bind", "cache", "tmpfs") else ""
    if target == "/":
        raise ValueError("a mount cannot be on /")
    sharing = fields.get("sharing", "shared")
    if sharing not in _SHARING:
        raise ValueError(f"sharing is {', '.join(_SHARING)}, not '{sharing}'")
    mode = {"secret": 0o400, "ssh": 0o600}.get(kind, 0o755)
    return Mount(
        kind,
        target,
        source=fields.get("source", ""),
        from_=fields.get("from", ""),
        id=identity or (target if kind == "cache" else ""),
        is_readonly=is_readonly,
        sharing=sharing,
        mode=_number(fields, "mode", mode, 8),
        uid=_number(fields, "uid", 0, 10),
        gid=_number(fields, "gid", 0, 10),
        size=_size(fields.get("size", "0")),
        required=_bool(fields, "required"),
        env=fields.get("env", ""),
    )


def _bool(fields: dict[str, str], name: str) -> bool:
    value = fields.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise ValueError(f"{name} is true or false, not '{value}'")
    return value in ("true", "1")


def _number(fields: dict[str, str], name: str, default: int, base: int) -> int:
    text = fields.get(name)
    if text is None:
        return default
    try:
        found = int(text, base)
    except ValueError:
        found = -1
    if not 0 <= found < 1 << 32 or (base == 8 and found > 0o7777):
        raise ValueError(f"{name}={text} is not a number for it")
    return found


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([bkmgt]?)b?", text.lower())
    if not match:
        raise ValueError(f"size={text} is not a size")
    return int(match[1]) << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]
