"""An index in memory: columns, not objects, so that 500,000 entries are some tens of megabytes.

Loading checks every reader rule of cafs-index(5).  An entry is its number, its position in the index; the root is 0.
Entries that are hard links keep their own number; `inode` maps them to the entry whose attributes they share.
"""

from __future__ import annotations

import gc
import json
import re
from array import array
from bisect import bisect_left
from collections import Counter
from functools import lru_cache
from itertools import accumulate, repeat
from operator import lt

from cafs import format as fmt
from cafs.digest import DIGEST_SIZES, hasher
from cafs.errors import FormatError
from cafs.escape import is_canonical, unescape
from cafs.format import Entry, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    Column = Sequence[bytes]

BLOCK = 1 << 20
NO_PARENT = 0xFFFF_FFFF
_DOTTED = re.compile(rb"/\.\.?(?![^/\n])")
_LONG_NAME = re.compile(rb"[^/]{%d}" % (fmt.NAME_MAX + 1))


class Index:
    """The columns.  After `load` they are read-only.

    type: one byte an entry.  digest: DIGEST_SIZES[hash] bytes an entry, zero where there is none.
    mode: permission bits.  rdev, target, xattrs: sparse, by entry.  xattrs as spelled in the file.
    parent: entry of the directory, NO_PARENT for the root and, in a layer, where it is not listed.
    links: number of names of an inode, only where it is not 1.  hardlink: entry -> entry of the inode.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.hash_size = DIGEST_SIZES[header.hash_name]
        self.identity = b""
        self.type = bytearray()
        self.mode = array("H")
        self.uid = array("I")
        self.gid = array("I")
        self.mtime_ns = array("q")
        self.size = array("q")
        self.digest = bytearray()
        self.parent = array("I")
        self.names = bytearray()
        self.name_end = array("Q", [0])
        self.rdev: dict[int, tuple[int, int]] = {}
        self.target: dict[int, bytes] = {}
        self.xattrs: dict[int, bytes] = {}
        self.hardlink: dict[int, int] = {}
        self.links: dict[int, int] = {}
        self._children = array("I")
        self._children_start = array("I")
        self._by_path: dict[bytes, int] | None = None

    def __len__(self) -> int:
        return len(self.type)

    def name(self, entry: int) -> bytes:
        """Last component of the entry's path, empty for the root; in a layer the whole path below an unlisted parent."""
        return bytes(self.names[self.name_end[entry] : self.name_end[entry + 1]])

    def path(self, entry: int) -> bytes:
        """Full path, '/' for the root."""
        parts = [self.name(entry)]
        while (entry := self.parent[entry]) != NO_PARENT:
            parts.append(self.name(entry))
        path = b"/".join(reversed(parts))
        return path if path.startswith(b"/") else b"/" + path

    def inode(self, entry: int) -> int:
        """The entry that holds the attributes: itself, or the first name of a hard link."""
        return self.hardlink.get(entry, entry)

    def kind(self, entry: int) -> bytes:
        """The type letter."""
        return bytes(self.type[entry : entry + 1])

    def object(self, entry: int) -> bytes:
        """Raw digest of the entry's object; zero bytes where there is none."""
        return bytes(self.digest[entry * self.hash_size : (entry + 1) * self.hash_size])

    def children(self, entry: int) -> array[int]:
        """Entries directly in a directory, by the bytes of their names."""
        return self._children[self._children_start[entry] : self._children_start[entry + 1]]

    def child(self, entry: int, name: bytes) -> int | None:
        """The entry called NAME in a directory, or None.  O(log n)."""
        start, end = self._children_start[entry], self._children_start[entry + 1]
        at = bisect_left(self._children, name, start, end, key=self.name)
        if at < end and self.name(self._children[at]) == name:
            return self._children[at]
        return None

    def find(self, path: bytes) -> int | None:
        """The entry at PATH (absolute or relative to the root), no link followed; None if there is none."""
        if self.header.is_layer:  # a parent that is not listed breaks the way down
            if self._by_path is None:
                self._by_path = {self.path(entry): entry for entry in range(len(self))}
            return self._by_path.get(b"/" + b"/".join(filter(None, path.split(b"/"))))
        entry: int | None = 0
        for name in path.split(b"/"):
            if name and entry is not None:
                entry = self.child(entry, name)
        return entry

    def entry(self, number: int) -> Entry:
        """The full record of one entry."""
        kind, inode = self.kind(number), number
        digest = self.object(inode) if self.size[inode] and kind in (fmt.FILE, fmt.CHUNKED) else b""
        target = self.target.get(number, b"")
        if kind == fmt.HARDLINK:
            target = self.path(self.hardlink[number])
        return Entry(
            type=kind,
            path=self.path(number),
            mode=self.mode[inode],
            uid=self.uid[inode],
            gid=self.gid[inode],
            mtime_ns=self.mtime_ns[inode],
            size=self.size[inode] if kind in (fmt.FILE, fmt.CHUNKED) else 0,
            digest=digest,
            xattrs=fmt.decode_xattrs(self.xattrs.get(inode, b"-")),
            target=target,
            device=self.rdev.get(inode, (0, 0)),
        )

    def entries(self) -> Iterator[Entry]:
        """All records in order."""
        return map(self.entry, range(len(self)))

    def encode(self) -> bytes:
        """The file that this index was loaded from, made anew."""
        body = b"".join(entry.encode() for entry in self.entries())
        return self.header.encode() + body + fmt.encode_trailer(len(self))


