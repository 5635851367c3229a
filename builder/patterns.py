"""Patterns: Go's filepath.Match for sources of COPY, and those of .dockerignore, in which the last match wins.

Sources: path/filepath.Match of Go; github.com/moby/patternmatcher (MatchesOrParentMatches).
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_WILD = re.compile(r"[*?\[]")


class PatternError(ValueError):
    """A pattern that is none."""


def has_wildcard(text: str) -> bool:
    """Whether a source of COPY has to be matched."""
    return bool(_WILD.search(re.sub(r"\\.", "", text)))


def glob(pattern: str) -> re.Pattern[str]:
    """For one component of a path, as `os_text` has it: *, ?, [a-z], [^a-z] and \\ before a character.  Raises PatternError."""
    return re.compile(_segments(pattern, "[^/]", deep=False), re.DOTALL)


def os_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def os_text(name: bytes) -> str:
    """A name in characters, as Go matches them; a byte that is none of UTF-8 counts as one."""
    return name.decode("utf-8", "surrogateescape")


def _segments(pattern: str, one: str, *, deep: bool) -> str:
    parts, at = [], 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if deep and char == "*" and pattern.startswith("*", at):
            at += 1
            if pattern.startswith("/", at):
                at += 1
                parts.append("(?:.*/)?")
            else:
                parts.append(".*")
        elif char == "*":
            parts.append(f"{one}*")
        elif char == "?":
            parts.append(one)
        elif char == "\\":
            if at == len(pattern):
                raise PatternError(f"'{pattern}' ends in an escape")
            parts.append(re.escape(pattern[at]))
            at += 1
        elif char == "[":
            end = _class_end(pattern, at)
            parts.append(_class(pattern[at:end], pattern))
            at = end + 1
        else:
            parts.append(re.escape(char))
    return "".join(parts)


def _class_end(pattern: str, at: int) -> int:
    start = at + 1 if pattern.startswith("^", at) else at
    at = start
    while at < len(pattern):
        if pattern[at] == "]" and at > start:
            return at
        at += 2 if pattern[at] == "\\" else 1
    raise PatternError(f"'{pattern}' has a [ without its ]")


def _class(inner: str, pattern: str) -> str:
    negated = inner.startswith("^")
    body = re.sub(r"\\(.)|([\[\]&~|^])", lambda match: re.escape(match[1] or match[2]), inner[negated:])
    try:
        re.compile(f"[{'^' * negated}{body}]")
    except re.error:
        raise PatternError(f"'{pattern}' has a class of characters that is none") from None
    return f"(?!/)[{'^' * negated}{body}]"


@dataclass(frozen=True, slots=True)
class _Rule:
    regex: re.Pattern[str]
    is_exception: bool
    prefix: bytes
    """What is literal at its beginning: an exception may be in a directory that begins so."""


class Ignore:
    """The rules of a .dockerignore, or of --exclude.  Paths are relative to the top, without a slash before them."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Raises PatternError."""
        self._rules = [rule for line in lines if (rule := _rule(line))]
        self._exceptions = [rule for rule in self._rules if rule.is_exception]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def matches(self, path: bytes) -> bool:
        """Whether a path is left out: the last rule decides that matches it, or a directory above it."""
        parts = os_text(path).split("/")
        above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        found = False
        for rule in self._rules:
            if rule.is_exception == found and any(rule.regex.fullmatch(one) for one in above):
                found = not rule.is_exception
        return found

    def may_hold_exceptions(self, path: bytes) -> bool:
        """Whether something below a path that is left out may not be."""
        top = path + b"/"
        return any(rule.prefix.startswith(top) or top.startswith(rule.prefix) for rule in self._exceptions)


def _rule(line: str) -> _Rule | None:
    text = line.strip()
    is_exception = text.startswith("!")
    if is_exception:
        text = text[1:].strip()
        if not text:
            raise PatternError("a lone '!'")
    if not text:
        return None
    text = posixpath.normpath(text).lstrip("/")
    if text in ("", "."):
        return None
    literal = re.match(r"[^*?\[\\]*", text)
    prefix = literal[0] if literal else ""
    return _Rule(re.compile(_segments(text, "[^/]", deep=True), re.DOTALL), is_exception, os_bytes(prefix))


def read_ignore(data: bytes) -> Ignore:
    """A .dockerignore file.  Raises PatternError."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    return Ignore(line for line in text.split("\n") if not line.startswith("#"))
