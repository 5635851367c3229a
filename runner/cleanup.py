"""Removing what a container leaves: runtime state, directories.  Everything here may be done twice."""

from __future__ import annotations

import json
import os

from cafs import atomic, mountinfo


def remove_state(state: str) -> bool:
    """Remove the cgroups and runtime state of a container whose init was reaped: `runc delete` takes 25 ms for that.

    Returns False, having removed nothing that `runc delete` needs, if a cgroup is still in use.
    """
    try:
        cgroups = json.loads(atomic.read_file(os.path.join(state, "state.json"), 1 << 24))["cgroup_paths"]
        for path in set(cgroups.values()):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    remove_tree(state)
    return True


def remove_directory(path: str) -> None:
    """Remove a container's directory, never through a mount: a file system that is mounted below keeps its content."""
    if not any(one.point.startswith(os.fsencode(path) + b"/") for one in mountinfo.mounts()):
        remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove a tree, however deep, by two descriptors; a link that a container made in it is removed, never followed.

    A directory that is not empty gives its directories to the top, so that nothing is ever deeper than one level.
    What cannot be removed is left.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        names = _empty(top, top)
        while names:
            name = names.pop()
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                names += _empty(fd, top)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=top)
        os.rmdir(path)
    except OSError:
        pass
    finally:
        os.close(top)


def _empty(fd: int, top: int) -> list[str]:
    """Unlink what is no directory, and move the directories to the top; returns their names there."""
    moved = []
    for name in os.listdir(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except (IsADirectoryError, PermissionError):  # unlink(2) of a directory: EISDIR on Linux, EPERM by POSIX
            new = f"removing-{os.urandom(8).hex()}"
            os.rename(name, new, src_dir_fd=fd, dst_dir_fd=top)
            moved.append(new)
    return moved
