"""Walk the upper directory of an overlay, as what it changes in the tree below: in index order, by descriptors.

What was only renamed, or had its attributes changed, is not read: overlayfs leaves marks that say where the content, or a whole
directory, is below.  They are put in terms of an index here.  Source: Documentation/filesystems/overlayfs.rst, fs/overlayfs/.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace

from cafs import format as fmt
from cafs import linux
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, FormatError, UnsupportedError, os_error, quote
from cafs.format import Entry
from cafs.walk import KIND_OF_MODE, OPEN_DIRECTORY, Found, OpenDirectory, xattr_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.lookup import Node

    Attributes = dict[bytes, bytes]

TRUSTED, USER = b"trusted.overlay.", b"user.overlay."
"""What the names of overlayfs' own attributes begin with; the second with the mount option userxattr."""


def prefix() -> bytes:
    """The one that overlays are mounted with here."""
    return USER if linux.in_user_namespace() else TRUSTED


_OPAQUE, _REDIRECT, _METACOPY, _WHITEOUT = b"opaque", b"redirect", b"metacopy", b"whiteout"
_KNOWN = {_OPAQUE, _REDIRECT, _METACOPY, _WHITEOUT, b"origin", b"impure", b"uuid", b"nlink", b"upper", b"protattr"}
_ESCAPED = b"overlay."
"""Of an overlay in the container, whose attributes the one below it has renamed."""


class _Level:
    """A directory that is being walked.

    path: in the tree.  below: the directory that shows through it, None if none does.  is_moved: that is, or is below, one with
    another path, so that all of it is listed.
    """

    __slots__ = ("below", "directory", "is_moved", "names", "path", "upper")

    def __init__(self, directory: OpenDirectory, path: bytes, below: Node | None, *, is_moved: bool) -> None:
        self.directory = directory
        self.path = path
        self.below = below
        self.is_moved = is_moved
        self.upper = set(map(os.fsencode, os.listdir(directory.fd)))
        self.names = iter(sorted(self.upper | set(below.children()) if is_moved and below else self.upper))

    def same(self, name: bytes) -> Node | None:
        """What NAME is below, if that shows through here."""
        return self.below.child(name) if self.below else None


