"""Copying trees by descriptors: neither side's links are followed below the places that are given."""

from __future__ import annotations

import errno
import os
import stat

from cafs import atomic, linux

PIECE = 1 << 20
FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
CAPABILITY = "security.capability"


class Copier:
    """keep_owner: as in the source, else whoever copies.  keep_attributes: extended ones too, but for overlayfs' own.

    keep_power: set-user-id, capabilities of files, devices.  shift: from the source's ids to the target's, where one is in a
    user namespace.  Names of one file stay so.  weakened, left_out: names of files that were copied without power, and of what
    was not copied.
    """

    def __init__(self, *, keep_owner: bool, keep_attributes: bool = False, keep_power: bool = True, shift: int = 0) -> None:
        self.weakened: list[str] = []
        self.left_out: list[str] = []
        self._keep_owner = keep_owner
        self._keep_power = keep_power
        self._shift = shift
        self._keep_attributes = keep_attributes
        self._names: dict[tuple[int, int], str] = {}

    def copy(self, source: int, name: str, target: int, new_name: str) -> None:
        """NAME in one directory to NEW_NAME in another ('.': the directory itself).  Raises OSError."""
        self._copy(source, name, target, new_name, target, new_name)

    def _copy(self, source: int, name: str, target: int, new_name: str, top: int, path: str) -> None:
        """path: of the new name, from the directory TOP on."""
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            self._copy_directory(source, name, target, new_name, top, path)
            return
        if kind == stat.S_IFSOCK or (kind in (stat.S_IFCHR, stat.S_IFBLK) and not self._keep_power):
            self.left_out.append(path)
            return
        first = self._names.setdefault((status.st_dev, status.st_ino), path) if status.st_nlink > 1 else path
        if first != path and self._link(top, first, target, new_name):
            return
        if kind == stat.S_IFREG:
            self._copy_file(source, name, target, new_name, path)
            return
        clear(target, new_name)
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
        else:
            try:
                os.mknod(new_name, status.st_mode, status.st_rdev, dir_fd=target)
            except PermissionError:  # without root there are no devices
                self.left_out.append(path)
                return
            os.chmod(new_name, stat.S_IMODE(status.st_mode), dir_fd=target)
        if self._keep_owner:
            os.chown(new_name, *self._owner(status), dir_fd=target, follow_symlinks=False)

    def _owner(self, status: os.stat_result) -> tuple[int, int]:
        return shifted(status.st_uid, self._shift), shifted(status.st_gid, self._shift)

    def _link(self, top: int, first: str, target: int, new_name: str) -> bool:
        """One more name of a file that was copied; whether that was possible."""
        try:
            parent = linux.open_in_root(top, os.path.dirname(first) or ".", os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            clear(target, new_name)
            os.link(os.path.basename(first), new_name, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
            return True
        except OSError:
            return False  # it was too many, or is on another mount
        finally:
            os.close(parent)

    def _copy_directory(self, source: int, name: str, target: int, new_name: str, top: int, path: str) -> None:
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
                    self._copy(one, child, other, child, top, os.path.join(path, child))
                if is_new:
                    self.copy_status(one, other)
            finally:
                os.close(other)
        finally:
            os.close(one)

    def _copy_file(self, source: int, name: str, target: int, new_name: str, path: str) -> None:
        one = os.open(name, os.O_RDONLY | FLAGS, dir_fd=source)
        try:
            if not stat.S_ISREG(os.fstat(one).st_mode):
                return  # it was changed just now
            clear(target, new_name)
            other = os.open(new_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, dir_fd=target)
            try:
                while data := os.read(one, PIECE):
                    atomic.write_all(other, data)
                if not self.copy_status(one, other):
                    self.weakened.append(path)
            finally:
                os.close(other)
        finally:
            os.close(one)

    def copy_status(self, source: int, target: int) -> bool:
        """Mode, times, and what else is kept, of an open file or directory to another; whether it kept its power."""
        status = os.fstat(source)
        mode = stat.S_IMODE(status.st_mode)
        names = os.listxattr(source)
        is_strong = self._keep_power or not (mode & 0o6000 or CAPABILITY in names)
        if self._keep_owner:
            os.fchown(target, *self._owner(status))
        if not self._keep_power:
            mode &= 0o1777  # set-user-id of another is not of ours
        os.fchmod(target, mode)
        for name in names:
            if name == CAPABILITY:
                is_strong = is_strong and set_attribute(target, name, os.getxattr(source, name))
            elif self._keep_attributes and not name.startswith("trusted.overlay."):
                os.setxattr(target, name, os.getxattr(source, name))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        return is_strong


def set_attribute(fd: int, name: str, value: bytes) -> bool:
    """Set an extended attribute; return whether that could be."""
    try:
        os.setxattr(fd, name, value)
        return True
    except OSError:
        return False


def shifted(number: int, shift: int) -> int:
    """An id on the other side: into a user namespace of 65536 ids or, SHIFT being negative, out of it.

    One that is not among them, of a file that was bound from the host, stays as it is.
    """
    is_inside = 0 <= number < 65536 if shift > 0 else 0 <= number + shift < 65536
    return number + shift if is_inside else number


def clear(directory: int, name: str) -> None:
    """Make room for a new file: what has its name goes, unless it is a directory, or something is mounted on it.

    unlink(2) knows the mount points of our own namespace alone, and would take away what is mounted in a container's.
    """
    try:
        fd = os.open(name, os.O_PATH | FLAGS, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        if linux.mount_id(fd) != linux.mount_id(directory):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)
    finally:
        os.close(fd)
    os.unlink(name, dir_fd=directory)
