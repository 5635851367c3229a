"""Named and anonymous volumes: state/volumes/NAME/_data, as docker lays them out, with volume.json beside it.

A volume that is empty gets what the image has at its place, when a container that uses it first starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time

from cafs import atomic, linux, paths
from cafs.errors import BusyError, NotFound, UsageError, quote
from runner.cleanup import remove_directory, remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PIECE = 1 << 20


def root() -> str:
    """Where volumes are kept."""
    return os.path.join(paths.state(), "volumes")


def check_name(name: str) -> None:
    """Raises UsageError."""
    if not name.isascii() or not all(c.isalnum() or c in "_.-" for c in name) or not name[:1].isalnum() or len(name) > 128:
        raise UsageError(f"{quote(name)} is not a volume name", hint=f"a directory here is ./{name}")


def create(name: str = "", labels: dict[str, str] | None = None) -> str:
    """Make a volume, or find it; returns its name.  Without one it is anonymous: 64 hex digits.  Raises OSError, UsageError."""
    is_anonymous = not name
    name = name or os.urandom(32).hex()
    check_name(name)
    paths.make_private(root())  # what a container keeps in it, with whatever modes, is for nobody else
    directory = os.path.join(root(), name)
    if os.path.isdir(directory):
        return name
    new = os.path.join(root(), f".new.{os.urandom(8).hex()}")
    os.mkdir(new, 0o700)
    about = {"name": name, "created_ns": time.time_ns(), "labels": labels or {}, "anonymous": is_anonymous}
    atomic.replace_file(os.path.join(new, "volume.json"), json.dumps(about, sort_keys=True).encode(), 0o600)
    os.mkdir(os.path.join(new, "_data"), 0o755)
    try:
        os.rename(new, directory)
    except OSError:  # somebody was first
        remove_tree(new)
    return name


def ready(name: str, rootfs: int, image_path: str) -> str:
    """The directory of a volume, filled if it is new.  image_path: where, in the image; '' to leave it empty."""
    create(name)
    directory = os.path.join(root(), name)
    data, marker = os.path.join(directory, "_data"), os.path.join(directory, "seeded")
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if image_path and not os.path.exists(marker) and not os.listdir(data):
            new = os.path.join(directory, "_data.new")
            remove_tree(new)
            os.mkdir(new, 0o755)
            _seed(new, rootfs, image_path)
            os.rename(new, data)  # over an empty directory
            with open(marker, "wb"):
                pass
    finally:
        os.close(lock)
    return data


def _seed(data: str, rootfs: int, path: str) -> None:
    try:
        source = linux.open_in_root(rootfs, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # the image has no such directory
    try:
        target = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _copy_directory(source, target)
            _copy_attributes(source, target)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_directory(source: int, target: int) -> None:
    """Everything below, by descriptors; no link is followed.  Device files are left out."""
    for name in sorted(os.listdir(source)):
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        elif stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            _with_both(source, target, name, os.O_DIRECTORY, os.O_DIRECTORY, _copy_directory)
        elif stat.S_ISREG(status.st_mode):
            _with_both(source, target, name, 0, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _copy_content)
        elif stat.S_ISFIFO(status.st_mode):
            os.mkfifo(name, stat.S_IMODE(status.st_mode), dir_fd=target)


def _with_both(source: int, target: int, name: str, source_flags: int, target_flags: int, copy: Any) -> None:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    one = os.open(name, os.O_RDONLY | flags | source_flags, dir_fd=source)
    try:
        other = os.open(name, flags | target_flags, 0o600, dir_fd=target)
        try:
            copy(one, other)
            _copy_attributes(one, other)
        finally:
            os.close(other)
    finally:
        os.close(one)


def _copy_content(source: int, target: int) -> None:
    while data := os.read(source, _PIECE):
        atomic.write_all(target, data)


def _copy_attributes(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def load(name: str) -> dict[str, Any]:
    """What is known of a volume.  Raises NotFound."""
    check_name(name)
    try:
        found = json.loads(atomic.read_file(os.path.join(root(), name, "volume.json"), 1 << 20))
    except (OSError, ValueError):
        raise NotFound(f"no volume {quote(name)}", hint="crun volume ls") from None
    return dict(found, mountpoint=os.path.join(root(), name, "_data"))


def every() -> list[dict[str, Any]]:
    """All volumes, by name."""
    found = []
    for name in sorted(paths.listed(root())):
        try:
            found.append(load(name))
        except (NotFound, UsageError):
            continue
    return found


def users(name: str) -> list[str]:
    """Names of the containers that use a volume."""
    from runner import containers

    return [
        one.name
        for one in containers.every()
        if any(mount["type"] == "volume" and mount["name"] == name for mount in one.asked["mounts"])
    ]


def remove(name: str) -> None:
    """Raises NotFound, BusyError."""
    load(name)
    if taken := users(name):
        raise BusyError(f"volume {quote(name)} is in use by container {quote(taken[0])}")
    remove_directory(os.path.join(root(), name))
