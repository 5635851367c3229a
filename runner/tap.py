"""Taking what a container writes out of a named pipe and into its log; a kill in between neither loses nor doubles a byte.

What is in the pipe is looked at by tee(2), logged, and only then taken out.  A file, `taking`, says how far that has come:
before a record is logged, how long it is and where in the log it begins; after it was taken out, nothing.  Who comes after a
kill in between finds out whether the record is in the log, and whether the pipe still begins with it.
"""

from __future__ import annotations

import mmap
import os
import struct

from cafs import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.logs import Log

PIECE = 1 << 16
_SLOT = struct.Struct("<QQ")  # bytes of the record, or 0; size of the log before it
_NAMES = ("stdout", "stderr")


def _slots(path: str) -> mmap.mmap:
    """A file of them, with room on the disk: where that is missing, writing to the memory would be SIGBUS.  Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SLOT.size * len(_NAMES))
        return mmap.mmap(fd, _SLOT.size * len(_NAMES))
    finally:
        os.close(fd)


class Taps:
    """The pipes of one container.  log: None to keep nothing."""

    def __init__(self, path: str, log: Log | None) -> None:
        self._log = log
        try:
            self._slots = _slots(path)
        except OSError:  # a full disk, most likely: then nobody can go on after a kill
            self._slots = mmap.mmap(-1, _SLOT.size * len(_NAMES))
        self._inner, self._outer = os.pipe2(os.O_CLOEXEC)

    def recover(self, fd: int, name: str) -> None:
        """After another monitor was killed: take out what it has logged and not taken out."""
        at = _NAMES.index(name) * _SLOT.size
        size, before = _SLOT.unpack_from(self._slots, at)
        if size and self._log and self._log.size() != before:
            last = self._log.last(name)
            if last is not None and len(last) == size and self._peek(fd, size) == last:
                _read(fd, size)
        self._slots[at : at + _SLOT.size] = bytes(_SLOT.size)

    def take(self, fd: int, name: str) -> bytes | None:
        """What is in the pipe, logged and taken out; None if there is nothing."""
        if self._log is None:
            return _read(fd, PIECE) or None
        data = self._peek(fd, PIECE)
        if not data:
            return None
        at = _NAMES.index(name) * _SLOT.size
        self._slots[at : at + _SLOT.size] = _SLOT.pack(len(data), self._log.size())
        self._log.write(name, data)
        _read(fd, len(data))
        self._slots[at : at + _SLOT.size] = bytes(_SLOT.size)
        return data

    def _peek(self, fd: int, size: int) -> bytes:
        try:
            count = linux.tee(fd, self._outer, size)
        except BlockingIOError:
            return b""
        return _read(self._inner, count) if count else b""


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        try:
            part = os.read(fd, size)
        except BlockingIOError:
            break
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
