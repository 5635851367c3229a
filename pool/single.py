"""A process of which a directory has one: the lock that says so, whether it is there, and beginning it apart from us.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def be(directory: str) -> bool:
    """Be it, until we end; False if there is one.  The directory is made if need be.  Raises OSError."""
    fd = _open(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        os.close(fd)
        return False


def is_there(directory: str) -> bool:
    """Whether it lives.  Raises OSError."""
    fd = _open(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _open(directory: str) -> int:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def begin_apart(name: str, run: Callable[[], None]) -> None:
    """Two forks: who runs it is nobody's child but that of process 1, and of no session of ours.  name: for what goes wrong."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if not os.fork():
            run()
    except BaseException as error:
        print(f"{name}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)
