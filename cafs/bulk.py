"""Reading many objects: neighbouring frames in one request, several requests at once, checked where they arrive."""

from __future__ import annotations

from cafs.errors import CafsError, NotFound
from cafs.ordered import ordered_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cafs.store import Store

    Key = tuple[bytes, int]
    Frame = tuple[Key, int, int]  # object, offset, size of the frame

WINDOW = 8 << 20
_GAP = 256 << 10
_AT_ONCE = 4


def read_frames(store: Store, pack: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The frames of a pack at these (offset, size), in order, unchecked; short where it ends.  Raises OSError, RemoteError."""

    def fetch(window: list[Frame]) -> list[bytes]:
        return [frame for _, frame in _fetch(store, pack, window)]

    frames: list[Frame] = [((b"", 0), offset, size) for offset, size in places]
    for found in ordered_map(fetch, _windows(frames), _AT_ONCE, window=2 * _AT_ONCE):
        yield from found


def by_pack(store: Store, keys: Iterable[Key]) -> tuple[dict[str, list[Frame]], list[Key]]:
    """Where a store, as of its last `refresh`, has objects: pack -> frames by offset, and those that no pack lists."""
    found: dict[str, list[Frame]] = {}
    missing = []
    for key in keys:
        place = next(store.locate(*key), None)
        if place is None:
            missing.append(key)
        else:
            found.setdefault(place[0], []).append((key, place[1], place[2]))
    for frames in found.values():
        frames.sort(key=lambda frame: frame[1])
    return found, missing


def read_objects(store: Store, keys: Iterable[Key]) -> Iterator[tuple[Key, bytes | CafsError]]:
    """The verified bytes of each object, or why there are none, in the order of the packs."""
    store.refresh()
    packs, missing = by_pack(store, keys)

    def fetch(task: tuple[str, list[Frame]]) -> list[tuple[Key, bytes | CafsError]]:
        pack, window = task
        found: list[tuple[Key, bytes | CafsError]] = []
        try:
            for key, frame in _fetch(store, pack, window):
                try:
                    found.append((key, store.check_frame(frame, *key)))
                except CafsError:
                    found.append((key, _one(store, key)))  # another copy, or another try, may be good
        except (CafsError, OSError):
            found += [(key, _one(store, key)) for key, _, _ in window[len(found) :]]
        return found

    tasks = ((pack, window) for pack, frames in packs.items() for window in _windows(frames))
    for found in ordered_map(fetch, tasks, _AT_ONCE, window=2 * _AT_ONCE):
        yield from found
    for key in missing:
        yield key, NotFound(f"store has no object {key[0].hex()}", hint="cafs-store fsck")


def _one(store: Store, key: Key) -> bytes | CafsError:
    try:
        return store.read_object(*key)
    except CafsError as error:
        return error


def _fetch(store: Store, pack: str, window: list[Frame]) -> list[tuple[Key, bytes]]:
    start = window[0][1]
    end = max(offset + size for _, offset, size in window)
    data = store.backend.read_range(f"packs/{pack}", start, end - start)
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
