"""The directory of a served mount, in the directory of live state: what its processes and the commands tell each other.

config.json is written once; supervisor and worker hold a pid each; alive is locked by both for as long as they live; images and
locators say what is served, prefetch what is to be brought into the cache, leases what is held in the store.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import time
from contextlib import contextmanager

from cafs import atomic, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cafs.request import Request
    from cafs.store import Store

CONFIG = "config.json"
PID_FILE, WORKER_FILE, ALIVE = "supervisor", "worker", "alive"
LEASES, IMAGES, LOCATORS, PREFETCH, MOUNT_POINT = "leases", "images", "locators", "prefetch", "mnt"
_DEVICE = "device"
_END_WAIT_S = 2.0


def write_config(state: str, store: Store, cache: str, request: Request, **more: object) -> None:
    """What both need to know, in the directory STATE; the store's address may have a password in it.

    more: of a tree, its layers, mount point, and note for --list.
    """
    config = {
        "cache": os.path.realpath(cache),
        "chunk_size": store.chunk_size,
        "foreground": request.foreground,
        "hash": store.hash_name,
        "limit_s": request.limit_s,
        "log": request.log,
        "record": request.record,
        "store": request.store,
    }
    atomic.create_file(os.path.join(state, CONFIG), json.dumps(config | more, sort_keys=True).encode(), 0o400)


@contextmanager
def locked(name: str, *below: str) -> Iterator[None]:
    """Hold a lock in the directory of live state, which is made, and a directory below it.  Raises OSError."""
    paths.make_private(paths.run(), *below)
    fd = os.open(os.path.join(paths.run(), f"{name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def announce(state: str, image: bytes, profile: list[str]) -> None:
    """Say that an image is, or is about to be, mounted.  profile: where one to bring may be in the store, [] for none."""
    atomic.replace_hint(os.path.join(state, IMAGES, image.hex()), b"")
    if profile:
        note_prefetch(state, profile=profile)


def note_prefetch(state: str, **what: object) -> None:
    """Ask for something to be brought into the cache.  what: profile=files, or layers= and rate= for all."""
    import hashlib

    data = json.dumps(what, sort_keys=True).encode()
    atomic.replace_hint(os.path.join(state, PREFETCH, hashlib.sha256(data).hexdigest()[:16]), data)


def read_config(state: str) -> dict[str, Any]:
    with open(os.path.join(state, CONFIG), "rb") as file:
        config: dict[str, Any] = json.load(file)
        return config


def images(state: str) -> set[str]:
    """Digests of the images that are mounted; none once the servers have ended."""
    try:
        names = os.listdir(os.path.join(state, IMAGES))
    except FileNotFoundError:
        return set()
    return {name for name in names if re.fullmatch("(?:[0-9a-f]{2})+", name)}


def note_pid(state: str, name: str) -> None:
    """Write our pid, and hold a lock for as long as we live, also when we run the program anew."""
    atomic.replace_hint(os.path.join(state, name), b"%d\n" % os.getpid(), 0o600)
    os.set_inheritable(hold(state), True)


def note_device(state: str, device: str) -> None:
    """What MAJOR:MINOR the mount has: on its mount point there may be another one later."""
    atomic.replace_hint(os.path.join(state, _DEVICE), device.encode())


def device(state: str) -> str:
    """What `note_device` has noted, '' if nothing."""
    try:
        return atomic.read_file(os.path.join(state, _DEVICE), 64).decode()
    except OSError:
        return ""


def held(state: str) -> list[int]:
    """The descriptors that this process has of the mark of life, from the program that it was before."""
    mark = os.path.join(state, ALIVE)
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == mark:
                found.append(int(fd))
        except OSError:
            continue
    return found


def hold(state: str) -> int:
    """A descriptor that keeps STATE from being taken for that of a dead server."""
    fd = os.open(os.path.join(state, ALIVE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def pid(state: str) -> int:
    """Of the supervisor, 0 if there is none."""
    try:
        return _read_pid(state)
    except (OSError, ValueError):
        return 0


def _read_pid(state: str) -> int:
    return int(atomic.read_file(os.path.join(state, PID_FILE), 32))


def reload(state: str) -> None:
    """Start both programs anew.  Raises CafsError if the supervisor does not live."""
    from cafs.errors import CafsError, quote

    try:
        os.kill(_read_pid(state), signal.SIGHUP)
    except (OSError, ValueError) as error:
        raise CafsError(f"what serves {quote(state)} cannot be reached: {error}") from error


def is_alive(state: str) -> bool:
    """Whether one of the two lives."""
    try:
        fd = os.open(os.path.join(state, ALIVE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wait_for_end(state: str) -> None:
    """Until the servers of what was just unmounted have gone, if they do soon: others may still use it."""
    deadline = time.monotonic() + _END_WAIT_S
    while is_alive(state) and time.monotonic() < deadline:
        time.sleep(0.005)


def remove_state(state: str) -> None:
    """Remove the directory of a LAZY that has ended; nothing is mounted in it any more.  Others may do the same."""
    for directory in (IMAGES, LOCATORS, PREFETCH, ""):
        top = os.path.join(state, directory)
        try:
            names = sorted(os.listdir(top), key=lambda name: name == ALIVE)
        except OSError:
            continue
        for name in names:
            if not os.path.isdir(os.path.join(top, name)):
                atomic.unlink_quietly(os.path.join(top, name))
    for directory in (IMAGES, LOCATORS, PREFETCH, MOUNT_POINT, ""):
        try:
            os.rmdir(os.path.join(state, directory))
        except OSError:
            pass


def is_unmounted(fd: int) -> bool:
    """Whether nothing uses the file system any more: the connection is gone."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def unmount(state: str) -> None:
    """What `kill` of a tree's server means; LAZY ends when the mounts over it do."""
    from cafs import mountinfo

    point: str = read_config(state).get("point", "")
    here = mountinfo.at(point)
    if here and here.device == device(state):
        from cafs.request import unmount_stale

        try:
            unmount_stale(point)
        except OSError:
            pass  # it is unmounted, and still in use
