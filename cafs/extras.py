"""Libraries that only an extra of the package brings: pip install 'cafs-tools[EXTRA]'."""

from __future__ import annotations

from contextlib import contextmanager

from cafs.errors import UnsupportedError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what an extra brings within the block.  Raises UnsupportedError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = f"pip install 'cafs-tools[{name}]'"
        raise UnsupportedError(f"the Python module {quote(error.name or name)} is not installed", hint=hint) from error
