"""Walk a directory tree by directory descriptors, in the order of an index, without following a link.

What is found is described, not read: the content of regular files is create.py's.  A directory that changes while it is
read is an error that names it, as is a name that vanishes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from threading import Lock

from cafs import format as fmt
from cafs.errors import CafsError, NotFound, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cafs.format import Entry

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

KIND_OF_MODE = {
    stat.S_IFREG: fmt.FILE,
    stat.S_IFDIR: fmt.DIRECTORY,
    stat.S_IFLNK: fmt.SYMLINK,
    stat.S_IFCHR: fmt.CHAR_DEVICE,
    stat.S_IFBLK: fmt.BLOCK_DEVICE,
    stat.S_IFIFO: fmt.FIFO,
    stat.S_IFSOCK: fmt.SOCKET,
}


_USERS = Lock()


class OpenDirectory:
    """A directory descriptor shared by the entries in it; closed with the last user."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._users = 1

    def hold(self) -> OpenDirectory:
        """One user more."""
        with _USERS:
            self._users += 1
        return self

    def release(self) -> None:
        """One user less; on any thread."""
        with _USERS:
            self._users -= 1
            is_last = not self._users
        if is_last:
            os.close(self.fd)


@dataclass(slots=True)
class Found:
    """One entry of the tree.  directory: held for the caller, who releases it; name: in that directory.

    content: (kind, digest) of a file where that is known.  ready: the whole entry, if nothing has to be looked at.
    below: what has the path in the tree that this one is laid over, if it is.  is_stub: a directory that counts only for what
    is in it.
    """

    path: bytes
    kind: bytes
    status: os.stat_result
    directory: OpenDirectory
    name: bytes
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    target: bytes = b""
    content: tuple[int, bytes] | None = None
    ready: Entry | None = None
    below: Entry | None = None
    is_stub: bool = False


class _Level:
    """A directory that is being walked.  path: in the tree, empty for the root."""

    __slots__ = ("_before", "directory", "names", "path")

    def __init__(self, directory: OpenDirectory, path: bytes) -> None:
        self.directory = directory
        self.path = path
        self._before = os.fstat(directory.fd)
        self.names = iter(sorted(map(os.fsencode, os.listdir(directory.fd))))

    def check_unchanged(self) -> None:
        """After the last name."""
        after = os.fstat(self.directory.fd)
        if (self._before.st_mtime_ns, self._before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns):
            raise CafsError(f"directory {quote(self.path or b'/')} changed while it was read")


@dataclass(slots=True)
class Walk:
    """The options of a walk, and what it left out.

    exclude: whether to leave a path (absolute in the tree, as in the index) and all below it out.
    skip_unreadable: list what cannot be read in `skipped` instead of failing.
    left_out: number of xattrs that an index does not list.
    """

    root: str
    exclude: Callable[[bytes], bool] | None = None
    one_file_system: bool = False
    skip_unreadable: bool = False
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    left_out: int = 0

    def run(self) -> Iterator[Found]:
        """Yield every entry in index order.  Raises CafsError naming what cannot be read."""
        try:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error(f"cannot index {quote(self.root)}", error) from error
        top = OpenDirectory(fd)
        status = os.fstat(fd)
        yield Found(b"/", fmt.DIRECTORY, status, top.hold(), b".", self._xattrs(top, b"."))
        yield from self._below(top, status.st_dev)

    def failed(self, path: bytes, error: OSError) -> None:
        """Note a path that cannot be read, or raise."""
        reason = "it vanished while the tree was read" if error.errno in (errno.ENOENT, errno.ESTALE) else None
        if self.skip_unreadable and reason is None:
            self.skipped.append((path, error.strerror or str(error)))
            return
        if reason:
            raise NotFound(f"cannot read {quote(path)}: {reason}") from error
        raise CafsError(
            f"cannot read {quote(path)}: {error.strerror}", hint="--skip-unreadable leaves such files out and exits 3"
        ) from error

    def _below(self, top: OpenDirectory, device: int) -> Iterator[Found]:
        """Everything below the top, depth first: a stack instead of recursion, for a generator pays for each level."""
        stack: list[_Level] = []
        try:
            stack.append(_Level(top, b""))
            while stack:
                level = stack[-1]
                name = next(level.names, None)
                if name is None:
                    level.check_unchanged()
                    stack.pop().directory.release()
                    continue
                found, child = self._name(level.directory, name, level.path + b"/" + name)
                if found is None:
                    continue
                if child and self.one_file_system and found.status.st_dev != device:
                    child.release()
                elif child:
                    try:
                        stack.append(_Level(child, found.path))
                    except OSError as error:
                        child.release()
                        found.directory.release()
                        self.failed(found.path, error)
                        continue
                yield found
        finally:
            for level in stack:
                level.directory.release()

    def _name(self, directory: OpenDirectory, name: bytes, path: bytes) -> tuple[Found | None, OpenDirectory | None]:
        """What is called NAME, and its descriptor if it is a directory to be entered."""
        if self.exclude and self.exclude(path):
            return None, None
        child: OpenDirectory | None = None
        try:
            status = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
            kind = KIND_OF_MODE[stat.S_IFMT(status.st_mode)]
            if kind == fmt.DIRECTORY:
                child = OpenDirectory(os.open(name, OPEN_DIRECTORY, dir_fd=directory.fd))
                status = os.fstat(child.fd)
            target = os.readlink(name, dir_fd=directory.fd) if kind == fmt.SYMLINK else b""
            xattrs = self._xattrs(child or directory, b"." if child else name)
        except OSError as error:
            if child:
                child.release()
            self.failed(path, error)
            return None, None
        return Found(path, kind, status, directory.hold(), name, xattrs, target), child

    def _xattrs(self, directory: OpenDirectory, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
        """The attributes that an index lists, by name.  Through /proc/self/fd: there is no listxattrat before 6.13."""
        where = b"/proc/self/fd/%d/%s" % (directory.fd, name)
        pairs = []
        for attribute in xattr_names(where):
            if fmt.xattr_allowed(attribute):
                pairs.append((attribute, os.getxattr(where, attribute, follow_symlinks=False)))
            else:
                self.left_out += 1
        return tuple(pairs)


def xattr_names(path: bytes) -> list[bytes]:
    """The names of the attributes of a path, which is not followed, sorted."""
    try:
        return sorted(map(os.fsencode, os.listxattr(path, follow_symlinks=False)))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return []
        raise
