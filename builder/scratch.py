"""Directories for the time of a step: removed at its end, or by whoever comes next if it was killed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager

from cafs import paths
from cafs.errors import CafsError
from runner.cleanup import remove_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME, _LOCK = "builds", "lock"


@contextmanager
def directory(above: str) -> Iterator[str]:
    """A new one, of ours alone, that is locked while we live.  above: paths.run(), which is memory, or paths.state()."""
    top = os.path.join(above, _NAME)
    paths.make_private(top)
    made = tempfile.mkdtemp(prefix="step-", dir=top)
    lock = os.open(os.path.join(made, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inner = os.path.join(made, "files")
        os.mkdir(inner, 0o700)
        yield inner
    finally:
        remove_directory(made)
        os.close(lock)


def tidy() -> None:
    """Remove what killed builds have left: directories, and containers of steps whose builder is gone."""
    for above in (paths.run(), paths.state()):
        top = os.path.join(above, _NAME)
        for name in paths.listed(top):
            _remove_if_left(os.path.join(top, name))
    from runner import containers, control

    for container in containers.every():
        builder = container.asked.get("builder")
        is_left = builder and containers.start_time(builder[0]) != builder[1]
        if is_left and not container.is_running():
            try:
                control.remove(container, force=True, with_volumes=True)
            except CafsError:
                continue  # its guard is at it


def _remove_if_left(made: str) -> None:
    try:
        lock = os.open(os.path.join(made, _LOCK), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # it is being made, or removed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_directory(made)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
