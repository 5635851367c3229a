"""Large values of calls on a worker: fetched in pieces before a call, kept in a file after it.  cpool-function(7), VALUES.

Part of the agent's program: standard library only, Python 3.9.  What a container leaves is a stranger's: no link is followed.
"""

from __future__ import annotations

import json
import os
import re
import stat

from cafs.removing import remove_tree
from pool import calls, staging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SIZE_MAX = 4 << 30
_AHEAD = 16
_IN, _OUT = "/run/cpool/in", "/run/cpool/out"


def size_of(body: bytes) -> int:
    """Bytes of the value that a reference stands for.  Raises ValueError, LookupError, TypeError."""
    size = calls.loads(body)["size"]
    if type(size) is not int or not 0 <= size <= SIZE_MAX:
        raise ValueError("a value has at most 4 GiB")
    return size


class Pull:
    """A value that is on its way to a file.  flags: of the call.  Raises OSError, ValueError, LookupError, TypeError."""

    def __init__(self, place: str, name: str, body: bytes, flags: int) -> None:
        self.flags = flags
        self._size = size_of(body)
        status = os.statvfs(place)
        if self._size > status.f_bavail * status.f_frsize:
            raise OSError(28, "No space left on device")
        self._path, self._name = os.path.join(place, name), name
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        os.fchmod(self._fd, 0o644)
        self._many = -(-self._size // calls.PIECE_SIZE)
        self._next = 0
        self._missing = set(range(self._many))

    def asked(self) -> list[int]:
        """What was asked for and has not come."""
        return sorted(piece for piece in self._missing if piece < self._next)

    def first(self) -> Iterable[int]:
        """The pieces to ask for at once."""
        self._next = min(_AHEAD, self._many)
        return range(self._next)

    def take(self, piece: int, data: bytes) -> int | None:
        """One has come; the piece to ask for now, if any.  Raises OSError, ValueError."""
        wanted = min(calls.PIECE_SIZE, self._size - piece * calls.PIECE_SIZE)
        if piece not in self._missing or len(data) != wanted:
            raise ValueError("a piece that was not asked for")
        os.pwrite(self._fd, data, piece * calls.PIECE_SIZE)
        self._missing.discard(piece)
        if self._next == self._many:
            return None
        self._next += 1
        return self._next - 1

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return not self._missing

    def reference(self) -> bytes:
        """For the instance."""
        return json.dumps({"$ref": f"{_IN}/{self._name}", "size": self._size}).encode()

    def remove(self) -> None:
        """It is not wanted any more."""
        os.close(self._fd)
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass


class Kept:
    """An answer that an instance left in OUT, moved to PLACE.  Raises OSError, ValueError, LookupError, TypeError."""

    def __init__(self, out: str, place: str, name: str, body: bytes) -> None:
        path = calls.loads(body)["$ref"]
        match = re.fullmatch(rf"{_OUT}/([0-9A-Za-z._-]{{1,200}})", path)
        if not match or not staging.is_name(match[1]):
            raise ValueError("it is no file in /run/cpool/out")
        self._path, self._name = os.path.join(place, name), name
        found = os.path.join(out, match[1])
        if not stat.S_ISREG(os.lstat(found).st_mode):
            raise ValueError("it is no file")
        os.rename(found, self._path)
        status = os.lstat(self._path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > SIZE_MAX:
            self.remove()
            raise ValueError("it is no file, or larger than 4 GiB")
        self.size = status.st_size
        try:
            self.piece(calls.NOBODY, 0)
        except OSError:
            self.remove()
            raise

    def reference(self) -> bytes:
        """For the caller."""
        return json.dumps({"$ref": self._name, "size": self.size}).encode()

    def piece(self, call: bytes, number: int) -> bytes:
        """A frame.  Raises OSError."""
        fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return piece_of(call, number, os.pread(fd, calls.PIECE_SIZE, number * calls.PIECE_SIZE), self.size)
        finally:
            os.close(fd)

    def remove(self) -> None:
        """It has arrived, or is not wanted any more."""
        try:
            os.unlink(self._path)
        except IsADirectoryError:
            remove_tree(self._path)


def piece_of(call: bytes, number: int, data: bytes, size: int) -> bytes:
    """The frame of a piece of a value of SIZE bytes."""
    is_last = (number + 1) * calls.PIECE_SIZE >= size
    return calls.frame(calls.PIECE, call, data, flags=calls.LAST if is_last else 0, a=number)


def clear(place: str) -> None:
    """What a host before has kept is nobody's."""
    remove_tree(place)
    os.makedirs(place, mode=0o700, exist_ok=True)
