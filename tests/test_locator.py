"""Locators are hints: they find what the footers list, and whatever is wrong with one, what is read is right."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs import kept, locator, merged, pack
from cafs.bulk import read_index
from cafs.cache import Cache
from cafs.digest import PLAIN, checksum
from cafs.errors import CafsError, FormatError
from cafs.image import get
from cafs.index import load
from cafs.indexing import Options, create_image
from cafs.store import Store, init
from cafs.transfer import wanted
from cafs.tree import Tree
from tests.conftest import Run

KEYS = st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 1))
PLACES = st.tuples(st.integers(8, 1 << 40), st.integers(pack.FRAME.size, 1 << 26))


@given(st.lists(st.dictionaries(KEYS, PLACES, max_size=20), max_size=6))
def test_a_merged_locator_finds_every_copy_of_every_object(tmp_path_factory: pytest.TempPathFactory, packs: list[dict]) -> None:  # type: ignore[type-arg]
    os.environ["CAFS_CACHE"] = str(tmp_path_factory.getbasetemp() / "merged")
    found = merged.Merged("xxh128")
    sizes: dict[str, int] = {}
    for number, rows in enumerate(packs):  # merged one by one: the order of merging does not matter
        name = f"{number:032x}"
        sizes[name] = 1000 + number
        records = pack.Records.build("xxh128", [(d, k, o, s, 1) for (d, k), (o, s) in rows.items()])
        found = merged.merge("root", found, {name: records}, sizes)
    for digest, kind in {key for rows in packs for key in rows} | {(b"\0" * 16, 0)}:
        copies = {(f"{n:032x}", *rows[digest, kind]) for n, rows in enumerate(packs) if (digest, kind) in rows}
        assert set(found.locate(digest, kind)) == copies
    assert found.packs == sizes


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_locator_or_a_format_error(data: bytes, is_headed: bool) -> None:
    rest = b"sha256".ljust(16, b"\0") + bytes(64) + data if is_headed else data
    for one in (data, locator.MAGIC + data, locator.MAGIC + checksum(rest) + rest):
        try:
            found = locator.Locator(one)
        except FormatError:
            continue
        for number in range(len(found)):
            digest, kind, _, place = found.record(number)
            found.find(digest, kind)
            if place:
                found.block(place[0], 0, 1 << 20)


@pytest.fixture
def store(home: Path, tmp_path: Path) -> Store:
    """A store of three small files, two alike, and one of three chunks; ref t:1."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"other"), ("empty", b"")):
        (tree / name).write_bytes(content)
    (tree / "large").write_bytes(os.urandom(9 << 20))
    create_image(Options(str(tree)), str(tmp_path / "store"), "t:1")
    return Store(str(tmp_path / "store"))


def index_of(store: Store) -> bytes:
    digest = store.get_ref("t:1")
    assert digest
    [layer] = get(store, digest).layers
    return store.get_meta(layer, "index")


def test_a_mount_with_a_locator_reads_no_footer(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = index_of(store)
    index = load(io.BytesIO(data))
    tree = Tree(index, Cache(str(tmp_path / "cache"), store), kept.find_locators(store, [index.identity]))
    monkeypatch.setattr(store, "refresh", lambda: pytest.fail("footers were read"))
    for name, content in ((b"b", b"same"), (b"c", b"other")):
        entry = index.find(name)
        assert entry is not None
        assert tree.read(tree.inode(entry), 0, 100) == content
    large = index.find(b"large")
    assert large is not None
    whole = dict(read_index(store, index))
    assert whole.keys() == set(wanted(init(store.root), index))
    assert all(not isinstance(data, CafsError) and store.hash(data) == key[0] for key, data in whole.items())
    assert tree.read(large + 1, 5 << 20, 100) == (tmp_path / "tree" / "large").read_bytes()[5 << 20 :][:100]


def test_a_wrong_locator_costs_time_only_and_fsck_mends_it(store: Store, tmp_path: Path, cmd: Run) -> None:
    index = load(io.BytesIO(index_of(store)))
    right = store.get_locator(index.identity)
    assert right
    rest = bytearray(right.data[24:])
    for at in range(112 - 24 + 32 * len(right.packs) + 33 + 16, 112 - 24 + 32 * len(right.packs) + 57 * len(right), 57):
        rest[at] ^= 1  # the offset
    store.put_locator(index.identity, locator.MAGIC + checksum(rest) + rest)
    (tmp_path / "mnt").mkdir()
    tree = Tree(index, Cache(str(tmp_path / "cache2"), store), kept.find_locators(store, [index.identity]))
    assert tree.read(2, 0, 10) == b"same"
    whole = dict(read_index(Store(store.root), index))
    assert whole.keys() == set(wanted(store, index)) and not any(isinstance(data, CafsError) for data in whole.values())
    assert cmd("cafs-store", "fsck").stdout.startswith(b"stale-locator\tindex ")
    assert cmd("cafs-store", "fsck", "--repair").returncode == 0
    assert cmd("cafs-store", "fsck").stdout == b""
    mended = store.get_locator(index.identity)
    assert mended and mended.data == right.data


def test_packs_are_merged_when_there_are_many_and_gone_packs_do_not_count(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cafs.writer import Writer

    monkeypatch.setattr(merged, "MERGE_PACKS", 2)
    monkeypatch.setattr(merged, "MERGE_OBJECTS", 10)
    root = str(tmp_path / "store")
    init(root)
    digests = []
    for number in range(5):
        store = Store(root)
        raw = b"object %d" % number
        with Writer(store) as writer:
            writer.put(store.hash(raw), PLAIN, pack.encode_frame(raw, PLAIN, None))
        digests.append(store.hash(raw))
    store = Store(root)
    store.refresh()
    assert Path(merged.path_of(root, "sha256")).exists() and len(merged.load(root, "sha256")) >= 3
    assert [store.read_object(digest) for digest in digests] == [b"object %d" % n for n in range(5)]
    assert (tmp_path / "store/packs/list").read_text() == "".join(f"{n} {s}\n" for n, s in store.pack_sizes().items())
    [(name, _, _)] = store.locate(digests[0])
    os.unlink(store.backend.path(f"packs/{name}"))
    store.refresh()
    assert not store.has(digests[0]) and store.has(digests[1])
    with pytest.raises(CafsError):
        store.read_object(digests[0])


def test_a_pack_that_lost_its_end_does_not_count_though_it_was_merged(
    home: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "MERGE_OBJECTS", 0)
    store.refresh()
    digest = store.hash(b"same")
    [(name, _, _)] = store.locate(digest)
    assert len(merged.load(store.root, "sha256")) > 0
    path = Path(store.backend.path(f"packs/{name}"))
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 1)
    opened = Store(store.root)
    opened.refresh()
    assert not opened.has(digest)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other-hash"])
def test_a_damaged_merged_locator_counts_as_none(
    home: Path, store: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "MERGE_OBJECTS", 0)
    store.refresh()
    path = Path(merged.path_of(store.root, "sha256"))
    data = path.read_bytes()
    changed = {"flip": data[:60] + bytes([data[60] ^ 1]) + data[61:], "cut": data[:-1], "empty": b""}.get(damage)
    if changed is None:
        body = b"xxh128" + data[30:]
        changed = merged.MAGIC + checksum(body) + body
    path.unlink()
    path.write_bytes(changed)
    assert len(merged.load(store.root, "sha256")) == 0
    opened = Store(store.root)
    assert opened.read_object(opened.hash(b"other")) == b"other"
    assert path.read_bytes() == data, "it is made again"
