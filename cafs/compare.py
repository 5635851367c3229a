"""What differs between two trees: entry by entry, in index order."""

from __future__ import annotations

from dataclasses import dataclass

from cafs import format as fmt
from cafs.format import Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.index import Index

ADDED, DELETED, MODIFIED = "A", "D", "M"
_FIELDS = ("type", "mode", "uid", "gid", "mtime_ns", "size", "digest", "xattrs", "target", "device")


@dataclass(frozen=True, slots=True)
class Difference:
    """A path whose entries differ.  old, new: None where there is none."""

    path: bytes
    old: Entry | None
    new: Entry | None

    @property
    def letter(self) -> str:
        """A, D or M, as git says it."""
        return ADDED if self.old is None else DELETED if self.new is None else MODIFIED

    @property
    def fields(self) -> list[str]:
        """Which fields of a modified entry differ."""
        if self.old is None or self.new is None:
            return []
        return [name for name in _FIELDS if getattr(self.old, name) != getattr(self.new, name)]


def differences(old: Index, new: Index) -> Iterator[Difference]:
    """Every difference, by path.  Both have one hash and chunk size; hard links are compared as what they say."""
    left, right = _keyed(old), _keyed(new)
    a, b = next(left, None), next(right, None)
    while a or b:
        if b is None or (a and a[0] < b[0]):
            assert a
            yield Difference(a[1].path, a[1], None)
            a = next(left, None)
        elif a is None or b[0] < a[0]:
            yield Difference(b[1].path, None, b[1])
            b = next(right, None)
        else:
            if a[1] != b[1]:
                yield Difference(a[1].path, a[1], b[1])
            a, b = next(left, None), next(right, None)


def _keyed(index: Index) -> Iterator[tuple[bytes, Entry]]:
    for entry in index.entries():
        if entry.type == fmt.HARDLINK:  # its attributes are those of the first name, where they are compared
            entry = Entry(fmt.HARDLINK, entry.path, target=entry.target)
        yield fmt.order_key(entry.path), entry
