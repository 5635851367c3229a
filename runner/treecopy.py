"""Copying trees by descriptors: neither side's links are followed below the places that are given."""

from __future__ import annotations

import os
import stat

from cafs import atomic

PIECE = 1 << 20
FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Copier:
    """keep_owner: as in the source, else whoever copies.  keep_attributes: extended ones too, but for overlayfs' own.

    Devices and sockets are left out.  shift: from the source's ids to the target's, where one is in a user namespace.
    """

    def __init__(self, *, keep_owner: bool, keep_attributes: bool = False, shift: int = 0) -> None:
        self._keep_owner = keep_owner
        self._shift = shift
        self._keep_attributes = keep_attributes

    def copy(self, source: int, name: str, target: int, new_name: str) -> None:
        """NAME in one directory to NEW_NAME in another ('.': the directory itself).  Raises OSError."""
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._copy_directory(source, name, target, new_name)
        elif stat.S_ISREG(status.st_mode):
            self._copy_file(source, name, target, new_name)
        elif stat.S_ISLNK(status.st_mode):
            clear(target, new_name)
            os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
            if self._keep_owner:
                owner = shifted(status.st_uid, self._shift), shifted(status.st_gid, self._shift)
                os.chown(new_name, *owner, dir_fd=target, follow_symlinks=False)
        elif stat.S_ISFIFO(status.st_mode):
            clear(target, new_name)
            os.mkfifo(new_name, stat.S_IMODE(status.st_mode), dir_fd=target)

    def _copy_directory(self, source: int, name: str, target: int, new_name: str) -> None:
        one = os.open(name, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=source)
        try:
            is_new = False
            if new_name != ".":
                try:
                    os.mkdir(new_name, 0o700, dir_fd=target)
                    is_new = True
                except FileExistsError:
                    pass
            other = os.open(new_name, os.O_RDONLY | os.O_DIRECTORY | FLAGS, dir_fd=target)
            try:
                for child in sorted(os.listdir(one)):
                    self.copy(one, child, other, child)
                if is_new:
                    self.copy_status(one, other)
            finally:
                os.close(other)
        finally:
            os.close(one)

    def _copy_file(self, source: int, name: str, target: int, new_name: str) -> None:
        one = os.open(name, os.O_RDONLY | FLAGS, dir_fd=source)
        try:
            if not stat.S_ISREG(os.fstat(one).st_mode):
                return  # it was changed just now
            clear(target, new_name)
            other = os.open(new_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, dir_fd=target)
            try:
                while data := os.read(one, PIECE):
                    atomic.write_all(other, data)
                self.copy_status(one, other)
            finally:
                os.close(other)
        finally:
            os.close(one)

    def copy_status(self, source: int, target: int) -> None:
        """Mode, times, and what else is kept, of an open file or directory to another."""
        status = os.fstat(source)
        mode = stat.S_IMODE(status.st_mode)
        if self._keep_owner:
            os.fchown(target, shifted(status.st_uid, self._shift), shifted(status.st_gid, self._shift))
        else:
            mode &= 0o1777  # set-user-id of another is not of ours
        os.fchmod(target, mode)
        for name in os.listxattr(source) if self._keep_attributes else []:
            if not name.startswith("trusted.overlay."):
                os.setxattr(target, name, os.getxattr(source, name))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def shifted(number: int, shift: int) -> int:
    """An id on the other side: into a user namespace of 65536 ids or, SHIFT being negative, out of it.

    One that is not among them, of a file that was bound from the host, stays as it is.
    """
    is_inside = 0 <= number < 65536 if shift > 0 else 0 <= number + shift < 65536
    return number + shift if is_inside else number


def clear(directory: int, name: str) -> None:
    """Make room for a new file: what has its name goes, unless it is a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
