"""Files that go to a job and come back from it: on the worker, in a directory of the job's own, where it runs.

Part of the agent's program: standard library only, Python 3.9.  What a job leaves there is a stranger's: no link is followed.
"""

from __future__ import annotations

import base64
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

WORK = "work"
IN_IMAGE = "/work"
SIZE_MAX = 4 << 20
"""Bytes of all that goes to one job."""

_NAME_MAX = 255


def is_name(name: object) -> bool:
    """Whether it is a path below a directory, and nothing else."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    parts = name.split("/")
    return all(part not in ("", ".", "..") and len(os.fsencode(part)) <= _NAME_MAX for part in parts) and len(name) < 4096


def put(place: str, files: Sequence[Sequence[object]]) -> None:
    """files: of each its name, its content in base64, its mode.  Raises OSError, ValueError."""
    os.mkdir(place, 0o700)
    for name, data, mode in files:
        if not is_name(name) or not isinstance(mode, int):
            raise ValueError("a file that cannot be")
        path = os.path.join(place, str(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(base64.b64decode(str(data)))
            os.fchmod(file.fileno(), mode & 0o777)
    os.chmod(place, 0o777)  # for whatever user of an image; what is above it is its owner's alone


def open_output(place: str, name: str) -> int:
    """A descriptor of a regular file that the job has left.  Raises OSError."""
    *above, last = name.split("/")
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for part in above:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise FileNotFoundError(2, "not a file", name)
    return found


def look(place: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """(size, permissions) of what the job has left; a size of -1 where there is no such file."""
    found = []
    for name in names:
        try:
            fd = open_output(place, name)
        except OSError:
            found.append((-1, 0))
            continue
        status = os.fstat(fd)
        found.append((status.st_size, status.st_mode & 0o777))
        os.close(fd)
    return found


def read(place: str, name: str, offset: int, size: int) -> bytes:
    """A piece of it, b'' if there is none."""
    try:
        fd = open_output(place, name)
    except OSError:
        return b""
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)
