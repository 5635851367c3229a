"""The mounted image that a container stands on: one that the user has mounted, or one shared by all our containers.

A shared mount is counted by read locks on byte 0 of a lock file, which die with their holders; who lets go and then gets a
write lock there is the last, and unmounts.  Whoever mounts or unmounts holds byte 1.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time

from cafs import linux, mountinfo, paths
from cafs.answer import ask_child, failure, tell
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_USERS, _CHANGING = 0, 1
"""Bytes of the lock file."""


class Lower:
    """A place in the host's namespace where the image is mounted.  lock: descriptor that keeps it, -1 if it is the user's."""

    __slots__ = ("lock", "path")

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self.lock = lock

    def settings(self) -> list[tuple[str, str]]:
        """What an overlay over the image has below, for linux.mount_overlay: no overlay can be laid over another."""
        here = mountinfo.at(self.path)
        if here and mountinfo.is_kernel(here):
            return [*here.layers, ("metacopy", "on"), ("redirect_dir", "on"), ("xino", "auto")]
        return []

    def let_go(self) -> None:
        """Do not keep a shared mount any longer."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def key_of(digest: bytes, store_root: str, container: str, record: str | None) -> str:
    """What names the mount of a container: all of an image of a store share one, but each that records reads has its own."""
    import hashlib

    store = hashlib.sha256(os.fsencode(store_root)).hexdigest()[:8]
    return f"{digest.hex()}.{store}" + (f".{container[:16]}" if record else "")


def release(key: str, wait_s: float = 0) -> None:
    """Unmount a mount of ours if nobody keeps it, or lets go of it in time.  The user's own is left alone."""
    point = _shared_point(key)
    try:
        lock = os.open(point + ".lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        linux.lock_byte(lock, fcntl.F_WRLCK, _CHANGING, wait=True)
        _lock_within(lock, wait_s)
        if not _is_current(lock, point + ".lock"):
            return
        if mountinfo.at(point):
            from cafs.mount import unmount

            unmount(point)
        os.rmdir(point)
        os.unlink(point + ".lock")
    except (CafsError, OSError):
        pass  # somebody has it; else the next container of this image finds and uses it
    finally:
        os.close(lock)


def _lock_within(lock: int, wait_s: float) -> None:
    """Raises BlockingIOError."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return linux.lock_byte(lock, fcntl.F_WRLCK, _USERS)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def _shared_point(key: str) -> str:
    return os.path.join(paths.run(), "images", key)


def find(
    digest: bytes,
    store_root: str,
    key: str,
    record: str | None = None,
    *,
    trusts_cache: bool = False,
    by_kernel: bool = False,
) -> Lower:
    """Mount the image, or find it mounted.  Raises CafsError.

    record: a file for what is read, of a mount of its own.  by_kernel: a mount of the user's by another engine will not do.
    """
    name = digest.hex()
    shared = os.path.join(paths.run(), "images")
    for mount in mountinfo.ours() if not record else []:
        point = os.fsdecode(mount.point)
        is_right = mount.digest == name and mountinfo.is_mine(mount) and (not by_kernel or mountinfo.is_kernel(mount))
        if is_right and os.path.dirname(point) != shared and _is_of(point, name, store_root) and mountinfo.answers(point):
            return Lower(point, -1)
    paths.make_private(shared)
    return _shared(_shared_point(key), lambda point: _mount(name, point, store_root, record, trusts_cache))


def _is_of(point: str, digest: str, store_root: str) -> bool:
    """Whether a mount takes what it lacks from this store and has it in this cache: there may be others of the image."""
    from cafs import serving
    from cafs.request import read_record

    record = read_record(point, digest)
    try:
        config = serving.read_config(str(record.get("lazy") or record.get("state")))
    except (OSError, ValueError):
        return False
    return bool((config.get("store"), config.get("cache")) == (paths.located(store_root), paths.cache()))


def _shared(point: str, mount: Callable[[str], None]) -> Lower:
    while True:
        lock = os.open(point + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            linux.lock_byte(lock, fcntl.F_RDLCK, _USERS, wait=True)
            if not _is_current(lock, point + ".lock"):
                continue  # the last user has just removed it
            linux.lock_byte(lock, fcntl.F_WRLCK, _CHANGING, wait=True)
            here = mountinfo.at(point)
            if here is None:
                os.makedirs(point, mode=0o700, exist_ok=True)
                mount(point)
            elif not mountinfo.answers(point):
                _warn_of_lost(here, point)
                mount(point)
            linux.lock_byte(lock, fcntl.F_UNLCK, _CHANGING)
            kept, lock = lock, -1
            return Lower(point, kept)
        finally:
            if lock >= 0:
                os.close(lock)


def _warn_of_lost(here: mountinfo.Mount, point: str) -> None:
    """The servers of a mount were killed, all at once: name the containers that cannot read their files any more."""
    from runner import containers

    lazy = mountinfo.lazy_below(here)
    for container in containers.every():
        pid = container.state().get("pid", 0) if container.is_running() else 0
        try:
            mounts = mountinfo.mounts(str(pid)) if pid else []
        except OSError:
            continue  # it ended
        if any(one.has_data(lazy) if lazy else one.stands_on_tree(point) for one in mounts):
            sys.stderr.write(
                f"crun: warning: container {container.name!r} has lost its image's files: their servers were killed\n"
                f"crun: hint: crun restart {container.name}\n"
            )


def _is_current(lock: int, path: str) -> bool:
    """Whether the lock file that we hold is still the one at its path."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(lock)
    return (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino)


def _mount(name: str, point: str, store_root: str, record: str | None, trusts_cache: bool) -> None:
    """Mount in a child, so that the server inherits no descriptor of ours and its libraries are not loaded here."""
    answer = ask_child(lambda writer: _mount_child(name, point, store_root, record, trusts_cache, writer))
    if answer != b"ok":
        raise failure(answer, CafsError("the image cannot be mounted"))


def _mount_child(name: str, point: str, store_root: str, record: str | None, trusts_cache: bool, writer: int) -> int:
    try:
        from cafs.mount import mount
        from cafs.request import Request

        engine = "fuse" if linux.in_user_namespace() else "auto"
        extra = {"suid"}
        request = Request(name, point, store=store_root, extra=extra, engine=engine, record=record, trusts_cache=trusts_cache)
        mount(request)
        for warning in request.warnings:
            sys.stderr.write(f"crun: warning: {warning}\n")
        sys.stderr.flush()
        os.write(writer, b"ok")
        return 0
    except BaseException as error:  # the only way out of this process
        tell(writer, error)
        return 1
