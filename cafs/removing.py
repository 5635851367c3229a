"""A tree that somebody else has made goes, however deep it is, and nothing that is not in it.

Part of the agent's program, too: standard library only, Python 3.9.
"""

from __future__ import annotations

import os

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """Remove a directory with all that is in it, by two descriptors; a link in it is removed, never followed.

    A directory that is not empty gives its directories to the top, so that nothing is ever deeper than one level.
    What cannot be removed is left.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except OSError:
        return
    try:
        names = _empty(top, top)
        while names:
            names += _remove(names.pop(), top)
    finally:
        os.close(top)
    try:
        os.rmdir(path)
    except OSError:
        pass  # something in it is in use


def _remove(name: str, top: int) -> list[str]:
    """A directory in the top; returns the names there of those that were in it."""
    moved: list[str] = []
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            moved = _empty(fd, top)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)
    except OSError:
        pass
    return moved


def _empty(fd: int, top: int) -> list[str]:
    """Unlink what is no directory, and move the directories to the top; returns their names there."""
    moved = []
    for name in os.listdir(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except (IsADirectoryError, PermissionError):  # unlink(2) of a directory: EISDIR on Linux, EPERM by POSIX
            new = f"removing-{os.urandom(8).hex()}"
            try:
                os.rename(name, new, src_dir_fd=fd, dst_dir_fd=top)
                moved.append(new)
            except OSError:
                pass
        except OSError:
            pass
    return moved
