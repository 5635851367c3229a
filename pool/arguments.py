"""The arguments of cpool map, from standard input or after :::, and the commands made of them; as GNU parallel has it."""

from __future__ import annotations

import itertools
import os
import re
import select
from collections import deque

from cafs import stopping
from cafs.errors import UsageError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

_FORMS = re.compile(r"\{(?:|\.|/|//|/\.|#|[1-9][0-9]{0,3})\}")
GIVEN, FROM_FILE = ":::", "::::"


def filled(word: str, arguments: list[str], number: int) -> str:
    """With what {} and its like are."""

    def put(match: re.Match[str]) -> str:
        inner = match[0][1:-1]
        if inner == "#":
            return str(number)
        if inner.isdigit():
            return arguments[int(inner) - 1] if int(inner) <= len(arguments) else ""
        return " ".join(_form(inner, one) for one in arguments)

    return _FORMS.sub(put, word)


def expand(template: list[str], arguments: list[str], number: int) -> list[str]:
    """The command for some arguments; they come last if nothing names them."""
    if not any(_FORMS.search(word) for word in template):
        return [*template, *arguments]
    found = []
    for word in template:
        if word == "{}":
            found += arguments
        else:
            found.append(filled(word, arguments, number))
    return found


def _form(kind: str, argument: str) -> str:
    if kind == ".":
        return os.path.splitext(argument)[0]
    if kind == "/":
        return os.path.basename(argument)
    if kind == "//":
        return os.path.dirname(argument) or "."
    if kind == "/.":
        return os.path.splitext(os.path.basename(argument))[0]
    return argument


class Arguments:
    """Groups of SIZE arguments that come on a file, as they come."""

    def __init__(self, source: BinaryIO, separator: bytes, size: int) -> None:
        self.source = source
        self._separator, self._size = separator, size
        self._groups: deque[list[str]] = deque()
        self._group: list[str] = []
        self._rest, self._is_over = b"", False

    def __iter__(self) -> Arguments:
        return self

    def __next__(self) -> list[str]:
        while not self._groups and not self._is_over:
            self._read()
        if not self._groups:
            raise StopIteration
        return self._groups.popleft()

    def _read(self) -> None:
        try:
            stopping.wait(self.source)
        except (OSError, ValueError):
            pass  # it is no file
        data = self.source.read1(1 << 16) if hasattr(self.source, "read1") else self.source.read(1 << 16)
        *words, self._rest = (self._rest + data).split(self._separator)
        if not data:
            self._is_over = True
            words += [self._rest] if self._rest else []
        for word in words:
            self._group.append(os.fsdecode(word))
            if len(self._group) == self._size:
                self._groups.append(self._group)
                self._group = []
        if self._is_over and self._group:
            self._groups.append(self._group)

    def is_at_hand(self) -> bool:
        """Whether one more, or the end, comes without waiting."""
        if self._groups or self._is_over:
            return True
        try:
            return bool(select.select([self.source], [], [], 0)[0])
        except (OSError, ValueError):
            return True


def given(words: list[str]) -> tuple[list[str], Iterator[list[str]] | None]:
    """(the command, what comes after ::: and ::::, every combination of all of them; None without).  Raises CafsError."""
    starts = [at for at, word in enumerate(words) if word in (GIVEN, FROM_FILE)]
    if not starts:
        return words, None
    lists = []
    for at, end in zip(starts, [*starts[1:], len(words)], strict=True):
        values = words[at + 1 : end]
        lists.append(values if words[at] == GIVEN else list(itertools.chain.from_iterable(map(_lines, values))))
    return words[: starts[0]], map(list, itertools.product(*lists))


def _lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            return [os.fsdecode(line.rstrip(b"\n")) for line in file]
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error


def in_groups(values: Iterable[list[str]], size: int) -> Iterator[list[str]]:
    """SIZE arguments at once, if there is one list of them.  Raises UsageError."""
    group: list[str] = []
    for one in values:
        if len(one) != 1 and size > 1:
            raise UsageError("-n goes with one list of arguments")
        group += one
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group
