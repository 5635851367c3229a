"""The answers of a mounted index, apart from any FUSE binding.  Inode = position in the index + 1 (the root is 1)."""

from __future__ import annotations

import os
from functools import cached_property

from cafs import format as fmt
from cafs import linux
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import UnsupportedError
from cafs.index import xattrs_of
from cafs.reader import Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cafs.cache import Cache
    from cafs.index import Index
    from cafs.locator import Locator
    from cafs.reader import Key, Where
    from cafs.record import Recorder

BLOCK_SIZE = 4096
_OVERLAY = b"user.overlay."


class Tree(Reader):
    """Read-only answers.  Inode numbers in, plain values out; OSError with the errno that the kernel is to see.

    index: with the links of its directories counted, as columns.py has it.
    locators: where the objects of the index are; without one the store's footers are asked.
    """

    def __init__(
        self, index: Index, cache: Cache, locators: list[Locator], *, state: str = "", recorder: Recorder | None = None
    ) -> None:
        if index.header.is_layer:
            raise UnsupportedError("a layer cannot be mounted by itself")
        super().__init__(state, cache, recorder)
        self._is_hiding = linux.in_user_namespace()
        self.index = index
        self.locators = locators

    def inode(self, entry: int) -> int:
        """Inode number of an entry: that of its first name."""
        return self.index.inode(entry) + 1

    def child(self, directory: int, name: bytes) -> int | None:
        """Entry called NAME in a directory (an inode), or None."""
        return self.index.child(directory - 1, name)

    def mode(self, inode: int) -> int:
        """st_mode."""
        return fmt.TYPE_BITS[self.index.type[inode - 1]] | self.index.mode[inode - 1]

    def links(self, inode: int) -> int:
        """st_nlink: names in this tree; for a directory 2 and one for each directory in it."""
        return self.index.links.get(inode - 1, 1)

    @cached_property
    def blocks(self) -> int:
        """Of BLOCK_SIZE bytes, in all files."""
        return min(sum(self.index.size) // BLOCK_SIZE, (1 << 63) - 1)

    def device(self, inode: int) -> int:
        """st_rdev."""
        device = self.index.rdev.get(inode - 1)
        return os.makedev(*device) if device else 0

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """All attributes, but for those that an overlay without root over this would take for its own."""
        found = xattrs_of(self.index.xattrs.get(inode - 1, b"-"))
        return {name: value for name, value in found.items() if not name.startswith(_OVERLAY)} if self._is_hiding else found

    def read_ready(self, node: int, offset: int, size: int) -> Buffer | None:
        return super().read_ready(node, offset, size) if self.index.size[node - 1] else b""

    def all_locators(self) -> list[Locator]:
        return self.locators

    def key(self, node: int) -> Key:
        return self.index.object(node - 1), CHUNK_LIST if self.index.type[node - 1] == fmt.CHUNKED[0] else PLAIN

    def where(self, node: int) -> Where:
        key, size = self.key(node), self.index.size[node - 1]
        for locator in self.locators:
            place = locator.place(*key)
            if place:
                return size, place, locator
        return size, None, None

    def describe(self, node: int) -> str:
        """The path, and what it holds."""
        return f"{os.fsdecode(self.index.path(node - 1))!r}: {super().describe(node)}"
