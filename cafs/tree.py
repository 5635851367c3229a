"""The answers of a mounted index, apart from any FUSE binding.  Inode = position in the index + 1 (the root is 1)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import Counter, OrderedDict
from contextlib import contextmanager

from cafs import format as fmt
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import UnsupportedError
from cafs.index import xattrs_of
from cafs.partial import ChunkedFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.cache import Cache
    from cafs.index import Index
    from cafs.locator import Locator

BLOCK_SIZE = 4096
_FILES_MAX = 64
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
    """Read-only answers.  Inode numbers in, plain values out; OSError with the errno that the kernel is to see.

    locator: where the objects of the index are; without it the store's footers are asked.
    """

    def __init__(self, index: Index, cache: Cache, locator: Locator | None = None) -> None:
        if index.header.is_layer:
            raise UnsupportedError("a layer cannot be mounted by itself")
        self.index = index
        self.cache = cache
        self._locator = locator
        self._files: OrderedDict[int, ChunkedFile] = OrderedDict()
        self._users: Counter[int] = Counter()
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
        device = self.index.rdev.get(inode - 1)
        return os.makedev(*device) if device else 0

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """All attributes."""
        return xattrs_of(self.index.xattrs.get(inode - 1, b"-"))

    def is_chunked(self, inode: int) -> bool:
        """Whether the file's content is read chunk by chunk."""
        return self.index.type[inode - 1] == fmt.CHUNKED[0]

    def is_verified(self, inode: int) -> bool:
        """Whether `open_object` has succeeded for this content before, or there is nothing to open."""
        return not self.index.size[inode - 1] or self.cache.is_verified(self.index.object(inode - 1), PLAIN)

    def open_object(self, inode: int) -> int:
        """Descriptor of a small file's content, verified.  May wait for the store.  Raises CafsError."""
        if not self.index.size[inode - 1]:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        digest = self.index.object(inode - 1)
        fd = self.cache.open(digest, PLAIN, self._locator.place(digest, PLAIN) if self._locator else None)
        if os.fstat(fd).st_size != self.index.size[inode - 1]:
            os.close(fd)
            raise OSError(errno.EIO, "object is not of the size that the index says")
        return fd

    def read_chunked(self, inode: int, offset: int, size: int) -> bytes:
        """Bytes of a chunked file.  May wait for the store.  Raises CafsError."""
        with self._chunked(inode) as file:
            return file.read(offset, size)

    def read_ready(self, inode: int, offset: int, size: int) -> bytes | None:
        """The same if it is at hand, else None."""
        if inode not in self._files:
            return None
        with self._chunked(inode) as file:
            return file.read_ready(offset, size)

    def close(self) -> None:
        """Save what is known of chunked files."""
        for file in self._files.values():
            file.close()

    @contextmanager
    def _chunked(self, inode: int) -> Iterator[ChunkedFile]:
        """An open chunked file.  The latest _FILES_MAX stay open; none that is being read is closed."""
        made: ChunkedFile | None = None
        while True:
            with self._lock:
                if made and self._files.setdefault(inode, made) is not made:
                    made.close()
                if file := self._files.get(inode):
                    self._files.move_to_end(inode)
                    self._users[inode] += 1
                    self._close_idle()
                    break
            made = self._open_chunked(inode)  # without the lock: it may wait for the store
        try:
            yield file
        finally:
            with self._lock:
                self._users[inode] -= 1

    def _close_idle(self) -> None:
        idle = [inode for inode in self._files if not self._users[inode]]
        for inode in idle[: max(len(self._files) - _FILES_MAX, 0)]:
            self._files.pop(inode).close()
            del self._users[inode]

    def _open_chunked(self, inode: int) -> ChunkedFile:
        digest = self.index.object(inode - 1)
        place = self._locator.place(digest, CHUNK_LIST) if self._locator else None
        file = ChunkedFile(self.cache, digest, place, self._locator)
        if file.listed.size != self.index.size[inode - 1]:
            file.close()
            raise OSError(errno.EIO, "chunk list is not of the size that the index says")
        return file
