"""A layer that is put together path by path over the tree below it: what COPY, ADD and WORKDIR make.

Nothing is mounted and nothing is written but objects: entries name their content by digest.
"""

from __future__ import annotations

from dataclasses import replace

from cafs import format as fmt
from cafs.errors import CafsError, FormatError, quote
from cafs.format import Entry, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from cafs.lookup import Node

_LINKS_MAX = 255


class Draft:
    """below: the root of what the layer is laid over, None for an empty tree.  time_ns: of directories that it makes."""

    def __init__(self, below: Node | None, time_ns: int) -> None:
        self._below = below
        self._time_ns = time_ns
        self._entries: dict[bytes, Entry] = {}
        self._inodes: dict[bytes, Hashable] = {}
        self._nodes: dict[bytes, Node | None] = {b"/": below}
        self._cleared: set[bytes] = set()

    def get(self, path: bytes) -> Entry | None:
        """What is at a path, whose directories are none of them links."""
        if path in self._entries:
            return self._entries[path]
        node = self._node(path)
        if node is None:
            return Entry(fmt.DIRECTORY, b"/", 0o755, mtime_ns=self._time_ns) if path == b"/" else None
        return node.entry

    def _node(self, path: bytes) -> Node | None:
        """What is below at a path, unless the layer has something else above it."""
        if path not in self._nodes:
            above, _, name = path.rpartition(b"/")
            parent = self._node(above or b"/")
            replaced = self._entries.get(above or b"/")
            is_hidden = replaced is not None and replaced.type != fmt.DIRECTORY
            self._nodes[path] = parent.child(name) if parent and parent.is_directory and not is_hidden else None
        return self._nodes[path]

    def resolve(self, path: bytes) -> bytes:
        """Where a path leads when the links on it are followed, in this tree; what is not there stays as it is.

        Raises CafsError.
        """
        done, todo, links = b"", [part for part in path.split(b"/") if part not in (b"", b".")], 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                done = done.rpartition(b"/")[0]
                continue
            entry = self.get(done + b"/" + name)
            if entry is None or entry.type != fmt.SYMLINK:
                done += b"/" + name
                continue
            links += 1
            if links > _LINKS_MAX:
                raise CafsError(f"{quote(path)}: too many links")
            done = b"" if entry.target.startswith(b"/") else done
            todo = [part for part in entry.target.split(b"/") if part not in (b"", b".")] + todo
        return done or b"/"

    def make_directory(self, path: bytes, mode: int = 0o755, owner: tuple[int, int] = (0, 0), *, follows: bool = True) -> bytes:
        """Make a directory and those above it, where they are missing; returns where it is.

        follows: links lead on; else what is no directory is replaced by one.  Raises CafsError.
        """
        where = self.resolve(path) if follows else path
        parts = where.split(b"/")[1:] if where != b"/" else []
        for count in range(len(parts)):
            at = b"/" + b"/".join(parts[: count + 1])
            entry = self.get(at)
            if entry is None or (not follows and entry.type != fmt.DIRECTORY):
                self._entries[at] = Entry(fmt.DIRECTORY, at, mode, *owner, mtime_ns=self._time_ns)
                self._inodes.pop(at, None)
            elif entry.type != fmt.DIRECTORY:
                raise CafsError(f"{quote(at)} is not a directory")
        return where

    def put(self, entry: Entry, inode: Hashable = None, *, replaces: bool = False) -> None:
        """Put an entry at its path, whose directory is there; directories are merged.

        inode: the same for all names of one file.  replaces: also a directory by something else, and the reverse.

        Raises CafsError.
        """
        there = self.get(entry.path)
        is_directory = entry.type == fmt.DIRECTORY
        if there is not None and (there.type == fmt.DIRECTORY) != is_directory and replaces:
            self._clear(entry.path)
        elif there is not None and (there.type == fmt.DIRECTORY) != is_directory:
            what, there_is = ("a directory", "none") if is_directory else ("a file", "a directory")
            raise CafsError(f"cannot copy {what} over {quote(entry.path)}, which is {there_is}")
        try:
            fmt.check_limits(entry)
        except FormatError as error:
            raise CafsError(f"cannot copy to {quote(entry.path)}: {error}") from error
        self._entries[entry.path] = entry
        self._inodes.pop(entry.path, None)
        if inode is not None:
            self._inodes[entry.path] = inode

    def _clear(self, path: bytes) -> None:
        """Forget what is at a path and below it, in this layer and those that it is laid over."""
        below = path + b"/"
        for one in [one for one in self._entries if one == path or one.startswith(below)]:
            del self._entries[one]
            self._inodes.pop(one, None)
        self._nodes = {one: node for one, node in self._nodes.items() if not one.startswith(below)} | {path: None}
        self._cleared.add(path)

    def encode(self, header: Header, *, is_whole: bool = False, latest_ns: int = -1) -> bytes:
        """The index of the layer: what differs from below, and the directories above it; b'' if nothing does.

        is_whole: nothing is below, and the index is that of a tree.  latest_ns: as of commit.make_layer.
        """
        changed = {path: entry for path, entry in self._entries.items() if not self._is_as_below(path, entry)}
        changed = self._with_links(changed)
        for path in list(changed):
            while path != b"/":
                path = path.rpartition(b"/")[0] or b"/"
                if path in changed:
                    break
                entry = self.get(path)
                assert entry is not None
                changed[path] = replace(entry, path=path)
        if not changed and not is_whole:
            return b""
        if is_whole and b"/" not in changed:
            root = self.get(b"/")
            assert root is not None
            changed[b"/"] = root
        for path in self._cleared & changed.keys() if not is_whole else ():
            if changed[path].type == fmt.DIRECTORY:  # a file took the place of a directory before
                changed[path] = replace(changed[path], type=fmt.OPAQUE)
        if latest_ns >= 0:
            late = {path: one for path, one in changed.items() if one.mtime_ns > latest_ns}
            changed |= {path: replace(one, mtime_ns=latest_ns) for path, one in late.items()}
        rows = sorted(((fmt.order_key(path), entry) for path, entry in changed.items()), key=lambda row: row[0])
        lines = [
            Header(header.hash_name, header.chunk_size, is_layer=not is_whole).encode(),
            *(entry.encode() for _, entry in rows),
        ]
        return b"".join([*lines, fmt.encode_trailer(len(rows))])

    def _with_links(self, changed: dict[bytes, Entry]) -> dict[bytes, Entry]:
        """With all names of a file of which one is there: the first in order has the content, the others are links to it."""
        names: dict[Hashable, list[bytes]] = {}
        for path, inode in self._inodes.items():
            names.setdefault(inode, []).append(path)
        found = dict(changed)
        for paths in names.values():
            if len(paths) > 1 and any(path in changed for path in paths):
                first, *others = sorted(paths, key=fmt.order_key)
                found[first] = self._entries[first]
                found |= {path: Entry(fmt.HARDLINK, path, target=first) for path in others}
        return found

    def _is_as_below(self, path: bytes, entry: Entry) -> bool:
        node = self._node(path)
        return node is not None and node.entry == entry
