"""The directory of a served mount, in the directory of live state: what its processes and the commands tell each other.

config.json is written once; processes is the table of the servers (slots.py); supervisor and worker hold the pid of the first
supervisor and of the worker, for people; alive is locked by all of them while they live; ended tells them to end; images and
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
_DEVICE, _ENDED, _GONE, _DETACHED = "device", "ended", "gone.", "detached"
_PATH_MAX = 4096
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
    """Write our pid."""
    atomic.replace_hint(os.path.join(state, name), b"%d\n" % os.getpid(), 0o600)


def note_device(state: str, device: str) -> None:
    """What MAJOR:MINOR the mount has: on its mount point there may be another one later."""
    atomic.replace_hint(os.path.join(state, _DEVICE), device.encode())


def note_gone(state: str, device: str, point: str) -> None:
    """Note that a mount on POINT which stands on a LAZY, MAJOR:MINOR, was unmounted."""
    _note(state, _GONE + device, os.fsencode(point))


def note_detached(state: str) -> None:
    """Note that a mount which stands on a LAZY was unmounted by somebody else, as by umount -l: files of it may be open."""
    _note(state, _DETACHED, b"")


def _note(state: str, name: str, data: bytes) -> None:
    """Write a file of a state, if the state is still there: its servers may remove it at any moment."""
    try:
        atomic.replace_hint(os.path.join(state, name), data)
    except FileNotFoundError:
        pass


def may_be_open(state: str) -> bool:
    """Whether `note_detached` was called."""
    return os.path.exists(os.path.join(state, _DETACHED))


def note_mounted(state: str, device: str) -> None:
    """Note that there is a new mount of that number."""
    atomic.unlink_quietly(os.path.join(state, _GONE + device))


def gone(state: str) -> dict[str, bytes]:
    """What `note_gone` has noted: MAJOR:MINOR to mount point."""
    found = {}
    for name in paths.listed(state):
        if name.startswith(_GONE):
            try:
                found[name.removeprefix(_GONE)] = atomic.read_file(os.path.join(state, name), _PATH_MAX)
            except OSError:
                continue  # there is a new mount of that number
    return found


def device(state: str) -> str:
    """What `note_device` has noted, '' if nothing."""
    try:
        return atomic.read_file(os.path.join(state, _DEVICE), 64).decode()
    except OSError:
        return ""


def hold(state: str) -> int:
    """A descriptor that keeps STATE from being taken for that of a dead server."""
    fd = os.open(os.path.join(state, ALIVE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def pid(state: str) -> int:
    """The first supervisor, 0 if it is not known."""
    try:
        return int(atomic.read_file(os.path.join(state, PID_FILE), 32))
    except (OSError, ValueError):
        return 0


def reload(state: str) -> None:
    """Have all servers of STATE run the program that is installed now.  Raise CafsError if none is left."""
    from cafs import slots
    from cafs.errors import CafsError, quote

    supervisors = [process for slot, process in slots.pids(state).items() if slot in slots.SUPERVISORS]
    try:
        os.kill(supervisors[0], signal.SIGHUP)
    except (OSError, IndexError) as error:
        raise CafsError(
            f"no process serves {quote(state)} any more: its mounts are lost", hint="cafs-mount IMAGE DIR replaces a lost mount"
        ) from error


def end(state: str) -> None:
    """Tell the servers of STATE to end, though a copy of the mount exists in another mount namespace."""
    from cafs import slots

    try:
        os.close(os.open(os.path.join(state, _ENDED), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.kill(slots.pids(state)[slots.WORKER], signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError, KeyError):
        pass  # they have ended, or the next worker will see that it is to end
    if not is_alive(state):
        remove_state(state)  # what we have just made in it, too


def is_over(state: str, fd: int) -> bool:
    """Whether the servers are to end.  fd: of /dev/fuse."""
    return is_unmounted(fd) or os.path.exists(os.path.join(state, _ENDED))


def is_alive(state: str) -> bool:
    """Whether one of the servers lives."""
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
    while not _has_ended(state) and time.monotonic() < deadline:
        time.sleep(0.005)


def _has_ended(state: str) -> bool:
    """Whether the servers were killed, or have removed STATE, which they do last."""
    return not (is_alive(state) if os.path.exists(os.path.join(state, ALIVE)) else os.path.isdir(state))


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
