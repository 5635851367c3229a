"""What a worker has, and what of it is free.  Part of the agent's program: standard library only, Python 3.9.  proc(5)."""

from __future__ import annotations

import os
import re
import shutil

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_DEVICES = "/dev"


def boot_id() -> str:
    """Another after each boot."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def gpus() -> list[int]:
    """The numbers of NVIDIA's devices."""
    return sorted(int(name[6:]) for name in os.listdir(_DEVICES) if re.fullmatch("nvidia[0-9]+", name))


def report(directory: str) -> dict[str, Any]:
    """cpus, gpus (how many), memory, free_memory, free_disk (bytes, where DIRECTORY is), load (of the last minute), arch."""
    memory = {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+([0-9]+) kB", _read("/proc/meminfo"), re.M)}
    status = os.statvfs(directory)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory.get("MemTotal", 0),
        "free_memory": memory.get("MemAvailable", 0),
        "free_disk": status.f_bavail * status.f_frsize,
        "load": os.getloadavg()[0],
        "gpus": len(gpus()),
        "arch": os.uname().machine,
    }


TOOLKIT = "~/.cache/cafs-toolkit/current/bin/cafs-run"
"""Where a controller has put ours."""


def runner() -> str:
    """Path of our crun, '' if there is none; never another program of that name, which is an OCI runtime."""
    given = os.environ.get("CPOOL_CRUN", "")
    brought = os.path.expanduser(TOOLKIT)
    return next((one for one in (given, brought) if one and os.access(one, os.X_OK)), "") or shutil.which("cafs-run") or ""


def toolkit() -> str:
    """The version of what a controller has put there, '' if none has."""
    try:
        return os.readlink(os.path.dirname(os.path.dirname(os.path.expanduser(TOOLKIT))))
    except OSError:
        return ""


def why_no_images() -> str:
    """Why jobs in images cannot run here, '' if they can."""
    if not runner():
        return NO_CRUN
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])
    if not shutil.which("runc", path=path):
        return NO_RUNC
    return NO_IDS if os.geteuid() and not shutil.which("newuidmap", path=path) else ""


NO_CRUN, NO_RUNC, NO_IDS = "no crun", "no runc", "no newuidmap, which is needed without root"


def start_time(pid: int) -> int:
    """Clock ticks from the boot to the start of a process, 0 if there is none (proc(5), stat)."""
    try:
        return int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def name_of(pid: int) -> str:
    """What a process calls itself, '' if there is none (proc(5), comm)."""
    try:
        return _read(f"/proc/{pid}/comm").strip()
    except OSError:
        return ""


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
