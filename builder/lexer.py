"""A Dockerfile as a list of instructions, not yet understood: lines, continuations, flags, heredocs, JSON forms.

As BuildKit's parser has it, whose test data is a referee.  Text is UTF-8 with surrogateescape, so that what is not comes back.
dockerfile-parse, the library for this, knows no heredocs and may lose the last line, so nothing here rests on it.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from builder.arguments import ARGUMENTS, partition, split_flags, split_raw, strings
from builder.errors import DockerfileError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FILE_MAX = 16 << 20
HEREDOC = re.compile(r"(\d*)<<(-?)\s*([^<]*)")
_MARK = re.compile(r"\d*<<-?")
_DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*")
_DIRECTIVES = ("syntax", "escape", "check")
_WITH_HEREDOCS = ("run", "copy", "add")


@dataclass(frozen=True, slots=True)
class Heredoc:
    """name: its delimiter.  is_raw: it was quoted, so nothing in it is expanded.  strips_tabs: <<-."""

    name: str
    content: str
    is_raw: bool
    strips_tabs: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """keyword: in lower case.  rest: what follows flags.  words: the arguments as the parser splits them.

    is_json: words are those of a JSON array.  lines: first and last, from 1.  separators: of ENV and LABEL, '=' or '' a pair.
    """

    keyword: str
    rest: str
    flags: tuple[str, ...]
    words: tuple[str, ...]
    is_json: bool
    lines: tuple[int, int]
    heredocs: tuple[Heredoc, ...] = ()
    separators: tuple[str, ...] = ()
    trigger: Instruction | None = None
    original: str = ""


@dataclass(slots=True)
class Dockerfile:
    """name: for messages.  escape: its escape character.  directives: the others, by name.  warnings: (line, text)."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    escape: str = "\\"
    directives: dict[str, str] = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)


def parse(data: bytes, name: str = "Dockerfile") -> Dockerfile:
    """Raises DockerfileError."""
    return _Parser(data, name).run()


