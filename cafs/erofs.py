"""The metadata image of an index: an EROFS with every inode and no data, whose files point at objects for overlayfs.

cafs-erofs(7) says what of the format is used, and names its sources.  Equal indexes give equal bytes.
"""

from __future__ import annotations

import struct
from collections import Counter
from itertools import accumulate

from cafs import format as fmt
from cafs.digest import CHUNK_LIST, OBJECTS, PLAIN, object_name
from cafs.errors import UnsupportedError, quote
from cafs.index import NO_PARENT, xattrs_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cafs.index import Index

    Xattr = tuple[int, bytes, bytes]  # prefix, rest of the name, value

BLOCK = 4096
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME, _INCOMPAT_CHUNKED = 2, 4
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_PLAIN, _INLINE, _CHUNKED = 0, 2, 4
_EXTENDED = 1
_SLOT = 32
_FIRST = 64  # no inode has the number 0
_DIRENT = struct.Struct("<QHBB")
_XATTR = struct.Struct("<BBH")
_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_SHARED_MAX = 255
_TAIL_MAX = 4000
_CHUNK_BITS = (12, 43)
_MAPS_MAX = 64 << 20
_METACOPY: Xattr = (4, b"overlay.metacopy", b"")
_OPAQUE: Xattr = (4, b"overlay.opaque", b"y")
_TYPES = {  # letter: (file type of a directory entry, S_IFMT bits)
    ord("f"): (1, 0o100000), ord("F"): (1, 0o100000), ord("d"): (2, 0o040000), ord("o"): (2, 0o040000), ord("l"): (7, 0o120000),
    ord("c"): (3, 0o020000), ord("w"): (3, 0o020000), ord("b"): (4, 0o060000), ord("p"): (5, 0o010000), ord("s"): (6, 0o140000),
}  # fmt: skip


def encode(index: Index) -> bytes:
    """The metadata image of an index; of a layer, with overlayfs' whiteouts and opaque marks.

    Raises UnsupportedError for what overlayfs would take for something else, or for a layer that does not list every parent.
    """
    _check(index)
    return _Image(index).encode()


def _check(index: Index) -> None:
    for entry, device in index.rdev.items():
        if device == (0, 0) and index.kind(entry) == fmt.CHAR_DEVICE:
            raise UnsupportedError(f"{quote(index.path(entry))} is a device that overlayfs takes for a whiteout")
    if not len(index) or index.parent.count(NO_PARENT) != 1 or index.path(0) != b"/":
        raise UnsupportedError("a layer that does not list every parent has no metadata image")
    if index.kind(0) == fmt.OPAQUE:
        raise UnsupportedError("a layer whose root is opaque has no metadata image: overlayfs merges roots all the same")
    if sum(map(_map_size, index.size)) > _MAPS_MAX:
        raise UnsupportedError("the files are so large that their maps would not fit a metadata image")
    if index.child(0, OBJECTS) is not None:
        raise UnsupportedError(f"the tree has the name {quote(OBJECTS)}, which is kept for the objects")


