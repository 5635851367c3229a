"""Kill, or fail, a piece of work at each of its file-system calls.

The calls of ``os`` that change a disk are wrapped in a forked child; call number K dies by SIGKILL or raises an OSError.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

CALLS = ("open", "write", "writev", "fsync", "link", "rename", "unlink", "mkdir", "utime", "chmod", "fchmod", "close")


def _arm(at: int, error: int | None, below: str) -> list[str]:
    """Wrap the calls in this process; returns the log of calls."""
    log: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*arguments: object, **options: object) -> object:
            where = arguments[0]
            if isinstance(where, int):
                try:
                    where = os.readlink(f"/proc/self/fd/{where}")
                except OSError:
                    where = ""
            if not str(where).startswith(below) or (name == "open" and not int(arguments[1]) & os.O_ACCMODE):  # type: ignore[call-overload]
                return real(*arguments, **options)
            log.append(f"{name} {os.path.relpath(str(where), below)}")
            if len(log) - 1 == at:
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name != "close":
                    raise OSError(error, os.strerror(error or 0), where)
            return real(*arguments, **options)

        setattr(os, name, wrapped)

    for name in CALLS:
        wrap(name)
    return log


def calls_of(work: Callable[[], object], below: str) -> list[str]:
    """The calls that WORK makes below a directory, from a child that runs it undisturbed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            log = _arm(-1, None, below)
            work()
            with os.fdopen(writer, "w") as pipe:
                pipe.write("\n".join(log))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read().splitlines()
    os.waitpid(child, 0)
    return found


def run_with_fault(work: Callable[[], object], below: str, at: int, error: int | None) -> int:
    """Run WORK in a child with a fault at call AT; returns its wait status: 0 done, 1 a CafsError, 9 killed."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            from cafs.errors import CafsError

            _arm(at, error, below)
            try:
                work()
                code = 0
            except CafsError:
                code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
