"""Stages that do not need one another at the same time: a process each, for a step forks, and threads and forks do not mix.

A child says what goes on through a pipe, and in the end what its stage has come to.
"""

from __future__ import annotations

import os
import signal
from multiprocessing import connection

from builder.progress import Progress
from cafs import stopping
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from builder.config import State
    from builder.stages import Stage
    from cafs.steps import Record

    Pipe = connection.Connection[Any, Any]
    Outcome = tuple[State, set[str], dict[str, Record]]
    Work = Callable[[Stage, Progress], Outcome]

_LEAST = 4
"""So many are worked on at once on the smallest machine: most of their time goes to waiting."""


class _Told(Progress):
    """What is said here is said in the parent."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def begin(self, number: int, title: str) -> None:
        self._pipe.send(("begin", number, title))

    def output(self, number: int, data: bytes) -> None:
        self._pipe.send(("output", number, data))

    def done(self, number: int, seconds: float, added: int) -> None:
        self._pipe.send(("done", number, seconds, added))

    def cached(self, number: int, saved: float) -> None:
        self._pipe.send(("cached", number, saved))

    def failed(self, tail: bytes) -> None:
        self._pipe.send(("failed", tail))

    def warn(self, text: str) -> None:
        self._pipe.send(("warn", text))


def run(stages: list[Stage], work: Work, progress: Progress) -> dict[int, Outcome]:
    """What becomes of each stage, by its number.  If one fails the others are ended.  Raises CafsError."""
    found: dict[int, Outcome] = {}
    waiting = list(stages)
    living: dict[Pipe, tuple[int, Stage]] = {}
    try:
        while waiting or living:
            while waiting and len(living) < max(os.cpu_count() or 1, _LEAST):
                stage = waiting.pop(0)
                pipe, pid = _start(stage, work, list(living))
                living[pipe] = pid, stage
            heard = stopping.wait(*living)
            for pipe in [one for one in living if one in heard]:
                _hear(pipe, living, found, progress)
    finally:
        for pid, _ in living.values():
            os.kill(pid, signal.SIGTERM)
        for pipe, (pid, _) in living.items():
            pipe.close()
            os.waitpid(pid, 0)
    return found


def _start(stage: Stage, work: Work, others: list[Pipe]) -> tuple[Pipe, int]:
    ours, theirs = connection.Pipe(duplex=False)
    pid = os.fork()
    if pid:
        theirs.close()
        return ours, pid
    try:
        stopping.heed()  # a terminal's Ctrl-C comes to us, too: what was made for a while is removed on the way out
        for one in (ours, *others):
            one.close()
        theirs.send(("outcome", work(stage, _Told(theirs))))
    except CafsError as error:
        theirs.send(("error", str(error), error.exit_code, error.hint))
    except BaseException as error:
        theirs.send(("error", f"{type(error).__name__}: {error}", 1, None))
    finally:
        os._exit(0)


def _hear(
    pipe: Pipe,
    living: dict[Pipe, tuple[int, Stage]],
    found: dict[int, Outcome],
    progress: Progress,
) -> None:
    pid, stage = living[pipe]
    try:
        said: Any = pipe.recv()
        kind, rest = said[0], said[1:]
    except EOFError:
        kind, rest = "error", (f"what builds stage {stage.label} was killed", 1, None)
    if kind == "outcome":
        found[stage.number] = rest[0]
    elif kind == "error":
        error = CafsError(str(rest[0]), hint=rest[2])
        error.exit_code = rest[1]
        raise error
    else:
        getattr(progress, kind)(*rest)
        return
    del living[pipe]
    pipe.close()
    os.waitpid(pid, 0)
