"""A line that counts, on a terminal only."""

from __future__ import annotations

from contextlib import contextmanager

from cli._app import is_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress(doing: str, what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What to call with (number, bytes) now and then; None where nobody would see it."""
    if quiet or not is_terminal():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(doing) as status:
        yield lambda count, size: status.update(f"{doing}: {count} {what}, {size >> 20} MiB")
