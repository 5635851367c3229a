"""A file tree in memory, built name by name as an archive lists it, and written as index lines.

Names are resolved inside the tree alone: a link in the archive leads to another place in this tree, never to the host's.
"""

from __future__ import annotations

from cafs import format as fmt
from cafs.errors import FormatError, quote
from cafs.format import Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LINKS_MAX = 40  # path_resolution(7)
WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
_AUFS = b".wh..wh."
"""Names that only aufs knows, and the opaque mark."""


class Inode:
    """What a name stands for.  Several names may share one.  children: of a directory, by name.  target: of a link."""

    __slots__ = ("children", "device", "digest", "gid", "kind", "mode", "mtime_ns", "shared", "size", "target", "uid", "xattrs")

    def __init__(self, kind: bytes, mode: int = 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size = 0
        self.digest = b""
        self.xattrs: tuple[tuple[bytes, bytes], ...] = ()
        self.target = b""
        self.device = (0, 0)
        self.shared = False
        self.children: dict[bytes, Inode] = {}

    def copy(self) -> Inode:
        """The same with no name and nothing in it yet."""
        made = Inode(self.kind, self.mode, self.uid, self.gid, self.mtime_ns)
        made.size, made.digest, made.xattrs = self.size, self.digest, self.xattrs
        made.target, made.device = self.target, self.device
        return made

    def entry(self, path: bytes) -> Entry:
        """Its record under a name."""
        return Entry(
            type=self.kind,
            path=path,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            mtime_ns=self.mtime_ns,
            size=self.size,
            digest=self.digest,
            xattrs=self.xattrs,
            target=self.target,
            device=self.device,
        )


class VirtualTree:
    """The tree.  Directories that nobody named are 0755, 0:0, mtime 0."""

    def __init__(self) -> None:
        self.root = Inode(fmt.DIRECTORY)
        self._late_links: list[tuple[bytes, Inode]] = []

    def put(self, name: bytes, inode: Inode) -> None:
        """Give an inode a name; what had the name is replaced, except that a directory keeps what is in it.

        An inode of kind HARDLINK names another by its target, which may come later.  Raises FormatError.
        """
        names = components(name)
        if not names:
            if inode.kind != fmt.DIRECTORY:
                raise FormatError("the root is not a directory")
            inode.children = self.root.children
            self.root = inode
            return
        directory = self._directory(names[:-1])
        if inode.kind == fmt.HARDLINK:
            found = self.find(inode.target)
            if found is None or found.kind == fmt.HARDLINK:
                self._late_links.append((name, inode))
            else:
                inode = _shared(found, name)
        before = directory.children.get(names[-1])
        if before and before.kind == inode.kind == fmt.DIRECTORY:
            inode.children = before.children
        directory.children[names[-1]] = inode

    def put_layer(self, members: Sequence[tuple[bytes, Inode]]) -> None:
        """Lay the members of an image's layer over what is there.  OCI image spec, layer.md, "Whiteouts".

        Whiteouts are about the layers below only, wherever in the archive they stand.  A whiteout may be a directory, as
        docker's are taken; what is in it does not count.  Raises FormatError.
        """
        of_aufs: set[tuple[bytes, ...]] = set()
        wanted = []
        for name, inode in members:
            parts = components(name)
            at = next((at for at, part in enumerate(parts) if part.startswith(WHITEOUT)), None)
            if at is None:
                wanted.append((name, inode))
            elif parts[at].startswith(_AUFS) and parts[at] != OPAQUE:
                of_aufs.add(tuple(parts[: at + 1]))
                wanted.append((name, inode))  # until all is there: hard links may lead to it
            else:
                self._remove(parts[:at], None if parts[at] == OPAQUE else parts[at].removeprefix(WHITEOUT))
        for name, inode in wanted:
            self.put(name, inode)
        self.finish()
        for *above, last in of_aufs:
            self._remove(above, last)

    def _remove(self, directory: list[bytes], name: bytes | None) -> None:
        """Remove a name from a directory, if both are there; None: all names."""
        try:
            found = self._directory(directory, make=False)
        except FormatError:
            return
        if name is None:
            found.children = {}
        else:
            found.children.pop(name, None)

    def find(self, name: bytes) -> Inode | None:
        """What a name stands for, links in its directories followed, the last component not; None if there is nothing."""
        names = components(name)
        try:
            directory = self._directory(names[:-1], make=False) if names else self.root
        except FormatError:
            return None
        return directory.children.get(names[-1]) if names else directory

    def _directory(self, names: list[bytes], *, make: bool = True) -> Inode:
        """The directory that these components lead to."""
        waiting = names[::-1]
        path = [self.root]
        links = 0
        while waiting:
            name = waiting.pop()
            if name == b"..":
                path = path[:-1] or [self.root]
                continue
            found = path[-1].children.get(name)
            if found is None and make:
                found = path[-1].children[name] = Inode(fmt.DIRECTORY)
            if found is None or found.kind not in (fmt.DIRECTORY, fmt.SYMLINK):
                raise FormatError(f"{quote(b'/'.join(names))} leads through {quote(name)}, which is no directory")
            if found.kind == fmt.DIRECTORY:
                path.append(found)
                continue
            links += 1
            if links > _LINKS_MAX:
                raise FormatError(f"{quote(b'/'.join(names))} leads through too many links")
            waiting += [part for part in found.target.split(b"/") if part not in (b"", b".")][::-1]
            if found.target.startswith(b"/"):
                path = [self.root]
        return path[-1]

    def finish(self) -> None:
        """Resolve the links whose target came later.  Raises FormatError if one never came."""
        waiting, self._late_links = self._late_links, []
        while waiting:
            left = []
            for name, inode in waiting:
                if self.find(name) is not inode:
                    continue  # another member took the name
                found = self.find(inode.target)
                if found is not None and found.kind == fmt.HARDLINK and found is not inode:
                    left.append((name, inode))
                    continue
                if found is None or found is inode:
                    raise FormatError(f"hard link {quote(name)} to {quote(inode.target)}, which is not there")
                names = components(name)
                self._directory(names[:-1]).children[names[-1]] = _shared(found, name)
            if len(left) == len(waiting):
                raise FormatError(f"hard link {quote(left[0][0])} leads to itself")
            waiting = left

    def entries(self, exclude: Callable[[bytes], bool] | None = None) -> Iterator[Entry]:
        """Every entry in index order, only the first name of an inode with its attributes.

        exclude: whether to leave out a path and all below it.
        """
        first: dict[int, bytes] = {}
        stack = [(b"/", self.root)]
        while stack:
            path, inode = stack.pop()
            if exclude and exclude(path):
                continue
            if inode.shared and first.setdefault(id(inode), path) != path:
                yield Entry(fmt.HARDLINK, path, target=first[id(inode)])
                continue
            yield inode.entry(path)
            prefix = path.rstrip(b"/") + b"/"
            stack += [(prefix + name, inode.children[name]) for name in sorted(inode.children, reverse=True)]


def components(name: bytes) -> list[bytes]:
    """The parts of an archive's name: leading and doubled slashes and '.' do not count.

    Raises FormatError on '..' and on what is longer than a path may be.
    """
    parts = [part for part in name.split(b"/", 2 * fmt.PATH_MAX) if part not in (b"", b".")]
    if sum(map(len, parts)) + len(parts) > fmt.PATH_MAX or max(map(len, parts), default=0) > fmt.NAME_MAX:
        raise FormatError(f"name {quote(name[:64])}... is too long")
    if b".." in parts:
        raise FormatError(f"name {quote(name)} has '..' in it")
    return parts


def _shared(inode: Inode, name: bytes) -> Inode:
    if inode.kind == fmt.DIRECTORY:
        raise FormatError(f"hard link {quote(name)} to a directory")
    inode.shared = True
    return inode
