"""A command for many things: what fails is said, and the others are done."""

from __future__ import annotations

import os
import sys

from cafs import linux
from cafs.errors import FAILED, NO_SUCH, CafsError, NotFound, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    What = Callable[[str], object]

_AT_ONCE = 50


def each(words: list[str], what: What, *, prints: bool = True, missing_ok: bool = False, at_once: bool = False) -> int:
    """Do it for every word, and print those for which it was done; the exit code of the first failure, else 0.

    missing_ok: what is not there is no failure.  at_once: none waits for another, as most of it is waiting.
    """
    code, step = 0, _AT_ONCE if at_once else 1
    for at in range(0, len(words), step):
        some = words[at : at + step]
        results = _in_children(some, what, missing_ok) if len(some) > 1 else [_try(some[0], what, missing_ok)]
        for word, result in zip(some, results, strict=True):
            if result:
                code = code or (0 if missing_ok and result == NO_SUCH else result)
            elif prints:
                sys.stdout.write(word + "\n")
                sys.stdout.flush()
    return code


def _try(word: str, what: What, missing_ok: bool) -> int:
    """The exit code for one; why it failed is said."""
    try:
        what(word)
        return 0
    except CafsError as error:
        if not (missing_ok and isinstance(error, NotFound)):
            sys.stderr.write(f"crun: {error}\n" + (f"crun: hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"crun: {describe(error)}\n")
        return FAILED


def _in_children(words: list[str], what: What, missing_ok: bool) -> Iterable[int]:
    sys.stdout.flush()
    children = []
    for word in words:
        child = os.fork()
        if not child:
            code = FAILED
            try:
                linux.die_with_parent()  # as it would end with it, were it done there
                code = _try(word, what, missing_ok)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    for child in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield FAILED if status < 0 else status
