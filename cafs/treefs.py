"""A Tree as the protocol of /dev/fuse wants it.  Nothing changes, so the kernel may keep all, also that a name is not there."""

from __future__ import annotations

import errno
import struct

from cafs.fusedev import FOREVER_S, TREE_FLAGS, entry_out, statfs_out
from cafs.tree import BLOCK_SIZE, Tree

_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<QQQQII")
_DIRENT = struct.Struct("<QQII")
_MISSING = _ENTRY.pack(0, 0, FOREVER_S, 0, 0, 0) + bytes(_ATTR.size)
_DOTS = (b".", b"..")
_U64, _U32 = 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF
_BLOCKS_MAX = (1 << 63) - 1


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
        size = index.size[at]
        seconds, ns = divmod(index.mtime_ns[at], 10**9)
        seconds &= _U64
        return _ATTR.pack(
            node, size, (size + 511) // 512, seconds, seconds, seconds, ns, ns, ns,
            self.mode(node), self.links(node), index.uid[at], index.gid[at], self.device(node) & _U32, BLOCK_SIZE, 0,
        )  # fmt: skip

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
                plus = bytes(_ENTRY.size + _ATTR.size)
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
        return statfs_out(min(sum(self.index.size) // BLOCK_SIZE, _BLOCKS_MAX), len(self.index))
