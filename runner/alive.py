"""Who watches which container: a lock on a file in state/alive, held by its crun and guard, or by its monitor.

The kernel drops the lock with the last process that holds it.  A file there without a lock is of a container whose watchers
were killed, or were lost with the machine.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager

from cafs import atomic, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def hold(container: str, *, is_new: bool = False) -> int | None:
    """Watch a container until every copy of the returned descriptor is closed; None if somebody does already."""
    with changing() as directory:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if is_new else 0)
        fd = os.open(container, flags, 0o600, dir_fd=directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd


def abandoned() -> list[tuple[str, int]]:
    """Containers that nobody watches any more, each held from now on."""
    found = []
    if not paths.listed(_path()):
        return []
    with changing() as directory:
        for name in sorted(os.listdir(directory)):
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append((name, fd))
            except OSError:
                os.close(fd)
    return found


def is_watched(container: str) -> bool:
    """Whether somebody holds it."""
    try:
        fd = os.open(os.path.join(_path(), container), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def forget(container: str) -> None:
    """It has ended, and nothing of it has to be given back any more."""
    with changing():
        atomic.unlink_quietly(os.path.join(_path(), container))


def _path() -> str:
    return os.path.join(paths.state(), "alive")


@contextmanager
def changing() -> Iterator[int]:
    """One process at a time changes who is watched, and names.  Yields a descriptor of state/alive."""
    paths.make_private(_path())
    with atomic.locked(_path()) as directory:
        yield directory
