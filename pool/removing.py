"""A directory of somebody else's making goes, however deep it is, and nothing that is not in it.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import os
from itertools import count

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: str) -> None:
    """A directory with all that is in it; what cannot be removed stays.

    Directories in directories are moved up first, by descriptors: neither recursion, nor paths, nor links lead anywhere else.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except OSError:
        return
    try:
        numbers, stuck = count(), set()
        while names := [name for name in os.listdir(top) if name not in stuck]:
            for name in names:
                if not _remove_one(top, name, numbers):
                    stuck.add(name)
    finally:
        os.close(top)
    try:
        os.rmdir(path)
    except OSError:
        pass  # something in it is in use


def _remove_one(top: int, name: str, numbers: count[int]) -> bool:
    """Whether it has gone; directories in it are then in TOP."""
    try:
        os.unlink(name, dir_fd=top)
        return True
    except OSError:
        pass  # a directory, most likely
    try:
        inner = os.open(name, _DIRECTORY, dir_fd=top)
    except OSError:
        return False
    try:
        for child in os.listdir(inner):
            _move_up(inner, child, top, numbers)
    finally:
        os.close(inner)
    try:
        os.rmdir(name, dir_fd=top)
        return True
    except OSError:
        return False


def _move_up(inner: int, child: str, top: int, numbers: count[int]) -> None:
    try:
        os.unlink(child, dir_fd=inner)
        return
    except OSError:
        pass
    while True:
        name = f"removed.{next(numbers)}"
        try:
            os.stat(name, dir_fd=top, follow_symlinks=False)
        except FileNotFoundError:
            break
    try:
        os.rename(child, name, src_dir_fd=inner, dst_dir_fd=top)
    except OSError:
        pass  # its directory stays
