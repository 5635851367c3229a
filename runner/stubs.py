"""What has to be in a container's root to mount on: made by us before the runtime would, so that nothing else changes.

A directory keeps its time when a stub is made in it, and what was made is noted: it is no work of the container's, and is left
out when its files become an image.
"""

from __future__ import annotations

import json
import os

from cafs import atomic, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runner.containers import Container

_NOTE = "stubs.json"
_LINKS_MAX = 40
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def make(container: Container, rootfs: int, mounts: list[dict[str, Any]]) -> None:
    """Make what is missing.  rootfs: O_PATH of the root.  What cannot be made here the runtime will say."""
    made = noted(container)
    before = len(made)
    tops = [one["destination"].rstrip("/") + "/" for one in mounts]
    for one in mounts:
        target = one["destination"]
        if not any(target.startswith(top) for top in tops if top != target.rstrip("/") + "/"):  # that is in another mount
            is_file = one["type"] == "bind" and not os.path.isdir(one["source"])
            try:
                made += _make(rootfs, target, is_file=is_file)
            except OSError:
                continue
    if len(made) > before:
        data = json.dumps(made).encode("utf-8", "surrogateescape")
        atomic.replace_hint(container.path(_NOTE), data, 0o600)


def noted(container: Container) -> list[str]:
    """The paths that were made."""
    try:
        found = json.loads(atomic.read_file(container.path(_NOTE), 1 << 20))
        return [str(path) for path in found]
    except (OSError, ValueError, TypeError):
        return []


def _make(rootfs: int, target: str, *, is_file: bool, links: int = _LINKS_MAX) -> list[str]:
    """The paths that were not there: the target, or what a link there leads to, and directories above it."""
    try:
        os.close(linux.open_in_root(rootfs, target.lstrip("/"), os.O_PATH))
        return []
    except FileNotFoundError:
        pass
    above, _, name = target.rstrip("/").rpartition("/")
    made = _make(rootfs, above, is_file=False, links=links) if above else []
    parent = linux.open_in_root(rootfs, above.lstrip("/") or ".", _DIRECTORY)
    try:
        before = os.fstat(parent)
        root, real = (os.readlink(f"/proc/self/fd/{fd}") for fd in (rootfs, parent))
        here = "/" + real.removeprefix(root).strip("/")
        try:
            leads_to = os.readlink(name, dir_fd=parent)
        except OSError:
            leads_to = ""
        if leads_to and links:
            return made + _make(rootfs, os.path.normpath(os.path.join(here, leads_to)), is_file=is_file, links=links - 1)
        if is_file:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=parent))
        else:
            os.mkdir(name, 0o755, dir_fd=parent)
        os.utime(parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    finally:
        os.close(parent)
    return [*made, here.rstrip("/") + "/" + name]