class _Image:
    """offset: of each inode from the start of the inodes.  blocks: data of directories and links that is not inline."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.inodes = [entry for entry, kind in enumerate(index.type) if kind != fmt.HARDLINK[0]]
        self.xattrs = {entry: found for entry in self.inodes if (found := self._xattrs_of(entry))}
        self.shared = self._share()
        self.subdirectories = Counter(index.parent[entry] for entry in self.inodes if entry and index.type[entry] in b"do")
        self.offset: dict[int, int] = {}
        self.blocks: list[bytes] = []

    def encode(self) -> bytes:
        area, self.shared_at = self._shared_area()
        bodies = {entry: self._xattr_body(found) for entry, found in self.xattrs.items()}
        end = self._lay_out(bodies)
        start = 1 + len(area) // BLOCK
        self.data_at = start + -(-end // BLOCK)
        out = bytearray(BLOCK) + area + bytes(self.data_at * BLOCK - start * BLOCK)
        for entry in self.inodes:
            at = start * BLOCK + self.offset[entry]
            inode = self._inode(entry, bodies.get(entry, b""))
            out[at : at + len(inode)] = inode
        out += b"".join(self.blocks)
        blocks = len(out) // BLOCK
        head = _SUPER.pack(
            _MAGIC, 0, _COMPAT_MTIME, 12, 0, self._number(0), len(self.inodes), 0, 0, blocks, start, 1,
            self.index.identity[:16], bytes(16), _INCOMPAT_CHUNKED, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        out[1024 : 1024 + len(head)] = head
        return bytes(out)

    # --- extended attributes -----------------------------------------------------------------------------------------

    def _xattrs_of(self, entry: int) -> list[Xattr]:
        index, kind = self.index, self.index.type[entry]
        found = []
        if entry in index.xattrs:
            for name, value in xattrs_of(index.xattrs[entry]).items():
                prefix, number = next(one for one in _PREFIXES if name.startswith(one[0]))
                found.append((number, name[len(prefix) :], value))
        if kind in b"fF" and index.size[entry]:
            text = object_name(index.object(entry), CHUNK_LIST if kind == fmt.CHUNKED[0] else PLAIN).encode()
            found += [_METACOPY, (4, b"overlay.redirect", b"/%s/%s/%s" % (OBJECTS, text[:2], text[2:]))]
        if kind == fmt.OPAQUE[0]:
            found.append(_OPAQUE)
        return found

    def _share(self) -> list[Xattr]:
        """What several inodes have, in order."""
        counts = Counter(one for found in self.xattrs.values() for one in found)
        return sorted(one for one, count in counts.items() if count > 1)

    def _shared_area(self) -> tuple[bytes, dict[Xattr, int]]:
        """The area, in whole blocks, and where each is in it, in units of 4 bytes."""
        parts = [_encode_xattr(one) for one in self.shared]
        places = accumulate(map(len, parts), initial=0)
        area = b"".join(parts)
        return area + bytes(-len(area) % BLOCK), {one: at // 4 for one, at in zip(self.shared, places, strict=False)}

    def _xattr_body(self, found: list[Xattr]) -> bytes:
        shared = [self.shared_at[one] for one in found if one in self.shared_at][:_SHARED_MAX]
        kept = set(shared)
        own = [_encode_xattr(one) for one in found if self.shared_at.get(one) not in kept]
        return struct.pack("<IB7x", 0, len(shared)) + struct.pack(f"<{len(shared)}I", *shared) + b"".join(own)

    # --- places ------------------------------------------------------------------------------------------------------

    def _lay_out(self, bodies: dict[int, bytes]) -> int:
        """Give each inode its place; nothing inline crosses the end of a block.  Returns the end."""
        at = _FIRST
        self.tails: dict[int, int] = {}
        for entry in self.inodes:
            head = _INODE.size + len(bodies.get(entry, b""))
            tail, follows = self._tail(entry), self._map_size(entry)
            while at % BLOCK > BLOCK - _INODE.size or (tail and (at + head) // BLOCK != (at + head + tail - 1) // BLOCK):
                at += _SLOT
            self.offset[entry] = at
            self.tails[entry] = tail
            at += head + tail + follows
            at += -at % _SLOT
        return at

    def _tail(self, entry: int) -> int:
        """Bytes that are inline: of a link's target, or of the last block of a directory; 0 if they are too many."""
        kind = self.index.type[entry]
        if kind == fmt.SYMLINK[0]:
            size = len(self.index.target[entry])
        elif kind in b"do":
            size = _last_block(self._names(entry))
        else:
            return 0
        return size if size <= _TAIL_MAX else 0

    def _map_size(self, entry: int) -> int:
        return _map_size(self.index.size[entry]) if self.index.type[entry] in b"fF" else 0

    def _number(self, entry: int) -> int:
        """EROFS' number of an entry's inode."""
        return self.offset[self.index.inode(entry)] // _SLOT

    # --- inodes ------------------------------------------------------------------------------------------------------

    def _inode(self, entry: int, xattrs: bytes) -> bytes:
        index, kind = self.index, self.index.type[entry]
        layout, value, size, follows = _PLAIN, 0, 0, b""
        if kind in b"do":
            layout, value, size, follows = self._with_data(entry, self._directory(entry))
        elif kind == fmt.SYMLINK[0]:
            layout, value, size, follows = self._with_data(entry, [index.target[entry]])
        elif kind in b"fF" and index.size[entry]:
            size = index.size[entry]
            layout, value, follows = _CHUNKED, _chunk_bits(size) - 12, b"\xff" * self._map_size(entry)
        elif kind in b"cb":
            value = _device(*index.rdev.get(entry, (0, 0)))
        seconds, ns = divmod(index.mtime_ns[entry], 10**9)
        head = _INODE.pack(
            layout << 1 | _EXTENDED,
            (len(xattrs) - 12) // 4 + 1 if xattrs else 0,
            _TYPES[kind][1] | index.mode[entry],
            0,
            size,
            value,
            entry + 1,
            index.uid[entry],
            index.gid[entry],
            seconds & 0xFFFF_FFFF_FFFF_FFFF,
            ns,
            2 + self.subdirectories[entry] if kind in b"do" else index.links.get(entry, 1),
        )
        return head + xattrs + follows

    def _with_data(self, entry: int, blocks: list[bytes]) -> tuple[int, int, int, bytes]:
        """(layout, first block, size, what is inline) of data in blocks, all but the last of them full."""
        size = BLOCK * (len(blocks) - 1) + len(blocks[-1])
        at = self.data_at + len(self.blocks)
        if self.tails[entry]:
            self.blocks += blocks[:-1]
            return _INLINE, at if blocks[1:] else 0, size, blocks[-1]
        self.blocks += [block.ljust(BLOCK, b"\0") for block in blocks]
        return _PLAIN, at, size, b""

    def _names(self, entry: int) -> list[bytes]:
        return sorted([b".", b"..", *map(self.index.name, self.index.children(entry))])

    def _directory(self, entry: int) -> list[bytes]:
        """The blocks of a directory; all but the last are full."""
        index = self.index
        above = index.parent[entry] if entry else entry
        rows = [(b".", self._number(entry), 2), (b"..", self._number(above), 2)]
        for child in index.children(entry):
            rows.append((index.name(child), self._number(child), _TYPES[index.type[index.inode(child)]][0]))
        rows.sort()
        blocks = []
        for first, last in _split([row[0] for row in rows]):
            names = [row[0] for row in rows[first:last]]
            places = accumulate(map(len, names), initial=_DIRENT.size * len(names))
            heads = [_DIRENT.pack(number, at, kind, 0) for (_, number, kind), at in zip(rows[first:last], places, strict=False)]
            blocks.append(b"".join(heads + names))
        return [block.ljust(BLOCK, b"\0") for block in blocks[:-1]] + blocks[-1:]


def _split(names: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Which names go into one block of a directory: (first, after the last)."""
    first = size = 0
    for at, name in enumerate(names):
        size += _DIRENT.size + len(name)
        if size > BLOCK:
            yield first, at
            first, size = at, _DIRENT.size + len(name)
    yield first, len(names)


def _last_block(names: Sequence[bytes]) -> int:
    """Bytes used in the last block of a directory."""
    first, last = max(_split(names))
    return sum(map(len, names[first:last])) + _DIRENT.size * (last - first)


def _encode_xattr(one: Xattr) -> bytes:
    prefix, name, value = one
    data = _XATTR.pack(len(name), prefix, len(value)) + name + value
    return data + bytes(-len(data) % 4)


def _map_size(size: int) -> int:
    """Bytes of the map of a file's holes."""
    return 4 * -(-size // (1 << _chunk_bits(size))) if size else 0


def _chunk_bits(size: int) -> int:
    """Size of a hole, as a power of two: one for the whole file, if there is one that large."""
    return min(max((size - 1).bit_length(), _CHUNK_BITS[0]), _CHUNK_BITS[1])


def _device(major: int, minor: int) -> int:
    """Linux' new_encode_dev, 32 bits."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
