"""The layer that makes one tree of another.  cafs-index(5), LAYERS.

A name of an inode with several names is listed anew when any of its names changes, so that each layer alone has the right
link counts: who lays layers over one another without merging them, as a kernel does, sees those.
"""

from __future__ import annotations

from collections import defaultdict

from cafs import format as fmt
from cafs.format import Entry, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.index import Index


def difference(lower: Index, upper: Index) -> bytes:
    """The index of the layer that, laid over LOWER, gives UPPER: both whole trees of one hash and chunk size."""
    lines = [Header(upper.header.hash_name, upper.header.chunk_size, is_layer=True).encode()]
    changed = {fmt.order_key(entry.path): entry for entry in _entries(lower, upper)}
    for key in list(changed):  # every parent is listed, changed or not: then the layer can be laid over others as it is
        for above in [b"\0", *(key[:at] for at, byte in enumerate(key) if at and not byte)]:
            if above not in changed and (number := upper.find(above.replace(b"\0", b"/"))) is not None:
                changed[above] = upper.entry(number)
    lines += (entry.encode() for _, entry in sorted(changed.items()))
    lines.append(fmt.encode_trailer(len(lines) - 1))
    return b"".join(lines)


def _entries(lower: Index, upper: Index) -> Iterator[Entry]:
    """What was added, changed or removed, in order; nothing below a directory that went or became something else."""
    names = _names(lower), _names(upper)
    left, right = _keys(lower), _keys(upper)
    old, new = next(left, None), next(right, None)
    gone = b"\xff"
    while old or new:
        if old and old[0].startswith(gone):
            old = next(left, None)
        elif new is None or (old and old[0] < new[0]):
            assert old
            yield Entry(fmt.WHITEOUT, lower.path(old[1]))
            gone = old[0] + b"\0"
            old = next(left, None)
        elif old is None or new[0] < old[0]:
            yield upper.entry(new[1])
            new = next(right, None)
        else:
            if not _is_same(lower, old[1], upper, new[1], names):
                yield upper.entry(new[1])
                if upper.kind(new[1]) != fmt.DIRECTORY:
                    gone = old[0] + b"\0"
            old, new = next(left, None), next(right, None)


def _is_same(lower: Index, old: int, upper: Index, new: int, names: tuple[dict[int, list[int]], dict[int, list[int]]]) -> bool:
    """Whether two entries are alike in all, the names of their inodes included."""
    a, b = lower.inode(old), upper.inode(new)
    if a in names[0] or b in names[1]:
        paths = [lower.path(one) for one in names[0].get(a, [old])], [upper.path(one) for one in names[1].get(b, [new])]
        if paths[0] != paths[1]:
            return False
    return lower.entry(a) == upper.entry(b)


def _names(index: Index) -> dict[int, list[int]]:
    """The entries of each inode that has several."""
    found: dict[int, list[int]] = defaultdict(list)
    for entry, inode in sorted(index.hardlink.items()):
        found[inode].append(entry)
    return {inode: [inode, *entries] for inode, entries in found.items()}


def _keys(index: Index) -> Iterator[tuple[bytes, int]]:
    return ((fmt.order_key(index.path(number)), number) for number in range(len(index)))