def load(stream: BinaryIO, *, entries_max: int = fmt.ENTRIES_MAX) -> Index:
    """Read and check a whole index.

    stream: read to its end.  Memory: the columns, plus some megabytes for the block at hand, whatever the input.
    Raises FormatError that names the line and the rule.
    """
    collecting = gc.isenabled()
    gc.disable()  # nothing here makes a cycle, and looking for them among the rows takes a tenth of the time
    try:
        return _Loader(stream, entries_max).run()
    finally:
        if collecting:
            gc.enable()


class _Loader:
    def __init__(self, stream: BinaryIO, entries_max: int) -> None:
        self.stream = stream
        self.entries_max = entries_max
        self.line = 0  # lines read before the block at hand
        self.last_key = b""
        self.last_is_directory = True
        self.directories: dict[bytes, int] = {}
        self.hardlinks: list[tuple[int, bytes]] = []
        self.tail = b""

    def run(self) -> Index:
        head = self.stream.read(BLOCK)
        line, newline, rest = head.partition(b"\n")
        header = fmt.parse_header(line if newline or len(line) < fmt.LINE_MAX else line[:80])
        if not newline:
            raise FormatError("no trailer: the file is cut off", line=1, rule=6)
        self.index = Index(header)
        self.pattern = fmt.lines_pattern(header.hash_name)
        self.digest = hasher(header.hash_name)
        self.digest.update(head)
        self.line = 1
        self._read_blocks(rest)
        _link_children(self.index)
        self._link_hardlinks()
        self.index.identity = self.digest.digest()
        return self.index

    def _read_blocks(self, rest: bytes) -> None:
        """Feed whole lines to _block; what is left at the end must be the trailer."""
        while True:
            cut = rest.rfind(b"\n", 0, max(len(rest) - 1, 0)) + 1  # hold the last whole line back: it may be the trailer
            if cut:
                self._block(rest[:cut])
                rest = rest[cut:]
            if len(rest) > fmt.LINE_MAX:
                raise FormatError("line is too long", line=self.line + 1, rule=8)
            more = self.stream.read(BLOCK)
            if not more:
                break
            self.digest.update(more)
            rest += more
        match = re.fullmatch(rb"end (0|[1-9][0-9]{0,9})\n", rest)
        if not match:
            raise FormatError("no trailer: the file is cut off", line=self.line + 1, rule=6)
        if int(match[1]) != len(self.index):
            raise FormatError("trailer does not count the entries", line=self.line + 1, rule=7)
        if not self.index.header.is_layer and not len(self.index):
            raise FormatError("the first entry is not the root directory", line=self.line + 1, rule=19)

    def _block(self, block: bytes) -> None:
        """Whole lines, with the last LF."""
        count = block.count(b"\n")
        is_long = len(block) > fmt.LINE_MAX and max(map(len, block.split(b"\n"))) >= fmt.LINE_MAX
        if is_long or not self.pattern.fullmatch(block):
            raise self._first_bad_line(block)
        if len(self.index) + count > self.entries_max:
            raise FormatError("too many entries", line=self.line + 1, rule=23)
        try:
            self._columns(block[:-1])
        except (FormatError, OverflowError) as error:
            raise self._bad_row(block[:-1], error) from error
        self.line += count

    def _first_bad_line(self, block: bytes) -> FormatError:
        """Name the first line of a block that is no entry."""
        for number, line in enumerate(block.split(b"\n"), self.line + 1):
            if len(line) >= fmt.LINE_MAX:
                return FormatError("line is too long", line=number, rule=8)
            if not self.pattern.fullmatch(line + b"\n"):
                if re.fullmatch(rb"end [0-9]+", line):
                    return FormatError("something follows the trailer", line=number, rule=6)
                return fmt.diagnose(line, number, self.index.header)
        return FormatError("not an entry", line=self.line + 1, rule=9)

    def _bad_row(self, block: bytes, error: Exception) -> FormatError:
        """A block failed as a whole: find the line by loading it row by row."""
        lines = block.split(b"\n")
        if len(lines) == 1:
            if isinstance(error, FormatError):
                text = str(error).rsplit(" (rule", 1)[0]
                return FormatError(text, line=self.line + 1, rule=error.rule)
            return FormatError("number is out of range", line=self.line + 1, rule=11)
        for line in lines:
            try:
                self._columns(line)
            except (FormatError, OverflowError) as cause:
                return self._bad_row(line, cause)
            self.line += 1
        return FormatError(str(error), line=self.line, rule=getattr(error, "rule", 0))

    def _columns(self, block: bytes) -> None:
        """Check and append lines that match the pattern; the last LF is cut off.  No column grows unless all of it holds."""
        fields = block.replace(b"\n", b" ").split(b" ")
        types, modes, uids, gids, mtimes, sizes, digests, xattrs, targets, spelled = (fields[at::10] for at in range(10))
        clean = block.isascii() and b"\\" not in block
        kinds = b"".join(types)
        paths = spelled if clean else self._unescape(spelled, targets)
        above, _, names = zip(*map(bytes.rpartition, paths, repeat(b"/")), strict=True)
        listed = b"\n".join(spelled)
        self._check_paths(listed, paths, names)
        keys = fmt.order_key(listed).split(b"\n") if clean else list(map(fmt.order_key, paths))
        self._check_order([self.last_key, *keys], paths, kinds)
        added = _Columns(kinds, modes, (uids, gids), mtimes, sizes)
        added.check_sizes(self.index.header.chunk_size)
        for field in set(xattrs) - {b"-"}:
            fmt.decode_xattrs(field)
        base = len(self.index)
        self._check_targets(base, kinds, targets)
        parents = self._parents(above, paths, kinds, base)
        if self.index.header.is_layer:
            names = tuple(
                name if parent != NO_PARENT else path[1:] for name, parent, path in zip(names, parents, paths, strict=True)
            )
        self._append(added, digests, names, parents)
        self._sparse(base, added, xattrs)
        self.last_key, self.last_is_directory = keys[-1], kinds[-1] in b"do"

    def _unescape(self, paths: Column, targets: Column) -> list[bytes]:
        for text in (*paths, *targets):
            if not is_canonical(text):
                raise FormatError("target or path is not in its one spelling", rule=16)
        return [unescape(path) for path in paths]

    def _check_paths(self, spelled: bytes, paths: Column, names: Column) -> None:
        """Rule 17.  spelled: the paths as they stand, one a line."""
        first = 1 if paths[0] == b"/" else 0
        if (
            b"//" in spelled
            or b"\\x00" in spelled
            or _DOTTED.search(spelled)
            or b"" in names[first:]
            or max(map(len, names)) > fmt.NAME_MAX
            or max(map(len, paths)) > fmt.PATH_MAX
            or (self.index.header.is_layer and any(map(_LONG_NAME.search, paths)))
        ):
            raise FormatError("path has an empty, dotted or too long name, or is too long", rule=17)

    def _check_order(self, keys: list[bytes], paths: Column, kinds: bytes) -> None:
        """Rules 18 and 19, and that nothing is below what is no directory (rule 20).  keys: of the entry before, and of all."""
        if not all(map(lt, keys, keys[1:])):
            raise FormatError("path is not after the one before it", rule=18)
        is_layer = self.index.header.is_layer
        if not self.last_key and (paths[0] != b"/" or kinds[0] not in b"do") and not (is_layer and paths[0] != b"/"):
            raise FormatError("the first entry is not the root directory", rule=19)
        if not is_layer:
            if b"o" in kinds or b"w" in kinds:
                raise FormatError("type is for layers only", rule=10)
            return
        file_above = [not self.last_is_directory and bool(self.last_key), *(kind not in b"do" for kind in kinds)]
        for below_file, key, following in zip(file_above, keys, keys[1:], strict=False):
            if below_file and following.startswith(key + b"\0"):
                raise FormatError("entry below one that is not a directory", rule=20)

    def _check_targets(self, base: int, kinds: bytes, targets: Column) -> None:
        """Rules 15 and 21 (as far as one line shows), and set targets aside."""
        for match in re.finditer(rb"[lh]", kinds):
            at, target = match.start(), unescape(targets[match.start()])
            if match[0] == fmt.HARDLINK:
                self.hardlinks.append((base + at, target))
                continue
            if len(target) > fmt.PATH_MAX or b"\0" in target:
                raise FormatError("symbolic link target is too long or has a NUL", rule=15)
            self.index.target[base + at] = target

    def _parents(self, parents: Column, paths: Column, kinds: bytes, base: int) -> list[int]:
        """Rule 20.  The number of each entry's directory; remembers the directories among the rows, the root as b''."""
        found = {paths[match.start()].rstrip(b"/"): base + match.start() for match in re.finditer(rb"[do]", kinds)}
        known = self.directories
        known.update(found)
        if self.index.header.is_layer:
            numbers = [known.get(parent, NO_PARENT) for parent in parents]
        else:
            try:
                numbers = list(map(known.__getitem__, parents))
            except KeyError:
                for path in found:
                    del known[path]
                raise FormatError("parent is not listed as a directory", rule=20) from None
        if paths[0] == b"/":
            numbers[0] = NO_PARENT
        return numbers

    def _append(self, added: _Columns, digests: Column, names: Column, parents: list[int]) -> None:
        index = self.index
        index.type += added.kinds
        index.mode.extend(added.mode)
        index.uid.extend(added.uid)
        index.gid.extend(added.gid)
        index.mtime_ns.extend(added.mtime_ns)
        index.size.extend(added.size)
        index.digest += bytes.fromhex(b"".join(digests).replace(b"-", b"0" * (2 * index.hash_size)).decode())
        index.parent.extend(parents)
        index.name_end.pop()
        index.name_end.extend(accumulate(map(len, names), initial=len(index.names)))
        index.names += b"".join(names)

    def _sparse(self, base: int, added: _Columns, xattrs: Column) -> None:
        index = self.index
        if set(xattrs) != {b"-"}:
            index.xattrs.update({at: field for at, field in enumerate(xattrs, base) if field != b"-"})
        index.rdev.update({base + at: device for at, device in added.devices.items()})
        for match in re.finditer(b"l", added.kinds):
            at = base + match.start()
            index.size[at] = len(index.target[at])

    def _link_hardlinks(self) -> None:
        """Rule 21, and the link counts."""
        index = self.index
        for entry, target in self.hardlinks:
            inode = index.find(target)
            if inode is None or inode >= entry or index.path(inode) != target or index.kind(inode) in (b"d", b"o", b"h", b"w"):
                raise FormatError("hard link target is no earlier entry of a file", line=entry + 2, rule=21)
            index.hardlink[entry] = inode
            index.links[inode] = index.links.get(inode, 1) + 1
            for column in (index.mode, index.uid, index.gid, index.mtime_ns, index.size):
                column[entry] = column[inode]