class _Parser:
    def __init__(self, data: bytes, name: str) -> None:
        if len(data) > FILE_MAX:
            raise DockerfileError(name, 1, f"larger than {FILE_MAX >> 20} MiB")
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
        self._lines = text.split("\n")
        if not self._lines[-1]:
            self._lines.pop()
        self._at = 0
        self._result = Dockerfile(name)

    def run(self) -> Dockerfile:
        self._read_directives()
        while self._at < len(self._lines):
            start = self._at + 1
            line = self._whole_line()
            if line:
                self._result.instructions.append(self._instruction(line, start))
        if not self._result.instructions:
            raise DockerfileError(self._result.name, 1, "a Dockerfile without instructions")
        return self._result

    def _error(self, line: int, message: str, hint: str | None = None) -> DockerfileError:
        return DockerfileError(self._result.name, line, message, text=self._lines[line - 1], hint=hint)

    def _read_directives(self) -> None:
        """Lines '# key=value' at the very top, until one is no known directive; they stay comments all the same."""
        if self._lines and self._lines[0].startswith("#!"):
            self._at = 1
        seen = set()
        for number in range(self._at, len(self._lines)):
            match = _DIRECTIVE.fullmatch(self._lines[number].strip())
            name = match[1].lower() if match else ""
            if match is None or name not in _DIRECTIVES:
                break
            if name in seen:
                raise self._error(number + 1, f"only one {name} directive can be used")
            seen.add(name)
            if name == "escape":
                if match[2] not in ("\\", "`"):
                    raise self._error(number + 1, f"invalid escape character '{match[2]}': \\ or `")
                self._result.escape = match[2]
            else:
                self._result.directives[name] = match[2]
        self._continues = re.compile(r"([^{0}]){0}[ \t]*$|^{0}[ \t]*$".format(re.escape(self._result.escape)))

    def _take(self) -> str:
        line = self._lines[self._at].rstrip("\r")
        self._at += 1
        return line

    def _whole_line(self) -> str:
        """A line with those that continue it; empty if there is nothing on it."""
        parts, is_first = [], True
        while self._at < len(self._lines):
            line = self._take()
            stripped = line.lstrip()
            if stripped.startswith("#"):
                if is_first:
                    return ""
                continue
            if not is_first and not stripped:
                self._result.warnings.append((self._at, "an empty line in a continued instruction"))
                continue
            line = stripped if is_first else line
            match = self._continues.search(line)
            parts.append(line[: match.start()] + (match[1] or "") if match else line)
            if match is None or (is_first and not stripped):
                break
            is_first = False
        return "".join(parts).strip()

    def _instruction(self, line: str, start: int) -> Instruction:
        first = self._at
        found = self._from_line(line, start)
        if not found.is_json and _may_have_heredocs(found) and "<<" in line:
            heredocs = [self._heredoc(*word, start) for word in self._heredoc_words(found)]
            trigger = found.trigger
            changes: dict[str, object] = {"heredocs": tuple(heredocs), "lines": (start, self._at)}
            if trigger:
                changes["trigger"] = _with(trigger, heredocs=tuple(heredocs), words=_joined(trigger.words))
            found = _with(found, **changes, words=_joined(found.words))
        original = "\n".join(self._lines[start - 1 : max(self._at, first)])
        return _with(found, original=original)

    def _heredoc_words(self, instruction: Instruction) -> list[tuple[str, bool, bool]]:
        """(delimiter, whether it was quoted, whether tabs are stripped) of each <<WORD, in order.

        White space may be before WORD (BuildKit 0.22), if there is such a line at all: else it is a shift, as in $((1 << 2)).
        """
        rest = (instruction.trigger or instruction).rest
        found = []
        for word in _joined(split_raw(rest, "\\")):
            match = HEREDOC.fullmatch(word)
            if not match or not match[3].strip():
                continue
            name = re.sub(r"""\\(.)|["']""", lambda char: char[1] or "", match[3])
            if name and (" " not in word or any(line.strip() == name for line in self._lines[self._at :])):
                found.append((name, name != match[3], bool(match[2])))
        return found

    def _heredoc(self, name: str, is_raw: bool, strips_tabs: bool, start: int) -> Heredoc:
        content: list[str] = []
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            line_end = line.rstrip("\r")
            if (line_end.lstrip("\t") if strips_tabs else line_end) == name:
                return Heredoc(name, "".join(content), is_raw, strips_tabs)
            content.append((line.lstrip("\t") if strips_tabs else line) + "\n")
        raise self._error(start, f"heredoc without its end '{name}'")

    def _from_line(self, line: str, start: int) -> Instruction:
        keyword, _, rest = partition(line)
        keyword = keyword.lower()
        flags, rest = split_flags(rest.strip())
        lines = start, self._at
        try:
            words, is_json, separators = ARGUMENTS.get(keyword, strings)(rest, self._result.escape)
            trigger = self._from_line(rest, start) if keyword == "onbuild" and rest else None
        except ValueError as error:
            raise self._error(start, f"{keyword.upper()}: {error}") from None
        return Instruction(keyword, rest, tuple(flags), tuple(words), is_json, lines, (), tuple(separators), trigger)


def _with(instruction: Instruction, **changes: object) -> Instruction:
    from dataclasses import replace

    return replace(instruction, **changes)  # type: ignore[arg-type]


def _may_have_heredocs(instruction: Instruction) -> bool:
    one = instruction.trigger if instruction.trigger else instruction
    return one.keyword in _WITH_HEREDOCS and not one.is_json


def _joined(words: Iterable[str]) -> tuple[str, ...]:
    """Words, with a << by itself and the one after it as one."""
    found: list[str] = []
    for word in words:
        if found and _MARK.fullmatch(found[-1]):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return tuple(found)
