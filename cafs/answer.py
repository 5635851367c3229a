"""What a child says when it has done its work, or cannot: its own bytes, or an error, which keeps its exit code and hint."""

from __future__ import annotations

import json
import os
import sys

from cafs.errors import CafsError, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_MAX = 1 << 16


def ask_child(work: Callable[[int], int]) -> bytes:
    """Fork; what the child has written to the descriptor that WORK is called with, once nobody has that open any more.

    What WORK returns is the exit status of the child.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reader)
        os._exit(work(writer))
    os.close(writer)
    answer = receive(reader)
    os.waitpid(child, 0)
    return answer


def receive(reader: int) -> bytes:
    """All that comes until nobody has the other end open any more; closes the descriptor."""
    with open(reader, "rb") as pipe:
        return pipe.read(_ANSWER_MAX)


def failure(answer: bytes, died: CafsError | None = None) -> CafsError:
    """The error that was told.  died: what it is if nothing was, for then the child was killed."""
    try:
        code, message, hint = json.loads(answer)
    except ValueError:
        return died or CafsError("the server died while it mounted", hint="--foreground shows more")
    error = CafsError(message, hint=hint)
    error.exit_code = code
    return error


def _in_words(error: BaseException) -> str:
    return describe(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def tell(writer: int, error: BaseException) -> None:
    """Send an error to whoever waits for an answer, or to the log if nobody does any more."""
    known = error if isinstance(error, CafsError) else CafsError(_in_words(error))
    try:
        os.write(writer, json.dumps([known.exit_code, str(known), known.hint]).encode())
    except OSError:
        import logging

        logging.getLogger(__name__).exception("server failed")
