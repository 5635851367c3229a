"""Removing what a container leaves: runtime state, directories.  Everything here may be done twice."""

from __future__ import annotations

import json
import os

from cafs import atomic, mountinfo
from cafs.removing import remove_tree


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
