"""--filter K=V, as docker has it: values of one key are alternatives, but labels; different keys go together."""

from __future__ import annotations

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Filters = dict[str, list[str]]

_EVERY = ("label", "label!")


def parse(texts: list[str], known: Mapping[str, tuple[str, ...]]) -> Filters:
    """By key.  known: the keys, each with the values that it may have, none: any.  Raises UsageError, with the nearest."""
    found: Filters = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"filter {quote(text)} is not K=V", hint=_known(known))
        if key not in known:
            raise UsageError(f"unknown filter {quote(key)}", hint=nearest(key, known) or _known(known))
        if known[key] and value not in known[key]:
            hint = nearest(value, known[key]) or ", ".join(known[key])
            raise UsageError(f"filter {quote(key)} cannot be {quote(value)}", hint=hint)
        found.setdefault(key, []).append(value)
    return found


def fits(wanted: Filters, tests: Mapping[str, Callable[[str], bool]]) -> bool:
    """Whether something is to be shown.  tests: by key, whether a value is its own."""
    return all((all if key in _EVERY else any)(map(tests[key], values)) for key, values in wanted.items())


def has_label(labels: Mapping[str, str], text: str) -> bool:
    """text: K or K=V."""
    name, equals, value = text.partition("=")
    return name in labels and (not equals or labels[name] == value)


def is_like(pattern: str, *names: str) -> bool:
    """Whether one of the names is the pattern, or has what it describes (re)."""
    import re

    try:
        return pattern in names or any(re.search(pattern, name) for name in names)
    except re.error:
        return False


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A hint."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"did you mean {near[0]}?" if near else None


def _known(known: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{key}=" for key in known)
