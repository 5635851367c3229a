"""Reading many objects: neighbouring frames in one request, several requests at once, checked where they arrive."""

from __future__ import annotations

from itertools import accumulate, chain

from cafs import chunks, pack
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, CorruptError, NotFound
from cafs.locator import contents
from cafs.ordered import ordered_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cafs.index import Index
    from cafs.locator import Place
    from cafs.store import Store

    Key = tuple[bytes, int]
    Frame = tuple[Key, int, int]  # object, offset, size of the frame
    Find = Callable[[Key], Place | None]

WINDOW = 8 << 20
_GAP = 256 << 10
_RAW_MAX = 64 << 20
AT_ONCE = 4
MANY_AT_ONCE = 16
"""For objects that are few and far between."""


def read_frames(store: Store, path: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The frames of a pack at these (offset, size), in order, unchecked; short where it ends.  Raises OSError, RemoteError.

    path: of the pack in the store.
    """

    def fetch(window: list[Frame]) -> list[bytes]:
        return [bytes(frame) for _, frame in _fetch(store, path, window)]

    frames: list[Frame] = [((b"", 0), offset, size) for offset, size in places]
    for found in ordered_map(fetch, _windows(frames), AT_ONCE, window=2 * AT_ONCE):
        yield from found


def all_frames(store: Store, path: str, records: pack.Records) -> Iterator[bytes]:
    """Every frame of a pack in order, each the one of its record.  Raises CorruptError, also if there is room between them."""
    rows = sorted(records.rows(), key=lambda row: row[2])
    at = len(pack.PACK_MAGIC)
    for row, frame in zip(rows, read_frames(store, path, [row[2:4] for row in rows]), strict=True):
        if row[2] != at:
            raise CorruptError(f"{path} has gaps")
        store.check_record(frame, *row[:2])
        yield frame
        at += row[3]


def by_pack(store: Store, keys: Iterable[Key], find: Find | None = None) -> tuple[dict[str, list[Frame]], list[Key]]:
    """Where a store, as of its last `refresh` or as FIND says, has objects: pack -> frames by offset, and what is nowhere."""
    found: dict[str, list[Frame]] = {}
    missing = []
    for key in keys:
        place = find(key) if find else next(store.locate(*key), None)
        if place is None:
            missing.append(key)
        else:
            found.setdefault(place[0], []).append((key, place[1], place[2]))
    for frames in found.values():
        frames.sort(key=lambda frame: frame[1])
    return found, missing


def read_objects(
    store: Store, keys: Iterable[Key], find: Find | None = None, at_once: int = AT_ONCE
) -> Iterator[tuple[Key, memoryview | CafsError]]:
    """The verified bytes of each object, or why there are none, in the order of the packs.  Not copied: pack.decode_frames.

    find: where an object may be, as an index's locator says; then footers are read only for what is not there.
    at_once: requests; each takes up to WINDOW bytes of memory, and what is in them.
    """
    if find is None:
        store.refresh()
    packs, missing = by_pack(store, keys, find)

    def fetch(task: tuple[str, list[Frame]]) -> tuple[list[tuple[Key, memoryview | None]], list[tuple[Key, memoryview]]]:
        """The objects of a window, and those beyond _RAW_MAX as frames: a window of zeros may be a thousand times as large."""
        pack_name, window = task
        try:
            fetched = _fetch(store, f"packs/{pack_name}", window)
        except (CafsError, OSError):
            return [(key, None) for key, _, _ in window], []
        sizes = accumulate(pack.frame_raw_size(frame) if len(frame) >= pack.FRAME.size else 0 for _, frame in fetched)
        count = max(sum(size <= _RAW_MAX for size in sizes), 1)
        return list(check_frames(store, fetched[:count])), fetched[count:]

    failed = []
    tasks = ((pack_name, window) for pack_name, frames in packs.items() for window in _windows(frames))
    for found, rest in ordered_map(fetch, tasks, at_once, window=2 * at_once):
        for key, data in chain(found, check_frames(store, rest)):
            if data is None:
                failed.append(key)
            else:
                yield key, data
    if find:
        if failed or missing:
            yield from read_objects(store, missing + failed)
        return
    for key in failed:
        yield key, _one(store, key)  # another copy, or another try, may be good
    for key in missing:
        yield key, NotFound(f"store has no object {key[0].hex()}", hint="cafs-store fsck")


def check_frames(store: Store, fetched: Iterable[tuple[Key, memoryview]]) -> Iterator[tuple[Key, memoryview | None]]:
    """The object in each frame, None where it is not the one of its key.  Not copied: pack.decode_frames."""
    pairs = list(fetched)
    for (key, _), one in zip(pairs, pack.decode_frames(frame for _, frame in pairs), strict=True):
        is_right = not isinstance(one, CorruptError) and one[1] == key[1] and store.hash(one[0]) == key[0]
        yield key, one[0] if is_right and not isinstance(one, CorruptError) else None


def read_index(store: Store, index: Index) -> Iterator[tuple[Key, memoryview | CafsError]]:
    """`read_objects` of every object that an index needs, by its locator; chunks come last.  Raises FormatError."""
    located = store.get_locator(index.identity)
    find = dict(located.rows()).get if located is not None else None
    whole = dict.fromkeys(contents(index))
    found: dict[Key, None] = {}
    for key, data in read_objects(store, whole, find):
        yield key, data
        if key[1] == CHUNK_LIST and not isinstance(data, CafsError):
            listed = chunks.decode(bytes(data), store.hash_name, store.chunk_size)
            found.update(dict.fromkeys((chunk, PLAIN) for _, chunk in listed.runs if chunk))
    yield from read_objects(store, [key for key in found if key not in whole], find)


def _one(store: Store, key: Key) -> memoryview | CafsError:
    try:
        return memoryview(store.read_object(*key))
    except CafsError as error:
        return error


def _fetch(store: Store, path: str, window: list[Frame]) -> list[tuple[Key, memoryview]]:
    start = window[0][1]
    end = max(offset + size for _, offset, size in window)
    data = memoryview(store.backend.read_range(path, start, end - start))
    return [(key, data[offset - start : offset - start + size]) for key, offset, size in window]


def _windows(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Groups of frames that are read at once: near one another, in rising order."""
    window: list[Frame] = []
    end = 0
    for frame in frames:
        _, offset, size = frame
        is_near = window and end <= offset <= end + _GAP and offset + size - window[0][1] <= WINDOW
        if window and not is_near:
            yield window
            window = []
        window.append(frame)
        end = offset + size
    if window:
        yield window
