"""The processes of a container without a cgroup of its own, as it is without root: those of its process namespace."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_ROUNDS = 50


def members(container: Container) -> list[int]:
    """Pids of the host; none if it does not run, or has no namespace of its own."""
    first = _first(container)
    if not first:
        return []
    space = _space(first)
    return sorted(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if space and _space(pid) == space)


def is_stopped(container: Container) -> bool:
    """Whether its process 1 was stopped by a signal."""
    return _is_stopped(_first(container))


def stop(container: Container) -> None:
    """Stop all, also those that are made meanwhile."""
    for _ in range(_ROUNDS):
        moving = [pid for pid in members(container) if not _is_stopped(pid)]
        if not moving:
            return
        _send(moving, signal.SIGSTOP)


def go_on(container: Container) -> None:
    """The opposite; process 1 last, for by it is told whether they stand still."""
    _send(list(reversed(members(container))), signal.SIGCONT)


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError:
            continue


def _first(container: Container) -> int:
    if container.value("pid"):
        return 0  # others are in that namespace too
    pid = container.state().get("pid")
    return pid if isinstance(pid, int) and container.is_running() else 0


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _is_stopped(pid: int) -> bool:
    """Stopped, or dead."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t", b"Z", b"X")
    except (OSError, IndexError):
        return True
