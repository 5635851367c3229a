"""Flags of instructions: --name=value, from a closed list each; and values that several share."""

from __future__ import annotations

import difflib
import re

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VALUE, LIST, BOOL = "value", "list", "bool"

ALLOWED: dict[str, dict[str, str]] = {
    "add": {
        "chown": VALUE, "chmod": VALUE, "checksum": VALUE, "link": BOOL, "keep-git-dir": BOOL, "exclude": LIST, "unpack": BOOL,
    },
    "copy": {"from": VALUE, "chown": VALUE, "chmod": VALUE, "link": BOOL, "parents": BOOL, "exclude": LIST},
    "from": {"platform": VALUE},
    "healthcheck": {
        "interval": VALUE, "timeout": VALUE, "start-period": VALUE, "start-interval": VALUE, "retries": VALUE,
    },
    "run": {"mount": LIST, "network": VALUE, "security": VALUE, "device": LIST},
}  # fmt: skip

Flags = dict[str, list[str]]


def parse(keyword: str, words: Sequence[str]) -> Flags:
    """name -> values.  Raises ValueError for what the instruction does not have, or has twice."""
    allowed, found = ALLOWED.get(keyword, {}), Flags()
    for word in words:
        name, equals, value = word[2:].partition("=")
        kind = allowed.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, allowed, 1, 0.5)
            raise ValueError(f"unknown flag '--{name}'" + (f" (did you mean --{near[0]}?)" if near else ""))
        if name in found and kind != LIST:
            raise ValueError(f"--{name} is given twice")
        if kind == BOOL:
            value = value.lower() if equals else "true"
            if value not in ("true", "false", "1", "0", "t", "f"):
                raise ValueError(f"--{name} is true or false, not '{value}'")
            value = "true" if value in ("true", "1", "t") else "false"
        elif not equals:
            raise ValueError(f"--{name} needs a value")
        found.setdefault(name, []).append(value)
    return found


def one(flags: Flags, name: str) -> str | None:
    """The value of a flag."""
    return flags[name][-1] if name in flags else None


def truth(name: str, text: str) -> bool:
    """A value of a switch, as Go's strconv.ParseBool.  Raises UsageError."""
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise UsageError(f"{name} is true or false, not {quote(text)}")
    return text.lower() in ("true", "1", "t")


def is_on(flags: Flags, name: str) -> bool:
    """Whether a switch is."""
    return one(flags, name) == "true"


def mode_of(text: str) -> Callable[[int, bool], int]:
    """--chmod: (mode, whether it is a directory) -> mode; octal, or as chmod(1) has it.  Raises ValueError."""
    if re.fullmatch("[0-7]{1,5}", text) and int(text, 8) <= 0o7777:
        number = int(text, 8)
        return lambda mode, is_directory: number
    clauses = [_clause(clause) for clause in text.split(",")]

    def change(mode: int, is_directory: bool) -> int:
        for clause in clauses:
            mode = clause(mode, is_directory)
        return mode

    return change


def _clause(text: str) -> Callable[[int, bool], int]:
    match = re.fullmatch(r"([ugoa]*)((?:[-+=](?:[rwxXst]*|[ugo]))+)", text)
    if not match:
        raise ValueError(f"'{text}' is not a mode")
    who = "ugo" if not match[1] or "a" in match[1] else match[1]
    steps = re.findall(r"([-+=])([rwxXst]+|[ugo]?)", match[2])

    def change(mode: int, is_directory: bool) -> int:
        for operator, letters in steps:
            bits, special = 0, 0
            if letters in ("u", "g", "o"):
                bits = mode >> {"u": 6, "g": 3, "o": 0}[letters] & 7
            else:
                bits |= 4 * ("r" in letters) | 2 * ("w" in letters)
                bits |= "x" in letters or ("X" in letters and (is_directory or bool(mode & 0o111)))
                special |= 0o4000 * ("s" in letters and "u" in who) | 0o2000 * ("s" in letters and "g" in who)
                special |= 0o1000 * ("t" in letters)
            shifts = [{"u": 6, "g": 3, "o": 0}[one] for one in who]
            wanted = sum(bits << shift for shift in set(shifts)) | special
            if operator == "+":
                mode |= wanted
            elif operator == "-":
                mode &= ~wanted
            else:
                mode = mode & ~sum(7 << shift for shift in set(shifts)) | wanted
        return mode

    return change


_UNITS_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def duration_ns(text: str, name: str) -> int:
    """1m30s as Go has it.  Raises ValueError."""
    if text == "0":
        return 0
    parts = re.findall(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise ValueError(f"--{name}: '{text}' is not a time like 1m30s")
    found = sum(int(float(number) * _UNITS_NS[unit]) for number, unit in parts)
    if 0 < found < 10**6:
        raise ValueError(f"--{name} is less than a millisecond")
    return found
