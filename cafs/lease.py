"""Leases: who uses a store right now.  A JSON file each, touched while it is held.  cafs-store(5), LEASES."""

from __future__ import annotations

import json
import os
import socket
import time

from cafs import atomic

REFRESH_S = 300
DEAD_AFTER_S = 6 * REFRESH_S
"""A lease that another machine, or another pid namespace, has not touched for so long is dead."""


def take(root: str, kind: str) -> str:
    """Make a lease; returns its path, for the holder to touch every REFRESH_S and to unlink.  Raises OSError."""
    record = _here() | {"kind": kind, "pid": os.getpid(), "start": int(time.time())}
    path = os.path.join(root, "leases", f"{os.getpid()}-{os.urandom(8).hex()}")
    atomic.replace_file(path, json.dumps(record, sort_keys=True).encode() + b"\n")
    return path


def is_dead(path: str) -> bool:
    """Whether a lease's holder is surely gone: by its pid where pids can be compared, by a reboot, or by its age."""
    try:
        record = json.loads(atomic.read_file(path, 65536))
        age_s = time.time() - os.stat(path).st_mtime
        here = _here()
        if record["host"] == here["host"] and record["boot_id"] != here["boot_id"]:
            return True
        if all(record[key] == value for key, value in here.items()):
            return not os.path.exists(f"/proc/{int(record['pid'])}")
        return age_s > DEAD_AFTER_S
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _here() -> dict[str, str]:
    """What has to be the same for a pid to mean the same process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return {"boot_id": boot, "host": socket.gethostname(), "pid_namespace": os.readlink("/proc/self/ns/pid")}
