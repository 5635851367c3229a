"""What a container has changed in its files: crun diff."""

from __future__ import annotations

import os
import stat
import sys

from cafs import upper
from cafs.errors import quote
from runner import stubs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner.containers import Container


def diff(container: Container) -> None:
    """A: added, C: changed, D: removed; as docker prints it."""
    targets = set(stubs.noted(container))
    shown: list[tuple[str, str]] = []
    made = targets | {os.path.dirname(target) for target in targets}  # to mount on
    for kind, path in sorted(_changes(container.path("upper")), key=lambda pair: pair[1], reverse=True):
        if path not in made or any(below.startswith(path + "/") for _, below in shown):
            shown.append((kind, path))
    for kind, path in reversed(shown):
        sys.stdout.write(f"{kind} {quote(path)[1:-1]}\n")  # a name must not look like another line


def _changes(upper: str) -> Iterator[tuple[str, str]]:
    """Of an upper directory of overlayfs: a character device 0:0 is a removal; what is from below says so (overlay.origin).

    By descriptors, however deep: the container may put links where directories were.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(upper, flags)
    levels = [("/", fd, iter(os.listdir(fd)))]
    try:
        while levels:
            top, fd, names = levels[-1]
            name = next(names, None)
            if name is None:
                os.close(levels.pop()[1])
                continue
            where = os.path.join(top, name)
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                    yield "D", where
                    continue
                yield ("C" if _has_origin(f"/proc/self/fd/{fd}/{name}") else "A"), where
                if stat.S_ISDIR(status.st_mode):
                    inner = os.open(name, flags, dir_fd=fd)
                    levels.append((where, inner, iter(os.listdir(inner))))
            except OSError:
                continue  # it was changed just now
    finally:
        for _, fd, _ in levels:
            os.close(fd)


def _has_origin(path: str) -> bool:
    try:
        os.getxattr(path, os.fsdecode(upper.prefix()) + "origin", follow_symlinks=False)
        return True
    except OSError:
        return False
