"""The answers of a mounted index, apart from any FUSE binding.  Inode = position in the index + 1 (the root is 1)."""

from __future__ import annotations

import errno
import os
import stat
import threading

from cafs import atomic, chunks
from cafs import format as fmt
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import UnsupportedError
from cafs.index import xattrs_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.cache import Cache
    from cafs.index import Index

BLOCK_SIZE = 4096
_TYPE_BITS = {
    ord("f"): stat.S_IFREG,
    ord("F"): stat.S_IFREG,
    ord("d"): stat.S_IFDIR,
    ord("l"): stat.S_IFLNK,
    ord("c"): stat.S_IFCHR,
    ord("b"): stat.S_IFBLK,
    ord("p"): stat.S_IFIFO,
    ord("s"): stat.S_IFSOCK,
}


class Tree:
    """Read-only answers.  Inode numbers in, plain values out; OSError with the errno that the kernel is to see."""

    def __init__(self, index: Index, cache: Cache) -> None:
        if index.header.is_layer:
            raise UnsupportedError("a layer cannot be mounted by itself")
        self.index = index
        self.cache = cache
        self._lists: dict[int, chunks.ChunkList] = {}
        self._lock = threading.Lock()
        self._subdirectories = self._count_subdirectories()

    def _count_subdirectories(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for entry, kind in enumerate(self.index.type):
            if kind == 0x64 and entry:
                parent = self.index.parent[entry]
                counts[parent] = counts.get(parent, 0) + 1
        return counts

    def inode(self, entry: int) -> int:
        """Inode number of an entry: that of its first name."""
        return self.index.inode(entry) + 1

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Entry called NAME in a directory (an inode), or None."""
        return self.index.child(directory - 1, name)

    def mode(self, inode: int) -> int:
        """st_mode."""
        return _TYPE_BITS[self.index.type[inode - 1]] | self.index.mode[inode - 1]

    def links(self, inode: int) -> int:
        """st_nlink: names in this tree; for a directory 2 and one for each directory in it."""
        if self.index.type[inode - 1] == 0x64:
            return 2 + self._subdirectories.get(inode - 1, 0)
        return self.index.links.get(inode - 1, 1)

    def device(self, inode: int) -> int:
        """st_rdev."""
        return os.makedev(*self.index.rdev.get(inode - 1, (0, 0)))

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """All attributes."""
        return xattrs_of(self.index.xattrs.get(inode - 1, b"-"))

    def is_chunked(self, inode: int) -> bool:
        """Whether the file's content is read chunk by chunk."""
        return self.index.type[inode - 1] == fmt.CHUNKED[0]

    def open_object(self, inode: int) -> int:
        """Descriptor of a small file's content, verified.  May wait for the store.  Raises CafsError."""
        if not self.index.size[inode - 1]:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        fd = self.cache.open(self.index.object(inode - 1), PLAIN)
        if os.fstat(fd).st_size != self.index.size[inode - 1]:
            os.close(fd)
            raise OSError(errno.EIO, "object is not of the size that the index says")
        return fd

    def read_chunked(self, inode: int, offset: int, size: int) -> bytes:
        """Bytes of a chunked file.  May wait for the store.  Raises CafsError."""
        listed = self._chunk_list(inode)
        size = max(min(size, listed.size - offset), 0)
        parts = []
        while size:
            number, within = divmod(offset, listed.chunk_size)
            length = min(size, listed.length_at(number) - within)
            digest = listed.digest_at(number)
            if digest:
                fd = self.cache.open(digest, PLAIN)
                try:
                    parts.append(atomic.read_exactly(fd, length, within))
                finally:
                    os.close(fd)
            else:
                parts.append(bytes(length))
            offset += length
            size -= length
        return b"".join(parts)

    def _chunk_list(self, inode: int) -> chunks.ChunkList:
        listed = self._lists.get(inode)
        if not listed:
            header = self.index.header
            data = self.cache.read(self.index.object(inode - 1), CHUNK_LIST)
            listed = chunks.decode(data, header.hash_name, header.chunk_size)
            if listed.size != self.index.size[inode - 1]:
                raise OSError(errno.EIO, "chunk list is not of the size that the index says")
            with self._lock:
                self._lists[inode] = listed
        return listed
