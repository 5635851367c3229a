"""Which containers are alive, and what they are called.

A container is alive while its crun or its guard holds a lock on its file in state/alive; the kernel drops the lock with them.
A name is a symbolic link in run/names to an id; it counts while that container is alive.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager

from cafs import atomic, paths
from cafs.errors import CafsError, UsageError, quote
from runner import cleanup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def mark_alive(container: str) -> None:
    """From now until this process and the children that it forks have ended.

    Tidies up after containers of which both ended without doing so: killed together, or by a crash of the machine.
    """
    with _all() as directory:
        for dead in os.listdir(directory):
            if not _is_alive(directory, dead):
                cleanup.kill_cgroup(dead)
                cleanup.remove_tree(os.path.join(paths.run(), "runc", dead))
                cleanup.remove_directory(os.path.join(paths.state(), "containers", dead))
                os.unlink(dead, dir_fd=directory)
        fd = os.open(container, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        fcntl.flock(fd, fcntl.LOCK_EX)  # never closed: it goes with the process


def take(name: str, container: str) -> None:
    """Give a name to a container.  Raises UsageError for what is no name, CafsError if a live container has it."""
    if not name.isascii() or not all(c.isalnum() or c in "_.-" for c in name) or not name[:1].isalnum() or len(name) > 128:
        raise UsageError(f"{quote(name)} is not a container name")
    with _all() as directory:
        path = _path(name)
        try:
            holder = os.readlink(path)
        except FileNotFoundError:
            holder = ""
        if holder and _is_alive(directory, holder):
            raise CafsError(f"a container named {quote(name)} is running")
        if holder:
            os.unlink(path)
        os.symlink(container, path)


def drop(name: str, container: str) -> None:
    """Take the name away, if it is still this container's."""
    with _all():
        try:
            if os.readlink(_path(name)) == container:
                os.unlink(_path(name))
        except OSError:
            pass


def forget(container: str) -> None:
    """The container has ended and nothing of it is left."""
    atomic.unlink_quietly(os.path.join(_alive(), container))


def _alive() -> str:
    return os.path.join(paths.state(), "alive")


def _path(name: str) -> str:
    return os.path.join(paths.run(), "names", name)


@contextmanager
def _all() -> Iterator[int]:
    """Nobody else looks at or changes names meanwhile.  Yields a descriptor of state/alive."""
    for path in (os.path.join(paths.run(), "names"), _alive()):
        os.makedirs(path, mode=0o700, exist_ok=True)
    directory = os.open(_alive(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(directory)


def _is_alive(directory: int, container: str) -> bool:
    try:
        fd = os.open(container, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
