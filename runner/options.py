"""The flags of `crun run`: one table, and a parser that loads nothing.  Spelled as docker spells them."""

from __future__ import annotations

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SWITCH, VALUE, LIST = "switch", "value", "list"

FLAGS = {
    "env": (LIST, "e", "K[=V]", "Set a variable; K alone takes the caller's."),
    "env-file": (LIST, "", "FILE", "Read variables from FILE, K=V a line."),
    "workdir": (VALUE, "w", "DIR", "Working directory."),
    "user": (VALUE, "u", "USER[:GROUP]", "User (name or id)."),
    "volume": (LIST, "v", "SRC:DST[:ro]", "Bind-mount a host path."),
    "rm": (SWITCH, "", "", "Accepted; nothing is kept in any case."),
    "name": (VALUE, "", "NAME", "Name of the container."),
    "hostname": (VALUE, "h", "NAME", "Host name (default: the container's id)."),
    "read-only": (SWITCH, "", "", "No writable layer for the command."),
    "entrypoint": (VALUE, "", "CMD", "Replace the image's entrypoint."),
    "network": (VALUE, "", "none|host", "Network (default: none)."),
    "interactive": (SWITCH, "i", "", "Pass standard input."),
    "tty": (SWITCH, "t", "", "Give the command a terminal."),
    "record": (VALUE, "", "FILE", "Write what is read of the image to FILE."),
    "store": (VALUE, "", "URL", "Store to use."),
    "scope": (VALUE, "", "SECRETFILE", "Only that part of the store."),
}
ALIASES = {"net": "network"}


class Options:
    """Parsed flags.  image: IMAGE; command: what follows it, untouched."""

    __slots__ = ("command", "flags", "image")

    def __init__(self, flags: dict[str, list[str]], image: str, command: list[str]) -> None:
        self.flags = flags
        self.image = image
        self.command = command

    def has(self, name: str) -> bool:
        """Whether a switch was given, and not as --NAME=false."""
        return self.flags.get(name, ["false"])[-1] != "false"

    def value(self, name: str) -> str | None:
        """The last value given, or None."""
        return self.flags[name][-1] if name in self.flags else None

    def all(self, name: str) -> list[str]:
        """Every value given, in order."""
        return self.flags.get(name, [])


def parse(arguments: list[str]) -> Options:
    """Flags up to IMAGE; what follows is the command's.  Raises UsageError."""
    flags: dict[str, list[str]] = {}
    left = iter(arguments)
    for word in left:
        if word == "--":
            word = next(left, "")
        elif word.startswith("--"):
            _long(word[2:], left, flags)
            continue
        elif word.startswith("-") and word != "-":
            _short(word[1:], left, flags)
            continue
        if not word:
            break
        return Options(flags, word, list(left))
    raise UsageError("IMAGE is missing", hint="crun run [FLAG]... IMAGE [COMMAND [ARGUMENT]...]")


def _long(word: str, left: Iterator[str], flags: dict[str, list[str]]) -> None:
    name, equals, value = word.partition("=")
    name = ALIASES.get(name, name)
    if name not in FLAGS:
        raise UsageError(f"unknown flag {quote('--' + name)}", hint=_nearest(name))
    if FLAGS[name][0] == SWITCH:
        if equals and value not in ("true", "false"):
            raise UsageError(f"flag '--{name}' is true or false, not {quote(value)}")
        value = value or "true"
    elif not equals:
        value = _next(left, f"--{name}")
    flags.setdefault(name, []).append(value)


def _short(letters: str, left: Iterator[str], flags: dict[str, list[str]]) -> None:
    by_letter = {flag[1]: name for name, flag in FLAGS.items() if flag[1]}
    for at, letter in enumerate(letters):
        if letter not in by_letter:
            raise UsageError(f"unknown flag {quote('-' + letter)}", hint="crun run --help")
        name = by_letter[letter]
        if FLAGS[name][0] == SWITCH:
            flags.setdefault(name, []).append("true")
            continue
        rest = letters[at + 1 :].removeprefix("=")
        flags.setdefault(name, []).append(rest or _next(left, f"-{letter}"))
        return


def _next(left: Iterator[str], flag: str) -> str:
    value = next(left, None)
    if value is None:
        raise UsageError(f"flag {quote(flag)} needs a value")
    return value


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, FLAGS, 1, 0.5)
    return f"did you mean --{near[0]}?" if near else "crun run --help"