class _Columns:
    """The numbers of a block as arrays.  Raises OverflowError (rule 11) or FormatError (rules 11, 14)."""

    def __init__(self, kinds: bytes, mode: Column, owner: tuple[Column, Column], mtime: Column, size: Column) -> None:
        self.kinds = kinds
        self.mode = array("H", map({m: 0 if m == b"-" else int(m, 8) for m in set(mode)}.__getitem__, mode))
        self.uid, self.gid = (array("I", map({i: _id(i) for i in set(ids)}.__getitem__, ids)) for ids in owner)
        self.mtime_ns = _numbers(mtime)
        self.devices = {match.start(): _device(size[match.start()]) for match in re.finditer(rb"[cb]", kinds)}
        if self.devices:
            size = [b"-" if b":" in field else field for field in size]
        self.size = _numbers(size)

    def check_sizes(self, chunk_size: int) -> None:
        """Rule 14: F exactly if larger than a chunk."""
        if max(self.size) > chunk_size or b"F" in self.kinds:
            for kind, size in zip(self.kinds, self.size, strict=True):
                if kind in b"fF" and (size > chunk_size) != (kind in b"F"):
                    raise FormatError("type does not fit the file's size", rule=14)


def _id(field: bytes) -> int:
    number = 0 if field == b"-" else int(field)
    if number > fmt.ID_MAX:
        raise FormatError("user or group id is out of range", rule=11)
    return number


