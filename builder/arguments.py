"""How the arguments of each instruction are split: flags, words, pairs, JSON arrays.  Nothing is expanded."""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SPACE = re.compile(r"[\t\v\f\r\n ]+")


def partition(text: str) -> tuple[str, str, str]:
    """At the first white space."""
    match = _SPACE.search(text)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def split_flags(text: str) -> tuple[list[str], str]:
    """Leading words that begin with '--', and the rest; a bare '--' ends them."""
    flags: list[str] = []
    at = 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith("--", at):
            return flags, text[at:].strip() if flags or at else text
        word, quote, end = "", "", at
        while end < len(text):
            char = text[end]
            if quote:
                if char == quote:
                    quote = ""
                elif char == "\\" and end + 1 < len(text):
                    end += 1
                    word += text[end]
                else:
                    word += char
            elif char.isspace():
                break
            elif char in "\"'":
                quote = char
            elif char == "\\" and end + 1 < len(text):
                end += 1
                word += text[end]
            else:
                word += char
            end += 1
        at = end
        if word == "--":
            return flags, text[at:].lstrip()
        flags.append(word)


def split_raw(text: str, escape: str) -> list[str]:
    """Words at white space that is neither quoted nor escaped; quotes and escapes stay in them."""
    words: list[str] = []
    word, quote, is_open = "", "", False
    at = 0
    while at < len(text):
        char = text[at]
        if not quote and char.isspace():
            if word or is_open:
                words.append(word)
            word, is_open = "", False
            at += 1
            continue
        if char == escape and quote != "'":
            if at + 1 == len(text):
                break
            word += char + text[at + 1]
            at += 2
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote, is_open = char, True
        word += char
        at += 1
    return [*words, word] if word or is_open else words


Arguments = tuple[list[str], bool, list[str]]


def strings(rest: str, escape: str) -> Arguments:
    return [word for word in _SPACE.split(rest) if word], False, []


def _one(rest: str, escape: str) -> Arguments:
    return [rest] if rest else [], False, []


def _json_array(rest: str) -> list[str] | None:
    """The words of a JSON form, None if it is none.  Raises ValueError for an array of something else."""
    if not rest.startswith("["):
        return None
    try:
        found = json.loads(rest)
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(word, str) for word in found):
        raise ValueError("only words can be in a JSON array")
    return [str(word) for word in found]


def _maybe_json(rest: str, escape: str) -> Arguments:
    found = _json_array(rest)
    return _one(rest, escape) if found is None else (found, True, [])


def _maybe_json_list(rest: str, escape: str) -> Arguments:
    found = _json_array(rest)
    return strings(rest, escape) if found is None else (found, True, [])


def _pairs(rest: str, escape: str) -> Arguments:
    """K=V ... of ENV and LABEL, or K and the rest of the line: names and values in turn."""
    words = split_raw(rest, escape)
    if not words:
        return [], False, []
    if "=" not in words[0]:
        name, space, value = partition(rest)
        if not space:
            raise ValueError("must have two arguments")
        return [name, value], False, [""]
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"no = in '{word}'; it must be name=value")
        found += [name, value]
    return found, False, ["="] * len(words)


def _arg_words(rest: str, escape: str) -> Arguments:
    return split_raw(rest, escape), False, []


def _health(rest: str, escape: str) -> Arguments:
    kind, _, command = partition(rest)
    if not kind:
        return [], False, []
    words, is_json, _ = _maybe_json(command, escape)
    return [kind, *words], is_json, []


ARGUMENTS: dict[str, Callable[[str, str], Arguments]] = {
    "add": _maybe_json_list,
    "arg": _arg_words,
    "cmd": _maybe_json,
    "copy": _maybe_json_list,
    "entrypoint": _maybe_json,
    "env": _pairs,
    "healthcheck": _health,
    "label": _pairs,
    "maintainer": _one,
    "onbuild": _one,
    "run": _maybe_json,
    "shell": _maybe_json,
    "stopsignal": _one,
    "user": _one,
    "volume": _maybe_json_list,
    "workdir": _one,
}
