"""The cache stays within its quota, gives up what was used longest ago, and says what it was good for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from cafs import quota
from cafs.cache import Cache
from cafs.errors import CafsError, UsageError
from cafs.image import load_index
from cafs.indexing import Options, create_image
from cafs.locator import contents
from cafs.store import Store
from cafs.tree import Tree
from tests.conftest import Run, wait_until

EACH = 64 << 10


class Filled:
    """Two images of ten files, of which five are common, all in a cache; 'old' was used long before 'new'."""

    def __init__(self, tmp_path: Path) -> None:
        common = [os.urandom(EACH) for _ in range(5)]
        self.root = str(tmp_path / "cache")
        self.content: dict[str, list[bytes]] = {}
        for name in ("old", "new"):
            tree = tmp_path / name
            tree.mkdir()
            self.content[name] = [*common, *(os.urandom(EACH) for _ in range(5))]
            for number, data in enumerate(self.content[name]):
                (tree / f"{number}").write_bytes(data)
            create_image(Options(str(tree)), str(tmp_path / "store"), f"{name}:1")
        self.store = Store(str(tmp_path / "store"))
        self.cache = Cache(self.root, self.store)
        for name, when in (("old", time.time() - 86400), ("new", time.time())):
            index, _, _ = load_index(f"{name}:1", self.store.root)
            quota.note_use(self.root, index.identity, contents(index))
            os.utime(os.path.join(self.root, "used", index.identity.hex()), (when, when))
            for digest, kind in contents(index):
                os.close(self.cache.open(digest, kind))

    def held(self, name: str) -> list[bool]:
        return [os.path.exists(self.cache.path(self.store.hash(data), 0)) for data in self.content[name]]


@pytest.fixture
def filled(home: Path, tmp_path: Path) -> Filled:
    return Filled(tmp_path)


def test_what_only_the_oldest_image_lists_goes_first(filled: Filled) -> None:
    done = quota.trim(filled.root, 14 * EACH)
    assert done.files == 4 and done.bytes == 4 * EACH and done.left <= 0.8 * 14 * EACH
    assert filled.held("new") == [True] * 10
    assert filled.held("old")[:5] == [True] * 5 and sum(filled.held("old")[5:]) == 1
    again = quota.trim(filled.root, 14 * EACH)
    assert (again.files, again.bytes, again.left) == (0, 0, 11 * EACH), "under the quota nothing goes"


def test_what_no_image_lists_goes_before_all_else(filled: Filled) -> None:
    data = os.urandom(EACH)
    path = Path(filled.cache.path(filled.store.hash(data), 0))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    quota.trim(filled.root, 15 * EACH)
    assert not path.exists() and filled.held("new") == [True] * 10


def test_what_is_open_stays_and_what_went_comes_back(filled: Filled) -> None:
    digest = filled.store.hash(filled.content["old"][7])
    fd = filled.cache.open(digest, 0)
    quota.trim(filled.root, EACH)
    assert os.path.exists(filled.cache.path(digest, 0)) and sum(filled.held("old") + filled.held("new")) == 1
    os.close(fd)
    quota.trim(filled.root, 0)
    assert sum(filled.held("old") + filled.held("new")) == 0
    fd = filled.cache.open(digest, 0)
    assert os.pread(fd, EACH, 0) == filled.content["old"][7]
    os.close(fd)


def test_damaged_records_and_counters_do_no_harm(filled: Filled) -> None:
    for name in ("junk", "0" * 64):
        Path(filled.root, "used", name).write_bytes(b"CAFSUSE1\x20" + os.urandom(100))
    Path(filled.root, "stats").write_text("[]")
    assert set(quota.read_stats(filled.root).as_dict().values()) == {0}
    assert quota.trim(filled.root, 14 * EACH).files == 4 and filled.held("new") == [True] * 10


def test_large_files_count_by_what_is_there_of_them(home: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(os.urandom(12 << 20))
    create_image(Options(str(tree)), str(tmp_path / "store"), "l:1")
    index, _, store = load_index("l:1", str(tmp_path / "store"))
    assert store
    cache = Cache(str(tmp_path / "cache"), store)
    mounted = Tree(index, cache, [])
    mounted.read(2, 0, 100)
    mounted.close()
    assert 4 << 20 <= quota.size(cache.root) < 5 << 20
    assert quota.trim(cache.root, 1 << 20).files == 1
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("20K", 20480), ("3G", 3 << 30), ("4g", 4 << 30), ("x", None), ("-1", None), ("1GB", None)],
)
def test_the_quota_is_a_size(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int | None) -> None:
    monkeypatch.setenv("CAFS_CACHE_QUOTA", text)
    if size is None:
        with pytest.raises(UsageError, match="is no size"):
            quota.quota(str(tmp_path))
    else:
        assert quota.quota(str(tmp_path)) == size


@pytest.mark.needs("root", "fuse", "fusermount3")
def test_a_mount_keeps_the_quota_and_counts(home: Path, tmp_path: Path, cmd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = Filled(tmp_path)
    monkeypatch.setenv("CAFS_CACHE_QUOTA", str(14 * EACH))
    point = tmp_path / "mnt"
    point.mkdir()
    assert cmd("cafs-mount", "--engine", "fuse", "old:1", point).returncode == 0
    wait_until(lambda: sum(filled.held("old") + filled.held("new")) != 20, 20)
    for number, data in enumerate(filled.content["old"]):
        assert (point / f"{number}").read_bytes() == data
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    found = json.loads(cmd("cafs-store", "info", "--json").stdout)
    assert found["cache_hits"] + found["cache_misses"] >= 10 and found["cache_bytes_saved"] >= 5 * EACH
    assert 0 < found["cache_bytes"] <= 20 * EACH
    monkeypatch.setenv("CAFS_CACHE_QUOTA", "much")
    done = cmd("cafs-mount", "old:1", point)
    assert done.returncode == 2 and b"CAFS_CACHE_QUOTA is 'much'" in done.stderr


def test_a_pinned_image_stays_until_it_is_unpinned(filled: Filled, cmd: Run) -> None:
    assert cmd("cafs-mount", "--list").returncode == 0
    assert cmd("cafs-store", "pin", "old:1").returncode == 0
    assert quota.trim(filled.root, 6 * EACH).files == 5
    assert filled.held("old") == [True] * 10 and filled.held("new") == [True] * 5 + [False] * 5
    assert cmd("cafs-store", "unpin", "old:1").returncode == 0
    again = cmd("cafs-store", "unpin", "old:1")
    assert again.returncode == 4 and b"image 'old:1' is not pinned" in again.stderr
    assert quota.trim(filled.root, 6 * EACH).files == 6


def test_what_was_derived_for_an_image_goes_when_it_was_not_used_for_long(filled: Filled) -> None:
    for name, age_s in (("long", 91 * 86400), ("short", 89 * 86400)):
        path = Path(filled.root) / "columns" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    quota.trim(filled.root, 1 << 40)
    assert os.listdir(Path(filled.root) / "columns") == ["short"]


def test_leftovers_of_killed_processes_go(filled: Filled) -> None:
    shard = Path(filled.root) / "data" / ".cafs-objects" / "00"
    shard.mkdir(exist_ok=True)
    for name, age_s in (("tmp.1.old", 7200), ("tmp.2.new", 60)):
        (shard / name).touch()
        os.utime(shard / name, (time.time() - age_s,) * 2)
    quota.trim(filled.root, 1 << 40)
    assert [path.name for path in shard.glob("tmp.*")] == ["tmp.2.new"]


@pytest.mark.needs("root")
def test_a_full_disk_makes_room_by_what_was_used_longest_ago(home: Path, tmp_path: Path) -> None:
    """Of 2 MiB on the disk 20 x 64 KiB are of two images; a third needs more than is left."""
    root = tmp_path / "cache"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", root], check=True)
    filled = Filled(tmp_path)
    told = []
    filled.cache.evicted = lambda: told.append(1)
    with open(root / "fill", "wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    data = os.urandom(EACH)
    filled.cache.keep(filled.store.hash(data), 0, data)
    assert Path(filled.cache.path(filled.store.hash(data), 0)).read_bytes() == data and told
    assert not any(filled.held("old")[5:]), "what is asked for is large, so that it is not asked for every object"
    quota.evict(str(root), 1 << 40)
    with open(root / "fill", "ab") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    for _ in range(2):
        with pytest.raises(CafsError, match="No space left"):
            filled.cache.keep(filled.store.hash(data), 0, data)
    assert len(told) == 1, "where nothing can go it is not tried again and again"


def test_fsck_of_the_cache_finds_what_neither_size_nor_times_betray(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    point.mkdir()
    for name, data in (("small", b"s" * 5000), ("large", os.urandom(9 << 20)), ("holes", b"h" + bytes(9 << 20))):
        (tree / name).write_bytes(data)
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for engine in ("fuse", "kernel"):
        assert cmd("cafs-mount", "--engine", engine, "x:1", point).returncode == 0
        for name in ("small", "large", "holes"):
            assert (point / name).read_bytes() == (tree / name).read_bytes()
        assert cmd("cafs-mount", "--unmount", point).returncode == 0
    clean = cmd("cafs-store", "fsck", "--cache")
    assert clean.returncode == 0 and clean.stdout == b"", clean
    objects = sorted((home / "cache" / "data" / ".cafs-objects").glob("*/*"))
    others = [next((home / "cache" / name).iterdir()) for name in ("lists", "metadata", "locators", "columns")]
    assert len(objects) == 3
    for path in [*objects, *others]:
        path.chmod(0o600)
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    found = cmd("cafs-store", "fsck", "--cache")
    assert found.returncode == 5 and found.stdout.count(b"damaged-in-cache\t") == 7, found.stdout
    mended = cmd("cafs-store", "fsck", "--cache", "--repair")
    assert mended.returncode == 0 and mended.stdout.count(b"\trepaired") == 7
    assert cmd("cafs-store", "fsck", "--cache").returncode == 0
    assert cmd("cafs-mount", "--engine", "kernel", "x:1", point).returncode == 0
    for name in ("small", "large", "holes"):
        assert (point / name).read_bytes() == (tree / name).read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_a_pinned_image_stays_also_when_it_was_not_used_for_long(filled: Filled, cmd: Run) -> None:
    assert cmd("cafs-store", "pin", "old:1").returncode == 0
    for path in (Path(filled.root) / "used").iterdir():
        os.utime(path, (time.time() - 91 * 86400,) * 2)
    quota.trim(filled.root, 6 * EACH)
    assert filled.held("old") == [True] * 10