def _device(field: bytes) -> tuple[int, int]:
    major, minor = map(int, field.split(b":"))
    if major > fmt.MAJOR_MAX or minor > fmt.MINOR_MAX:
        raise FormatError("device number is out of range", rule=11)
    return major, minor


def _numbers(fields: Column) -> array[int]:
    """Decimal fields as 64-bit numbers, '-' as 0.  By the JSON decoder: the pattern has checked the spelling, and int() on
    each field takes three times as long.  Raises OverflowError."""
    text = b",".join(fields)
    if b"-" in fields:
        text = re.sub(rb"-(?![0-9])", b"0", text)
    return array("q", json.loads(b"[%s]" % text))


def _link_children(index: Index) -> None:
    """Group the entries by directory; within one they stay in order."""
    count = len(index)
    found = dict(Counter(index.parent))
    found.pop(NO_PARENT, None)
    index._children_start = array("I", accumulate(map(found.get, range(count), repeat(0)), initial=0))
    order = sorted(range(count), key=index.parent.__getitem__)
    index._children = array("I", order[: index._children_start[-1]])


@lru_cache(maxsize=4096)
def xattrs_of(field: bytes) -> dict[bytes, bytes]:
    """The XATTRS field of a loaded index as a dictionary."""
    return dict(fmt.decode_xattrs(field))
