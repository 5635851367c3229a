"""Find paths in the layers of an image without loading them: an index is sorted, so its file is mapped and bisected.

A path costs some 50 us a layer, whatever the size of the image.  The files are those of the cache, which were loaded with every
check when they were put there: kept.get_index.
"""

from __future__ import annotations

import mmap
import os

from cafs import format as fmt
from cafs.errors import FormatError
from cafs.escape import unescape
from cafs.format import Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NUL = b"\0"


class MappedIndex:
    """An index file.  Offsets are of lines."""

    def __init__(self, path: str) -> None:
        """Raises OSError, FormatError."""
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._first = self._data.find(b"\n") + 1
        self._end = self._data.rfind(b"\n", 0, len(self._data) - 1) + 1  # the trailer
        self.header = fmt.parse_header(self._data[: self._first - 1])
        self.name = os.path.basename(path)

    def find(self, path: bytes) -> Entry | None:
        """The entry of a path, absolute and as it is."""
        at = self._bisect(fmt.order_key(path))
        if at < self._end and self._key(at, self._line_end(at)) == fmt.order_key(path):
            return self._entry(at)
        return None

    def has_below(self, path: bytes) -> bool:
        """Whether anything is listed below a directory."""
        return next(self._offsets_below(path), None) is not None

    def below(self, path: bytes) -> Iterator[Entry]:
        """Everything below a directory, in order."""
        return map(self._entry, self._offsets_below(path))

    def children(self, path: bytes) -> Iterator[bytes]:
        """The names in a directory, in order, those among them that are only the beginning of longer paths."""
        top = fmt.order_key(path.rstrip(b"/")) + _NUL
        at = self._bisect(top + b"\1")
        while at < self._end:
            end = self._line_end(at)
            key = self._key(at, end)
            if not key.startswith(top):
                return
            name = key[len(top) :].partition(_NUL)[0]
            yield name
            after = top + name + b"\1"  # above all keys that continue with NUL, not above longer names
            at = end if self._is_after(end, after) else self._bisect(after, end)

    def _is_after(self, at: int, key: bytes) -> bool:
        return at >= self._end or self._key(at, self._line_end(at)) >= key

    def _offsets_below(self, path: bytes) -> Iterator[int]:
        top = fmt.order_key(path.rstrip(b"/")) + _NUL
        at = self._bisect(top + b"\1")
        while at < self._end:
            end = self._line_end(at)
            if not self._key(at, end).startswith(top):
                return
            yield at
            at = end

    def _bisect(self, key: bytes, low: int = 0) -> int:
        """Offset of the first line, from LOW on, whose key is not before KEY."""
        low, high = max(low, self._first), self._end
        while low < high:
            middle = (low + high) // 2
            start = max(self._data.rfind(b"\n", low, middle) + 1, low)
            end = self._line_end(middle)
            if self._key(start, end) < key:
                low = end
            else:
                high = start
        return low

    def _line_end(self, at: int) -> int:
        return self._data.find(b"\n", at) + 1

    def _key(self, start: int, end: int) -> bytes:
        return fmt.order_key(unescape(self._data[self._data.rfind(b" ", start, end) + 1 : end - 1]))

    def _entry(self, at: int) -> Entry:
        return fmt.decode_entry(self._data[at : self._line_end(at) - 1])


class Node:
    """A path of the tree that the layers make.  entry: as it is there, a hard link as what it links to.

    layers: those that show in a directory, the uppermost first.  key: the same for all names of a file.
    """

    __slots__ = ("entry", "key", "layers", "path")

    def __init__(self, path: bytes, entry: Entry, layers: Sequence[MappedIndex], key: tuple[str, bytes]) -> None:
        self.path = path
        self.entry = entry
        self.layers = layers
        self.key = key

    @property
    def is_directory(self) -> bool:
        return self.entry.type == fmt.DIRECTORY

    def child(self, name: bytes) -> Node | None:
        """What has a name in this directory.  Raises FormatError."""
        return _find(self.path.rstrip(b"/") + b"/" + name, self.layers)

    def walk(self, path: bytes) -> Node | None:
        """What has a path, relative to this directory.  Raises FormatError."""
        node: Node | None = self
        for name in path.split(b"/"):
            if name:
                node = node.child(name) if node and node.is_directory else None
        return node

    def children(self) -> Iterator[bytes]:
        """The names that may be in this directory: those that a layer removes among them; sorted."""
        return iter(sorted({name for layer in self.layers for name in layer.children(self.path)}))

    def below(self) -> Iterator[Node]:
        """Everything below this directory, in order."""
        if len(self.layers) == 1 and not self.layers[0].header.is_layer:
            layer = self.layers[0]
            for entry in layer.below(self.path):
                yield _node(entry.path, entry, (layer,))
            return
        for name in self.children():
            if node := self.child(name):
                yield node
                if node.is_directory:
                    yield from node.below()


def root(layers: Sequence[MappedIndex]) -> Node:
    """The root of the tree of an image.  layers: base first.  Raises FormatError."""
    found = _find(b"/", list(reversed(layers)))
    if found is None or not found.is_directory:
        raise FormatError("the layers have no root directory")
    return found


def _find(path: bytes, layers: Sequence[MappedIndex]) -> Node | None:
    found: tuple[Entry, MappedIndex] | None = None
    is_implied, shown = False, list[MappedIndex]()
    for layer in layers:
        entry = layer.find(path)
        if entry is None:
            if layer.header.is_layer and layer.has_below(path):
                is_implied = True
                shown.append(layer)
            continue
        if entry.type == fmt.WHITEOUT:
            break
        is_directory = entry.type in (fmt.DIRECTORY, fmt.OPAQUE)
        if found is None and not (is_implied and not is_directory):
            found = entry, layer
        if not is_directory:
            break
        shown.append(layer)
        if entry.type == fmt.OPAQUE or not layer.header.is_layer:
            break
    if found:
        return _node(path, found[0], shown, found[1])
    return Node(path, Entry(fmt.DIRECTORY, path, 0o755), shown, ("", path)) if is_implied else None


def _node(path: bytes, entry: Entry, layers: Sequence[MappedIndex], layer: MappedIndex | None = None) -> Node:
    layer = layer or layers[0]
    key = path
    if entry.type == fmt.HARDLINK:
        key = entry.target
        linked = layer.find(entry.target)
        if linked is None or linked.type == fmt.HARDLINK:
            raise FormatError("hard link to nothing", rule=21)
        entry = linked
    return Node(path, _as(entry, path), layers if entry.type in (fmt.DIRECTORY, fmt.OPAQUE) else (), (layer.name, key))


def _as(entry: Entry, path: bytes) -> Entry:
    from dataclasses import replace

    kind = fmt.DIRECTORY if entry.type == fmt.OPAQUE else entry.type
    return entry if entry.path == path and kind == entry.type else replace(entry, path=path, type=kind)
