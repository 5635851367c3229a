"""A parser of flags that loads nothing: docker's and podman's way of spelling them, from one table a verb."""

from __future__ import annotations

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    Flag = tuple[str, str, str, str, str]  # kind, letter, placeholder of the value, group in --help, text
    Flags = dict[str, Flag]

SWITCH, VALUE, LIST = "switch", "value", "list"


class Options:
    """Parsed flags.  words: what is no flag; of `run`, IMAGE and then the command's arguments, untouched."""

    __slots__ = ("flags", "words")

    def __init__(self, flags: dict[str, list[str]], words: list[str]) -> None:
        self.flags = flags
        self.words = words

    def has(self, name: str) -> bool:
        """Whether a switch was given, and not as --NAME=false."""
        return self.flags.get(name, ["false"])[-1] != "false"

    def value(self, name: str) -> str | None:
        """The last value given, or None."""
        return self.flags[name][-1] if name in self.flags else None

    def all(self, name: str) -> list[str]:
        """Every value given, in order."""
        return self.flags.get(name, [])

    def settle_empty(self, *, default: Container[str] = (), kept: Container[str] = ()) -> None:
        """Refuse empty values: an unset variable would turn off what was asked for.  Raises UsageError.

        default: flags with one value for which '' means that they were not given.  kept: flags whose '' means something.
        """
        for name in [name for name, values in self.flags.items() if "" in values and name not in kept]:
            if name not in default:
                raise UsageError(f"--{name} is empty", hint="an unset variable?")
            if not self.flags[name][-1]:
                del self.flags[name]


def parse(arguments: list[str], flags: Flags, aliases: dict[str, str], *, program: str, stop_at: int = 0) -> Options:
    """Split flags from words.  Raises UsageError.

    program: for hints.  stop_at: after so many words all that follows is words too; 0: never.
    """
    found: dict[str, list[str]] = {}
    words: list[str] = []
    left = iter(arguments)
    for word in left:
        if word == "--":
            words += left
        elif word.startswith("--"):
            _long(word[2:], left, found, flags, aliases, program)
        elif word.startswith("-") and word != "-":
            _short(word[1:], left, found, flags, program)
        else:
            words.append(word)
        if stop_at and len(words) >= stop_at:
            words += left
    return Options(found, words)


def _long(
    word: str, left: Iterator[str], found: dict[str, list[str]], flags: Flags, aliases: dict[str, str], program: str
) -> None:
    name, equals, value = word.partition("=")
    name = aliases.get(name, name)
    if name not in flags:
        raise UsageError(f"unknown flag {quote('--' + name)}", hint=_nearest(name, flags, program))
    if flags[name][0] == SWITCH:
        value = _truth(f"--{name}", value) if equals else "true"
    elif not equals:
        value = _next(left, f"--{name}")
    found.setdefault(name, []).append(value)


def _short(letters: str, left: Iterator[str], found: dict[str, list[str]], flags: Flags, program: str) -> None:
    by_letter = {flag[1]: name for name, flag in flags.items() if flag[1]}
    for at, letter in enumerate(letters):
        if letter not in by_letter:
            raise UsageError(f"unknown flag {quote('-' + letter)}", hint=f"{program} --help")
        name = by_letter[letter]
        if flags[name][0] == SWITCH:
            is_given = letters[at + 1 : at + 2] == "="
            found.setdefault(name, []).append(_truth(f"-{letter}", letters[at + 2 :]) if is_given else "true")
            if is_given:
                return
            continue
        rest = letters[at + 1 :].removeprefix("=")
        found.setdefault(name, []).append(rest or _next(left, f"-{letter}"))
        return


def _truth(flag: str, value: str) -> str:
    if value.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise UsageError(f"flag '{flag}' is true or false, not {quote(value)}")
    return "true" if value.lower() in ("true", "1", "t") else "false"


def _next(left: Iterator[str], flag: str) -> str:
    value = next(left, None)
    if value is None:
        raise UsageError(f"flag {quote(flag)} needs a value")
    return value


def _nearest(name: str, flags: Flags, program: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, flags, 1, 0.5)
    return f"did you mean --{near[0]}?" if near else f"{program} --help"


def usage(flags: Flags) -> str:
    """The rows of --help, by group, for a terminal of 80 columns."""
    groups: dict[str, list[str]] = {}
    for name, (_, letter, value, group, text) in flags.items():
        flag = f"  {'-' + letter + ',' if letter else '   '} --{name} {value}".rstrip()
        groups.setdefault(group, []).append(row(flag, text, 32))
    return "\n\n".join(f"{group}:\n" + "\n".join(rows) for group, rows in groups.items())


def row(head: str, text: str, width: int) -> str:
    """HEAD and, from column WIDTH on, TEXT."""
    import textwrap

    lines = textwrap.wrap(text, 79 - width)
    first = head.ljust(width) + lines.pop(0) if len(head) < width else head
    return "\n".join([first, *(" " * width + line for line in lines)])
