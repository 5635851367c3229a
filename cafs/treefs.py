"""A Tree as the protocol of /dev/fuse wants it.  Nothing changes, so the kernel may keep all, also that a name is not there."""

from __future__ import annotations

import errno
import struct

from cafs.fusedev import FOREVER_S, TREE_FLAGS, attr, entry_out, no_entry_out, statfs_out
from cafs.tree import Tree

_DIRENT = struct.Struct("<QQII")
_MISSING, _UNKNOWN = no_entry_out(FOREVER_S), no_entry_out()
_DOTS = (b".", b"..")


class TreeFiles(Tree):
    """One mount.  Node = inode of the Tree."""

    flags = TREE_FLAGS

    def lookup(self, node: int, name: bytes) -> bytes:
        entry = self.child(node, name)
        if entry is None:
            return _MISSING
        inode = self.inode(entry)
        return entry_out(inode, self.getattr(inode))

    def getattr(self, node: int) -> bytes:
        index, at = self.index, node - 1
        owner = index.uid[at], index.gid[at]
        return attr(node, self.mode(node), index.size[at], self.links(node), index.mtime_ns[at], *owner, self.device(node))

    def readlink(self, node: int) -> bytes:
        try:
            return self.index.target[node - 1]
        except KeyError:
            raise OSError(errno.EINVAL, "not a link") from None

    def readdir(self, node: int, offset: int, size: int, *, is_plus: bool) -> bytes:
        """'.' and '..' have no number for the kernel to look up."""
        children = self.index.children(node - 1)
        records: list[bytes] = []
        room = size
        for position in range(offset, len(children) + len(_DOTS)):
            if position < len(_DOTS):
                name, inode, mode = _DOTS[position], self._dot(node, position), 0o40000
                plus = _UNKNOWN
            else:
                child = children[position - len(_DOTS)]
                name, inode = self.index.name(child), self.inode(child)
                mode = self.mode(inode)
                plus = entry_out(inode, self.getattr(inode)) if is_plus else b""
            record = _DIRENT.pack(inode, position + 1, len(name), mode >> 12) + name + bytes(-len(name) % 8)
            record = plus + record if is_plus else record
            room -= len(record)
            if room < 0:
                break
            records.append(record)
        return b"".join(records)

    def _dot(self, node: int, position: int) -> int:
        """Inode of '.' and '..'."""
        return self.index.parent[node - 1] + 1 if position and node > 1 else node

    def xattr(self, node: int, name: bytes) -> bytes:
        value = self.xattrs(node).get(name)
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return value

    def xattr_names(self, node: int) -> list[bytes]:
        return list(self.xattrs(node))

    def statfs(self) -> bytes:
        return statfs_out(self.blocks, len(self.index))
