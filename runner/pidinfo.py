"""The exit status of a process that is not our child.  Sources: include/uapi/linux/pidfd.h; proc_pid_stat(5)."""

from __future__ import annotations

import fcntl
import struct
import time

_INFO = struct.Struct("<QQ11Ii")
_PIDFD_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_EXIT = 1 << 3
_REAPED_S = 5.0


def exit_status(pidfd: int, pid: int) -> int | None:
    """As of waitpid(2), of a process that has ended while we had it open; None if the kernel does not say.

    A zombie's is in /proc/PID/stat, field 52; once it was reaped the descriptor tells (Linux 6.15).
    """
    deadline = time.monotonic() + _REAPED_S
    while True:
        found = _of_zombie(pid) if _is_zombie_of(pidfd, pid) else _of_reaped(pidfd)
        if found is not None or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def _of_reaped(pidfd: int) -> int | None:
    try:
        answer = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, _INFO.pack(_EXIT, *[0] * 13))
    except OSError:
        return None
    fields = _INFO.unpack(answer)
    return int(fields[13]) if fields[0] & _EXIT else None


def _is_zombie_of(pidfd: int, pid: int) -> bool:
    """Whether the pid is still that of this process: it is until somebody reaps it (the descriptor's fdinfo says -1 then)."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return any(line.split() == ["Pid:", str(pid)] for line in file)


def _of_zombie(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read(1 << 16).rpartition(b")")[2].split()
        return int(fields[49]) if fields[0] == b"Z" else None
    except (OSError, IndexError, ValueError):
        return None
