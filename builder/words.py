"""Variables, quotes and escapes in the arguments of a Dockerfile's instructions, as BuildKit's frontend expands them.

Source: "Environment replacement" in BuildKit's Dockerfile reference.  Words of RUN's heredocs and JSON forms are not for here.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SPECIAL = "@*#?-$!0"
_END = ""


class WordError(ValueError):
    """A word that cannot be expanded."""


class UnsetError(WordError):
    """A variable that has to be set, and is not."""


def expand(text: str, variables: Mapping[str, str], escape: str = "\\", *, keeps_quotes: bool = False) -> str:
    """One word, in which spaces are like other characters.  keeps_quotes: they have no meaning, as in a heredoc.

    Raises WordError.
    """
    return _Reader(text, variables, escape, keeps_quotes=keeps_quotes).until(_END)[0]


def expand_words(text: str, variables: Mapping[str, str], escape: str = "\\") -> list[str]:
    """The words, split at white space that is not quoted, also in the values of variables.  Raises WordError."""
    return _Reader(text, variables, escape).until(_END)[1]


class _Words:
    """Words that are being put together."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._word = ""

    def add(self, text: str) -> None:
        for char in text:
            if not char.isspace():
                self._word += char
            elif self._word:
                self._found.append(self._word)
                self._word = ""

    def add_quoted(self, text: str) -> None:
        self._word += text

    def all(self) -> list[str]:
        return [*self._found, self._word] if self._word else self._found


class _Reader:
    def __init__(self, text: str, variables: Mapping[str, str], escape: str, *, keeps_quotes: bool = False) -> None:
        self._text = text
        self._at = 0
        self._variables = variables
        self._escape = escape
        self._keeps_quotes = keeps_quotes

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def until(self, stop: str, *, keeps_escapes: bool = False) -> tuple[str, list[str]]:
        """Up to a character, which is taken; the result as one text, and in words."""
        parts: list[str] = []
        words = _Words()
        special: dict[str, Callable[[], str]] = {"$": self._dollar}
        if not self._keeps_quotes:
            special |= {"'": self._single_quoted, '"': lambda: self._double_quoted(keeps_escapes=keeps_escapes)}
        while char := self._peek():
            if char == stop:
                self._next()
                return "".join(parts), words.all()
            if char in special:
                found = special[char]()
                (words.add if char == "$" else words.add_quoted)(found)
                parts.append(found)
                continue
            self._next()
            if char == self._escape:
                if keeps_escapes:
                    parts.append(char)
                    words.add_quoted(char)
                char = self._next()
                words.add_quoted(char)
            else:
                words.add(char)
            parts.append(char)
        if stop:
            raise WordError(f"unexpected end while looking for '{stop}'")
        return "".join(parts), words.all()

    def _single_quoted(self) -> str:
        self._next()
        end = self._text.find("'", self._at)
        if end < 0:
            raise WordError("unexpected end while looking for a matching single quote")
        found, self._at = self._text[self._at : end], end + 1
        return found

    def _double_quoted(self, *, keeps_escapes: bool) -> str:
        self._next()
        parts: list[str] = []
        while char := self._peek():
            if char == '"':
                self._next()
                return "".join(parts)
            if char == "$":
                parts.append(self._dollar())
                continue
            self._next()
            if char == self._escape:
                if keeps_escapes:
                    parts.append(char)
                if not self._peek():
                    continue
                if self._peek() in ('"', "$", self._escape):
                    char = self._next()
            parts.append(char)
        raise WordError("unexpected end while looking for a matching double quote")

    def _name(self) -> str:
        """A name; a number, or one of the shell's special characters, is one too, and never set."""
        found = re.compile(rf"[0-9]+|[{re.escape(_SPECIAL)}]|[A-Za-z_][A-Za-z0-9_]*").match(self._text, self._at)
        if not found:
            return ""
        self._at = found.end()
        return found[0]

    def _dollar(self) -> str:
        self._next()
        if self._peek() != "{":
            name = self._name()
            return self._variables.get(name, "") if name else "$"
        self._next()
        if not self._peek():
            raise WordError("missing '}'")
        if self._peek() in "{}:":
            raise WordError("bad substitution")
        name = self._name()
        operator = self._next()
        if operator == "}":
            return self._variables.get(name, "")
        if operator == "/":
            return self._replaced(self._variables.get(name, ""))
        is_colon = operator == ":"
        if is_colon:
            operator = self._next()
        if operator not in ("-", "+", "?", "#", "%") or (is_colon and operator in "#%"):
            raise WordError(f"unsupported modifier ({':' * is_colon}{operator}) in substitution")
        return self._modified(name, operator, is_colon=is_colon)

    def _inner(self, stop: str, *, keeps_escapes: bool) -> str:
        try:
            return self.until(stop, keeps_escapes=keeps_escapes)[0]
        except WordError:
            raise WordError("missing '}'") if not self._peek() else WordError("bad substitution") from None

    def _modified(self, name: str, operator: str, *, is_colon: bool) -> str:
        word = self._inner("}", keeps_escapes=operator in "#%")
        value = self._variables.get(name)
        is_set = bool(value) if is_colon else value is not None
        value = value or ""
        if operator == "-":
            return value if is_set else word
        if operator == "+":
            return word if is_set else ""
        if operator == "?":
            if not is_set:
                state = "empty" if name in self._variables else "unset"
                raise UnsetError(f"{name}: {word or f'is not allowed to be {state}'}")
            return value
        is_longest = word.startswith(operator)
        return _without(value, word[is_longest:], is_longest=is_longest, is_suffix=operator == "%")

    def _replaced(self, value: str) -> str:
        is_all = self._peek() == "/"
        if is_all:
            self._next()
        pattern = self._inner("/", keeps_escapes=True)
        replacement = self._inner("}", keeps_escapes=False)
        return re.sub(_glob(pattern, is_longest=True), lambda _: replacement, value, count=0 if is_all else 1, flags=re.DOTALL)


def _without(value: str, pattern: str, *, is_longest: bool, is_suffix: bool) -> str:
    """The value without what a pattern matches at its beginning or end."""
    matches = re.compile(_glob(pattern, is_longest=True), re.DOTALL).fullmatch
    places = range(len(value) + 1)
    if is_suffix:
        cut = next((at for at in (places if is_longest else reversed(places)) if matches(value, at)), len(value))
        return value[:cut]
    return value[next((at for at in (reversed(places) if is_longest else places) if matches(value, 0, at)), 0) :]


def _glob(pattern: str, *, is_longest: bool) -> str:
    """A pattern of *, ? and escaped characters as a regular expression."""
    parts = []
    chars = iter(pattern)
    for char in chars:
        if char == "*":
            parts.append(".*" if is_longest else ".*?")
        elif char == "?":
            parts.append(".")
        elif char == "\\":
            parts.append(re.escape(next(chars, "\\")))
        else:
            parts.append(re.escape(char))
    return "".join(parts)
