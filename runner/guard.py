"""The process that cleans up after a `crun run` that is killed.

It is forked as soon as the container's mark of life is held (alive.py), before the container's first file.  It holds the read
end of a pipe; when that closes without a word, crun has died, and the guard kills the container and cleans up in its place.
"""

from __future__ import annotations

import os
import signal

from cafs import linux
from runner import containers, ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from runner.containers import Container

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that crun passes on to the command, and that the guard outlives."""
NAME = "cafs-guard"
"""Of its process: whoever ends all of a container's leaves it for last, as it cleans up."""

DONE, HANDED_OVER = b"d", b"h"
"""What crun says: it has cleaned up itself; the container has a monitor now."""


class Guard:
    """Of one container in the foreground."""

    __slots__ = ("_pid", "_pipe")

    def __init__(self) -> None:
        self._pid = self._pipe = -1

    def start(self, container: Container) -> None:
        """From now on; the container may not be made yet."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid:
            os.close(reader)
            self._pipe = writer
            return
        os.close(writer)
        try:
            linux.leave_session()
            linux.set_name(NAME)
            for number in FORWARDED:
                signal.signal(number, signal.SIG_IGN)
            _watch(container, reader)
        finally:
            os._exit(0)

    def end(self, word: bytes) -> None:
        """Say so, and wait for it; nothing if it was never started."""
        if self._pid > 0:
            os.write(self._pipe, word)
            os.close(self._pipe)
            os.waitpid(self._pid, 0)


def _watch(unfinished: Container, pipe: int) -> None:
    """In the guard.  Each step is done whatever becomes of the one before."""
    said = os.read(pipe, 1)
    if said == HANDED_OVER:
        return
    if not said:
        _quietly(lambda: _end(unfinished))
    _quietly(lambda: ending.release(unfinished, is_sudden=not said))


def _end(unfinished: Container) -> None:
    container = containers.load(unfinished.id)
    if container is None:
        ending.discard_unfinished(unfinished.id, unfinished.lock)
        return
    container.lock = unfinished.lock
    more: dict[str, Any] = {}
    _quietly(lambda: more.update(ending.take_down(container, has_ended=False)))
    ending.settle(container, ending.KILLED, error="crun was killed", **more)


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception:  # nobody is left to tell, and the next step matters as much
        return
