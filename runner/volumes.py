"""Named and anonymous volumes: state/volumes/NAME/_data, as docker lays them out, with volume.json beside it.

A volume that is empty gets what the image has at its place, when a container that uses it first starts.
"""

from __future__ import annotations

import json
import os
import time

from cafs import atomic, linux, paths
from cafs.errors import BusyError, NotFound, UsageError, quote
from cafs.removing import remove_tree
from runner.cleanup import remove_directory
from runner.containers import every as every_container
from runner.containers import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def root() -> str:
    """Where volumes are kept."""
    return os.path.join(paths.state(), "volumes")


def check_name(name: str) -> None:
    """Raises UsageError."""
    if not is_name(name, least=1):
        raise UsageError(f"{quote(name)} is not a volume name", hint=f"a directory here is ./{name}")


def create(name: str = "", labels: dict[str, str] | None = None, *, is_anonymous: bool = False) -> str:
    """Make a volume, or find it; returns its name.  Without one it is anonymous: 64 hex digits.  Raises OSError, UsageError."""
    is_anonymous = is_anonymous or not name
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
    atomic.fsync_directory(new)
    try:
        os.rename(new, directory)
    except OSError:  # somebody was first
        remove_tree(new)
    atomic.fsync_directory(root())
    return name


def ready(name: str, rootfs: int, image_path: str) -> str:
    """The directory of a volume, filled if it is new.  image_path: where, in the image; '' to leave it empty."""
    create(name)
    directory = os.path.join(root(), name)
    data, marker = os.path.join(directory, "_data"), os.path.join(directory, "seeded")
    with atomic.locked(directory):
        if image_path and not os.path.exists(marker) and not os.listdir(data):
            new = os.path.join(directory, "_data.new")
            remove_tree(new)
            os.mkdir(new, 0o755)
            _seed(new, rootfs, image_path)
            atomic.sync_file_system(new)  # a crash of the machine must not leave one that is called seeded and is not
            os.rename(new, data)  # over an empty directory
            with open(marker, "wb"):
                pass
    return data


def _seed(data: str, rootfs: int, path: str) -> None:
    from runner.treecopy import Copier

    try:
        source = linux.open_in_root(rootfs, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # the image has no such directory
    try:
        target = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            copier = Copier(keep_owner=True, keep_attributes=True)
            copier.copy(source, ".", target, ".")
            copier.copy_status(source, target)
        finally:
            os.close(target)
    finally:
        os.close(source)


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
    return [
        one.name
        for one in every_container()
        if any(mount["type"] == "volume" and mount["name"] == name for mount in one.asked["mounts"])
    ]


def remove(name: str) -> None:
    """Raises NotFound, BusyError."""
    load(name)
    if taken := users(name):
        raise BusyError(f"volume {quote(name)} is in use by container {quote(taken[0])}")
    remove_directory(os.path.join(root(), name))
    if os.path.lexists(os.path.join(root(), name)):
        raise BusyError(f"volume {quote(name)} is not removed whole: something in it is in use")