@dataclass(slots=True)
class UpperWalk:
    """upper: path of the directory, which nobody writes to now.  below: the root of the tree that it was laid over.

    prefix: TRUSTED or USER.  stubs: paths that were made to mount on; they are left out if they are empty and not below.
    left_out, skipped: as of a Walk.
    """

    upper: str
    below: Node
    prefix: bytes = TRUSTED
    stubs: frozenset[bytes] = frozenset()
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    left_out: int = 0
    _moved: dict[tuple[str, bytes], bytes] = field(default_factory=dict)

    def run(self) -> Iterator[Found]:
        """Yield what is in the upper directory, and what it has moved.  Raises CafsError."""
        try:
            fd = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error(f"cannot index {quote(self.upper)}", error) from error
        top = OpenDirectory(fd)
        status, (xattrs, _) = os.fstat(fd), self._xattrs(top, b".")
        yield Found(b"/", fmt.DIRECTORY, status, top.hold(), b".", xattrs, below=self.below.entry)
        yield from self._below(top)

    def failed(self, path: bytes, error: OSError) -> None:
        """Nothing may be missing in a layer."""
        raise CafsError(f"cannot read {quote(path)}: {error.strerror}") from error

    def _below(self, top: OpenDirectory) -> Iterator[Found]:
        stack = [_Level(top, b"", self.below, is_moved=False)]
        try:
            while stack:
                level = stack[-1]
                name = next(level.names, None)
                if name is None:
                    stack.pop().directory.release()
                elif name not in level.upper:
                    yield from self._from_below(level, name)
                else:
                    try:
                        found, inner = self._name(level, name)
                    except OSError as error:
                        self.failed(level.path + b"/" + name, error)
                        continue
                    if inner:
                        stack.append(inner)
                    if found:
                        yield found
        finally:
            for level in stack:
                level.directory.release()

    def _from_below(self, level: _Level, name: bytes) -> Iterator[Found]:
        """What a directory that was moved has brought along."""
        node = level.same(name)
        if node is None:
            return
        old, new = node.path, level.path + b"/" + name
        status = os.fstat(level.directory.fd)
        for one in (node, *(node.below() if node.is_directory else ())):
            entry = self._moved_entry(one, new + one.path[len(old) :])
            yield Found(entry.path, entry.type, status, level.directory.hold(), b"", ready=entry)

    def _moved_entry(self, node: Node, path: bytes) -> Entry:
        """An entry at its new path; what were names of one file stay that, as far as they were moved."""
        entry = replace(node.entry, path=path)
        if not node.is_directory:
            first = self._moved.setdefault(node.key, path)
            if first != path:
                entry = Entry(fmt.HARDLINK, path, target=first)
        try:
            fmt.check_limits(entry)
        except FormatError as error:
            raise CafsError(f"cannot index {quote(path)}: {error}") from error
        return entry

    def _name(self, level: _Level, name: bytes) -> tuple[Found | None, _Level | None]:
        """What is called NAME, and the level of it if it is a directory."""
        path = level.path + b"/" + name
        status = os.stat(name, dir_fd=level.directory.fd, follow_symlinks=False)
        kind = KIND_OF_MODE[stat.S_IFMT(status.st_mode)]
        if kind == fmt.DIRECTORY:
            child = OpenDirectory(os.open(name, OPEN_DIRECTORY, dir_fd=level.directory.fd))
            try:
                return self._directory(level, name, path, child)
            except BaseException:
                child.release()
                raise
        xattrs, marks = self._xattrs(level.directory, name)
        same = level.same(name)
        if (kind == fmt.CHAR_DEVICE and not status.st_rdev) or _WHITEOUT in marks:
            if level.is_moved or same is None:
                return None, None
            gone = Entry(fmt.WHITEOUT, path)
            return Found(path, fmt.WHITEOUT, status, level.directory.hold(), name, ready=gone), None
        if path in self.stubs and same is None and kind == fmt.FILE and not status.st_size:
            return None, None
        target = os.readlink(name, dir_fd=level.directory.fd) if kind == fmt.SYMLINK else b""
        found = Found(path, kind, status, level.directory.hold(), name, xattrs, target)
        if _METACOPY in marks and kind == fmt.FILE and status.st_size:
            found.content = self._content(level, name, path, status.st_size, marks)
        if same and not level.is_moved:
            found.below = same.entry
        return found, None

    def _content(self, level: _Level, name: bytes, path: bytes, size: int, marks: Attributes) -> tuple[int, bytes]:
        """Of a file that was not copied up but for its attributes."""
        node = self._origin(level, name, marks)
        if node is None or node.entry.type not in (fmt.FILE, fmt.CHUNKED) or node.entry.size != size:
            raise FormatError(f"what {quote(path)} was below is not there")
        return (PLAIN if node.entry.type == fmt.FILE else CHUNK_LIST), node.entry.digest

    def _origin(self, level: _Level, name: bytes, marks: Attributes) -> Node | None:
        """What shows through NAME: what has the name below, unless it was renamed."""
        redirect = marks.get(_REDIRECT)
        if redirect is None:
            return level.same(name)
        return self.below.walk(redirect) if redirect.startswith(b"/") else level.same(redirect)

    def _directory(self, level: _Level, name: bytes, path: bytes, child: OpenDirectory) -> tuple[Found | None, _Level | None]:
        status, (xattrs, marks) = os.fstat(child.fd), self._xattrs(child, b".")
        same = level.same(name)
        origin = None if marks.get(_OPAQUE) == b"y" else self._origin(level, name, marks)
        if _REDIRECT in marks and (origin is None or not origin.is_directory):
            raise FormatError(f"what {quote(path)} was below is not there")
        if origin and not origin.is_directory:
            origin = None
        is_moved = level.is_moved or (origin is not None and (same is None or origin.path != same.path))
        inner = _Level(child, path, origin, is_moved=is_moved and origin is not None)
        hides = same is not None and same.is_directory and not level.is_moved and (origin is None or is_moved)
        found = Found(path, fmt.OPAQUE if hides else fmt.DIRECTORY, status, level.directory.hold(), name, xattrs)
        if same and not level.is_moved and not hides:
            found.below = same.entry
        found.is_stub = same is None and path in self.stubs
        return found, inner

    def _xattrs(self, directory: OpenDirectory, name: bytes) -> tuple[tuple[tuple[bytes, bytes], ...], Attributes]:
        """The attributes that an index lists, and overlayfs' own."""
        where = b"/proc/self/fd/%d/%s" % (directory.fd, name)
        pairs: list[tuple[bytes, bytes]] = []
        marks: Attributes = {}
        for attribute in xattr_names(where):
            if attribute.startswith(self.prefix):
                mark = attribute[len(self.prefix) :]
                if mark.startswith(_ESCAPED):
                    self.left_out += 1
                elif mark not in _KNOWN:
                    raise UnsupportedError(f"overlayfs' attribute {quote(attribute)} is not known here")
                else:
                    marks[mark] = os.getxattr(where, attribute, follow_symlinks=False)
            elif fmt.xattr_allowed(attribute):
                pairs.append((attribute, os.getxattr(where, attribute, follow_symlinks=False)))
            else:
                self.left_out += 1
        return tuple(pairs), marks
