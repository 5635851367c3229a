"""A cgroup for a plain job that says what memory it needs, where one may be made: it gets no more, and nothing of it gets away.

Part of the agent's program: standard library only, Python 3.9.  Version 1 and 2: Documentation/admin-guide/cgroup-v1/
(memory.rst, pids.rst) and cgroup-v2.rst.  Jobs in images have those that crun makes.
"""

from __future__ import annotations

import json
import os

_TOP = "/sys/fs/cgroup"
_PARENT = "cafs-jobs"
_LIMITS = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}
_PEAKS = ("memory.peak", "memory.max_usage_in_bytes")


def may_limit(controller: str) -> bool:
    """Whether crun can set limits of cpu or memory here: it needs root, and the controller."""
    try:
        with open(os.path.join(_TOP, "cgroup.controllers"), encoding="ascii") as file:
            known = controller in file.read().split()
    except OSError:
        known = os.path.isdir(os.path.join(_TOP, controller))
    return known and os.geteuid() == 0


def make(name: str, memory: int) -> str:
    """A new one for a job; '' where none may be made.  memory: bytes that it may have, 0: as many as there are."""
    for hierarchy in ("memory", ""):
        top = os.path.join(_TOP, hierarchy)
        if not os.path.exists(os.path.join(top, "cgroup.procs")):
            continue
        directory = os.path.join(top, _PARENT, name)
        try:
            os.makedirs(directory)
            if memory:
                _limit(directory, memory)
            return directory
        except OSError:
            remove(directory)
    return ""


def make_for_cpus(name: str, cpus: float) -> str:
    """The same for processors, of version 1, where these have a hierarchy of their own."""
    top = os.path.join(_TOP, "cpu")
    if not os.path.exists(os.path.join(top, "cpu.cfs_quota_us")) and not os.path.exists(os.path.join(top, "cgroup.procs")):
        return ""
    directory = os.path.join(top, _PARENT, name)
    try:
        os.makedirs(directory)
        _write(os.path.join(directory, "cpu.cfs_quota_us"), str(max(int(cpus * 100_000), 1000)))
        return directory
    except OSError:
        remove(directory)
        return ""


def put(directory: str, pid: int) -> None:
    """A process into one.  Raises OSError."""
    _write(os.path.join(directory, "cgroup.procs"), str(pid))


def _limit(directory: str, memory: int) -> None:
    """With swap, where that is counted.  Raises OSError if it cannot be."""
    for first, second in _LIMITS.items():
        if os.path.exists(os.path.join(directory, first)):
            _write(os.path.join(directory, first), str(memory))
            try:
                _write(os.path.join(directory, second), "0" if second.endswith("max") else str(memory))
            except OSError:
                pass  # swap is not counted on this host
            return
    raise FileNotFoundError(2, "no limit of memory", directory)


def pids(directory: str) -> set[int]:
    """Of all that is in it, and in what the job has made below it."""
    found: set[int] = set()
    for place, _, _ in os.walk(directory) if directory else ():
        try:
            with open(os.path.join(place, "cgroup.procs"), encoding="ascii") as file:
                found |= {int(line) for line in file.read().split()}
        except (OSError, ValueError):
            continue
    return found


def peak(directory: str) -> int:
    """Bytes of memory that it had at most, 0 if that is not known."""
    for name in _PEAKS:
        try:
            with open(os.path.join(directory, name), encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return 0


def kills_of(pid: int) -> str:
    """The file that counts whom the kernel has ended in a process's cgroup as its memory was used up; '' if there is none."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            found = counter(os.path.join(_TOP, controllers, path[1:]))
            if found:
                return found
    return ""


def counter(directory: str) -> str:
    """That file of a cgroup; '' if there is none."""
    found = (os.path.join(directory, name) for name in ("memory.oom_control", "memory.events"))
    return next(filter(os.path.exists, found), "") if directory else ""


def kills(path: str) -> int | None:
    """What such a file says; None if it has gone.  The kernel counts before it kills."""
    try:
        with open(path, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), None)
    except (OSError, ValueError):
        return None


def note_kills(path: str, outcome: str) -> None:
    """The same as crun does for a container, before its cgroup goes."""
    found = kills(path)
    if found is not None:
        fd = os.open(outcome, os.O_WRONLY)
        os.write(fd, b'{"oom_kills": %d}\n' % found)
        os.close(fd)


def noted_kills(fd: int) -> int:
    """What was noted in a file that is open; 0 if nothing was."""
    try:
        return int(json.loads(os.pread(fd, 4096, 0) or b"{}").get("oom_kills", 0))
    except (OSError, ValueError):
        return 0


def has_run_out(directory: str) -> bool:
    """Whether the kernel has ended something in it as its memory was used up."""
    return any(kills(os.path.join(directory, name)) for name in ("memory.events", "memory.oom_control"))


def remove(directory: str) -> None:
    """If nothing is in it any more."""
    for place, _, _ in os.walk(directory, topdown=False) if directory else ():
        try:
            os.rmdir(place)
        except OSError:
            return


def sweep(agent: str, known: set[str]) -> None:
    """Remove what is empty and belongs to no job that its agent knows."""
    for hierarchy in ("memory", "cpu", ""):
        top = os.path.join(_TOP, hierarchy, _PARENT, agent)
        for name in os.listdir(top) if os.path.isdir(top) else ():
            if os.path.join(top, name) not in known and os.path.isdir(os.path.join(top, name)):
                remove(os.path.join(top, name))
        if not known:
            remove(top)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
