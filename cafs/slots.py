"""Which processes serve a mount: one slot each in the file STATE/processes, held by a record lock (fcntl(2), F_SETLK).

The kernel says who holds a slot (F_GETLK) and frees it when its process dies, so the table is never stale.  Byte 0 is a
mutex: whoever fills an empty slot holds it.  Record locks belong to a process, not to a descriptor: they survive execve(2), a
child does not inherit them, and closing ANY descriptor of the file gives them up.  A server therefore keeps the one descriptor
that it inherited and never opens the file again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

FILE = "processes"
WORKER, SUPERVISORS = 0, (1, 2, 3)
ALL = (WORKER, *SUPERVISORS)
_MUTEX, _FIRST = 0, 1
_FLOCK = "hhqqi4x"


def create(state: str) -> int:
    """A new table, all slots free.  Return its descriptor.  Raise OSError."""
    return os.open(os.path.join(state, FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def take(table: int, slot: int) -> bool:
    """Hold a slot until this process ends; False if another process has it."""
    try:
        fcntl.lockf(table, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _FIRST + slot)
    except BlockingIOError:
        return False
    return True


def lock(table: int) -> None:
    """Wait for the mutex, which a holder's death frees."""
    fcntl.lockf(table, fcntl.LOCK_EX, 1, _MUTEX)


def unlock(table: int) -> None:
    """Give the mutex back."""
    fcntl.lockf(table, fcntl.LOCK_UN, 1, _MUTEX)


def pid(table: int, slot: int) -> int:
    """The process that holds a slot; 0 if none does, or this one."""
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _FIRST + slot, 1, 0)
    kind, _, _, _, holder = struct.unpack(_FLOCK, fcntl.fcntl(table, fcntl.F_GETLK, request))
    return 0 if kind == fcntl.F_UNLCK else int(holder)


def watch(table: int, slot: int) -> int:
    """A pidfd of the process that holds a slot, -1 if none does."""
    while holder := pid(table, slot):
        try:
            pidfd = os.pidfd_open(holder)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
            continue  # it died after it was seen
        if pid(table, slot) == holder:  # else its number may be another process's by now
            return pidfd
        os.close(pidfd)
    return -1


def pids(state: str) -> dict[int, int]:
    """The processes that serve STATE by slot.  For commands only: a server would lose its own slot."""
    try:
        table = os.open(os.path.join(state, FILE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    try:
        return {slot: holder for slot in ALL if (holder := pid(table, slot))}
    finally:
        os.close(table)
