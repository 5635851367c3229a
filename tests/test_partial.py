"""Large files in the cache grow chunk by chunk, survive their server, are whole or partial, and are never wrong."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cafs import partial
from cafs.cache import Cache
from cafs.digest import CHUNK_LIST
from cafs.image import load_index
from cafs.indexing import Options, create_image
from cafs.partial import ChunkedFile
from cafs.store import Store
from tests.conftest import wait_until

CHUNK = 4 << 20


class Large:
    """A file in a store: if nothing else is said of four chunks, of which the second is zero."""

    def __init__(self, tmp_path: Path, content: bytes = b"") -> None:
        tree = tmp_path / "tree"
        tree.mkdir()
        self.content = content or os.urandom(CHUNK) + bytes(CHUNK) + os.urandom(CHUNK + 1000)
        (tree / "large").write_bytes(self.content)
        create_image(Options(str(tree)), str(tmp_path / "store"), "t:1")
        index, _, _ = load_index("t:1", str(tmp_path / "store"))
        self.store_root = str(tmp_path / "store")
        self.cache_root = str(tmp_path / "cache2")
        self.digest = index.object(1)
        self.asked: list[bytes] = []

    def open(self) -> ChunkedFile:
        """As a new process would."""
        store = Store(self.store_root)
        real = store.read_view

        def read_view(digest: bytes, kind: int = 0, hint: object = None) -> bytes:
            if kind != CHUNK_LIST:
                self.asked.append(digest)
            return real(digest, kind)

        store.read_view = read_view  # type: ignore[method-assign,assignment]
        return ChunkedFile(Cache(self.cache_root, store), self.digest, None, None)


@pytest.fixture
def large(home: Path, tmp_path: Path) -> Large:
    return Large(tmp_path)


def test_a_large_file_is_linked_into_place_when_its_last_chunk_has_come(large: Large) -> None:
    file = large.open()
    assert file.read(10, 20) == large.content[10:30]
    assert file.read(len(large.content) - 5, 100) == large.content[-5:]
    assert not os.path.exists(file.whole_path) and len(large.asked) == 2
    file.close()
    assert sorted(os.listdir(os.path.dirname(file.path))) == [os.path.basename(file.path), os.path.basename(file.path) + ".map"]

    file = large.open()  # another process: what is there is not fetched again
    assert file.read(0, len(large.content)) == large.content
    assert len(large.asked) == 3
    # Who reads ahead may have fetched the last chunk, and is about to give the file its name.
    wait_until(lambda: os.path.exists(file.whole_path) and not os.path.exists(file.path))
    assert Path(file.whole_path).read_bytes() == large.content
    assert stat.S_IMODE(os.stat(file.whole_path).st_mode) == 0o444 and os.stat(file.whole_path).st_nlink == 1
    assert os.listdir(os.path.dirname(file.path)) == []
    file.close()

    file = large.open()
    assert file.read(0, len(large.content)) == large.content and len(large.asked) == 3
    file.close()


@pytest.mark.parametrize("whole", [False, True])
def test_a_chunk_that_rotted_in_the_cache_is_fetched_again_and_mended(large: Large, whole: bool) -> None:
    file = large.open()
    file.read(0, len(large.content) if whole else 10)
    file.close()
    path = Path(file.whole_path if whole else file.path)
    path.chmod(0o600)
    with open(path, "r+b") as damaged:
        damaged.seek(100)
        damaged.write(b"rot")
    path.chmod(0o444)
    asked = len(large.asked)
    file = large.open()
    assert file.read(0, 200) == large.content[:200]
    assert len(large.asked) == asked + 1
    assert path.read_bytes()[:CHUNK] == large.content[:CHUNK]
    assert not whole or stat.S_IMODE(path.stat().st_mode) == 0o444
    file.close()


def test_a_whole_file_that_was_mended_is_whole_again_after_it_was_evicted(large: Large) -> None:
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    file.close()
    os.chmod(file.whole_path, 0o600)
    with open(file.whole_path, "r+b") as rotten:
        rotten.write(b"rot")
    os.chmod(file.whole_path, 0o444)
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    file.close()
    assert os.listdir(os.path.dirname(file.path)) == [], "no map of it"
    os.unlink(file.whole_path)
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    file.close()
    assert Path(file.whole_path).read_bytes() == large.content
    assert os.listdir(os.path.dirname(file.path)) == []


def test_the_map_of_all_chunks_has_no_bit_of_a_hole(home: Path, tmp_path: Path) -> None:
    runs = [(1, b"d"), (1, b""), (20, b"e"), (3, b""), (8, b"f"), (7, b""), (1, b"g")]
    shown = "".join("1" * count if digest else "0" * count for count, digest in runs)
    file = ChunkedFile.__new__(ChunkedFile)
    file.listed = SimpleNamespace(runs=runs)  # type: ignore[assignment]
    bits = file._all(6)
    assert "".join(str(bits[one >> 3] >> (one & 7) & 1) for one in range(48)) == shown.ljust(48, "0")


@pytest.mark.parametrize("damage", ["flip", "cut", "other-size", "missing"])
def test_a_damaged_map_says_nothing_and_the_content_is_right(large: Large, damage: str) -> None:
    file = large.open()
    file.read(0, 10)
    file.close()
    path = Path(file.path + ".map")
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "other-size":
        body = partial._MAP_HEAD.pack(1, CHUNK) + b"\xff"
        path.write_bytes(partial.MAP_MAGIC + partial.checksum(body) + body)
    else:
        path.unlink()
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    assert len(large.asked) == 4
    file.close()


def test_a_map_that_claims_what_is_not_there_costs_a_fetch_and_is_never_believed(large: Large) -> None:
    file = large.open()
    file.read(0, 10)
    file.close()
    body = partial._MAP_HEAD.pack(len(large.content), CHUNK) + b"\x0f"
    Path(file.path + ".map").write_bytes(partial.MAP_MAGIC + partial.checksum(body) + body)
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    file.close()


def test_many_readers_of_one_process_fetch_each_chunk_once(large: Large) -> None:
    file = large.open()
    with ThreadPoolExecutor(8) as pool:
        for at, data in enumerate(pool.map(lambda n: file.read(n * 1_000_000, 1_000_000), range(13))):
            assert data == large.content[at * 1_000_000 : (at + 1) * 1_000_000]
    assert len(large.asked) == len(set(large.asked)) == 3
    file.close()


def test_a_cache_that_cannot_be_written_serves_from_memory(large: Large, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cafs.atomic.write_all_at", full)
    file = large.open()
    assert file.read(0, len(large.content)) == large.content
    file.close()
    assert not os.path.exists(file.whole_path)


def test_a_map_that_outlived_its_file_does_not_make_a_file_with_holes_whole(large: Large) -> None:
    """One process saves its map after another has linked the file; then the file is evicted, and grows again."""
    late, first = large.open(), large.open()
    late.read(0, CHUNK)
    first.read(0, len(large.content))
    first.close()
    late.close()
    Path(first.whole_path).unlink()
    other = large.open()
    assert other.read(2 * CHUNK, 2 * CHUNK) == large.content[2 * CHUNK :]
    other.close()
    whole = Path(first.whole_path)
    assert not whole.exists() or whole.read_bytes() == large.content
    again = large.open()
    assert again.read(0, len(large.content)) == large.content
    again.close()
    assert whole.read_bytes() == large.content


def test_after_a_crash_of_the_machine_the_unsure_objects_of_all_images_are_verified(large: Large) -> None:
    cache = Cache(large.cache_root, Store(large.store_root))
    keys = []
    for data in (b"a" * 9, b"b" * 9):
        keys.append((cache.store.hash(data), 0))
        cache.keep(*keys[-1], data)
    path = Path(cache.path(*keys[1]))
    path.chmod(0o644)
    path.write_bytes(bytes(9))  # what was written did not reach the disk, but size and times did
    cache.ledger.note(keys[1], path.stat())
    (Path(large.cache_root) / "synced").write_text('{"boot_id": "another", "time_ns": 1}')
    assert cache.ledger.check(cache.ledger.unsure(), lambda key: key == keys[0]) == []  # the mount of one image
    assert cache.ledger.check(cache.ledger.unsure(), lambda key: key == keys[1]) == [keys[1][0].hex()]  # and later of another
