"""Leases: who uses a store right now.  A JSON file each, touched while it is held.  cafs-store(5), LEASES."""

from __future__ import annotations

import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.backend import Backend

REFRESH_S = 300
DEAD_AFTER_S = 6 * REFRESH_S
"""A lease that another machine, or another pid namespace, has not touched for so long is dead."""


def take(backend: Backend, kind: str, image: str = "", pid: int = 0) -> str:
    """Make a lease; returns its name, for the holder to touch every REFRESH_S and to remove.  Raises OSError, CafsError.

    kind: 'writer', 'mount' or 'gc'.  image: hex digest of an image that is needed while the lease lives.
    pid: of the process with which it dies, this one if 0.
    """
    record = (
        _here() | {"kind": kind, "pid": pid or os.getpid(), "start": int(time.time())} | ({"image": image} if image else {})
    )
    name = f"leases/{os.getpid()}-{os.urandom(8).hex()}"
    backend.replace(name, json.dumps(record, sort_keys=True).encode() + b"\n")
    return name


def is_dead(data: bytes, age_s: float) -> bool:
    """Whether a lease's holder is surely gone: by its pid where pids can be compared, by a reboot, or by its age.

    data: what the lease holds; age_s: since it was touched.
    """
    try:
        record = json.loads(data)
        here = _here()
        if record["host"] == here["host"] and record["boot_id"] != here["boot_id"]:
            return True
        if all(record[key] == value for key, value in here.items()):
            return not os.path.exists(f"/proc/{int(record['pid'])}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # nobody of ours wrote it: by its age
    return age_s > DEAD_AFTER_S


def kind(data: bytes) -> str:
    """What a lease is for, '' if nobody of ours wrote it."""
    try:
        return str(json.loads(data)["kind"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def boot_id() -> str:
    """Of this boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _here() -> dict[str, str]:
    """What has to be the same for a pid to mean the same process."""
    return {"boot_id": boot_id(), "host": os.uname().nodename, "pid_namespace": os.readlink("/proc/self/ns/pid")}
