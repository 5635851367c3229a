"""Writing a tree to a directory: every name by the descriptor of its directory, no link ever followed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from cafs import acl, linux
from cafs import format as fmt
from cafs.atomic import write_all_at
from cafs.content import pieces
from cafs.errors import CafsError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.format import Entry
    from cafs.index import Index
    from cafs.store import Store

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES = {fmt.CHAR_DEVICE: stat.S_IFCHR, fmt.BLOCK_DEVICE: stat.S_IFBLK, fmt.FIFO: stat.S_IFIFO, fmt.SOCKET: stat.S_IFSOCK}


def checkout(index: Index, store: Store, target: str, *, merges: bool = False) -> None:
    """Fill TARGET, a new or empty directory.  As root owners are set; others own what they make.  Raises CafsError.

    What was written stays if it fails half-way.  merges: it may have something in it; files of the same names are replaced,
    each at once, nothing else is removed, and the directory itself stays as it is.
    """
    linux.raise_descriptor_limit()  # one a level
    try:
        is_new = not os.path.isdir(target)
        os.makedirs(target, exist_ok=True)
        if not merges and os.listdir(target):
            raise CafsError(f"cannot write to {quote(target)}: Directory not empty")
        top = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(f"cannot write to {quote(target)}", error) from error
    try:
        _Checkout(index, store, merges=merges, keeps_top=merges and not is_new).run(top)
    finally:
        os.close(top)


class _Checkout:
    def __init__(self, index: Index, store: Store, *, merges: bool, keeps_top: bool) -> None:
        self.index = index
        self.store = store
        self.merges = merges
        self.keeps_top = keeps_top
        self.is_root = os.geteuid() == 0

    def run(self, top: int) -> None:
        """Depth first; a directory gets its times when all in it is there."""
        open_directories: list[tuple[int, int]] = []  # (entry, descriptor) from the root to where we are
        try:
            for number in range(len(self.index)):
                parent = self.index.parent[number]
                while open_directories and open_directories[-1][0] != parent:
                    self._finish(*open_directories.pop())
                try:
                    if number == 0:
                        open_directories.append((0, os.dup(top)))
                    else:
                        where = open_directories[-1][1]
                        self._make(number, where, top)
                        if self.index.kind(number) == fmt.DIRECTORY:
                            open_directories.append((number, os.open(self.index.name(number), _DIRECTORY, dir_fd=where)))
                except OSError as error:
                    raise os_error(f"cannot write {quote(self.index.path(number))}", error) from error
            while open_directories:
                self._finish(*open_directories.pop())
        finally:
            for _, fd in open_directories:
                os.close(fd)

    def _make(self, number: int, where: int, top: int) -> None:
        entry, name = self.index.entry(number), self.index.name(number)
        if entry.type == fmt.DIRECTORY:
            self._make_directory(name, where)
        elif not self.merges:
            self._make_file(number, entry, name, where, top)
        else:
            temporary = b".cafs." + os.urandom(8).hex().encode()
            try:
                self._make_file(number, entry, temporary, where, top)
                os.rename(temporary, name, src_dir_fd=where, dst_dir_fd=where)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=where)
                raise

    def _make_directory(self, name: bytes, where: int) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=where)
        except FileExistsError:
            if not self.merges or not stat.S_ISDIR(os.stat(name, dir_fd=where, follow_symlinks=False).st_mode):
                raise

    def _make_file(self, number: int, entry: Entry, name: bytes, where: int, top: int) -> None:
        if entry.type in (fmt.FILE, fmt.CHUNKED):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=where)
            try:
                self._write(number, fd)
                self._attributes(entry, fd)
            finally:
                os.close(fd)
        elif entry.type == fmt.HARDLINK:
            self._link(number, name, where, top)
        elif entry.type == fmt.SYMLINK:
            os.symlink(entry.target, name, dir_fd=where)
            self._node_attributes(entry, name, where)
        else:
            os.mknod(name, 0o600 | _NODES[entry.type], os.makedev(*entry.device), dir_fd=where)
            self._node_attributes(entry, name, where)

    def _write(self, number: int, fd: int) -> None:
        found = pieces(self.index, number, self.store)
        data = found.data()
        for offset, length, is_data in found.runs:
            while is_data and length:
                piece = next(data)
                write_all_at(fd, piece, offset)
                offset, length = offset + len(piece), length - len(piece)
        os.ftruncate(fd, self.index.size[self.index.inode(number)])

    def _link(self, number: int, name: bytes, where: int, top: int) -> None:
        """Link to the first name, whose directory is found again without following a link."""
        *above, last = self.index.path(self.index.hardlink[number]).split(b"/")[1:]
        directory = os.dup(top)
        try:
            for part in above:
                inner = os.open(part, _DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = inner
            os.link(last, name, src_dir_fd=directory, dst_dir_fd=where, follow_symlinks=False)
        finally:
            os.close(directory)

    def _finish(self, number: int, fd: int) -> None:
        try:
            if number or not self.keeps_top:
                self._attributes(self.index.entry(number), fd)
        except OSError as error:
            raise os_error(f"cannot write {quote(self.index.path(number))}", error) from error
        finally:
            os.close(fd)

    def _attributes(self, entry: Entry, fd: int) -> None:
        """Owner first, for it clears set-user-id bits and capabilities."""
        if self.is_root:
            os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode if self.is_root else acl.mode_without(entry.mode, entry.xattrs))
        for name, value in entry.xattrs:
            if self.is_root or name.startswith(b"user."):
                os.setxattr(fd, name, value)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _node_attributes(self, entry: Entry, name: bytes, where: int) -> None:
        if self.is_root:
            os.chown(name, entry.uid, entry.gid, dir_fd=where, follow_symlinks=False)
        if entry.type != fmt.SYMLINK:
            os.chmod(name, entry.mode if self.is_root else acl.mode_without(entry.mode, entry.xattrs), dir_fd=where)
        for attribute, value in entry.xattrs:
            if self.is_root:
                os.setxattr(b"/proc/self/fd/%d/%s" % (where, name), attribute, value, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=where, follow_symlinks=False)
