"""A command for many things: what fails is said, and the others are done."""

from __future__ import annotations

import sys

from cafs.errors import CafsError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def each(words: list[str], what: Callable[[str], object], *, prints: bool = True, missing_ok: bool = False) -> int:
    """Do it for every word, and print those for which it was done; the exit code of the first failure, else 0.

    missing_ok: what is not there is no failure.
    """
    code = 0
    for word in words:
        try:
            what(word)
        except CafsError as error:
            if missing_ok and isinstance(error, NotFound):
                continue
            sys.stderr.write(f"crun: {error}\n" + (f"crun: hint: {error.hint}\n" if error.hint else ""))
            code = code or error.exit_code
        else:
            if prints:
                sys.stdout.write(word + "\n")
                sys.stdout.flush()
    return code
