"""Collection frees what nobody needs and nothing else: beside writers, mounts and crashes, and from any point again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cafs import candidates, fsck, image, lease, steps, transfer
from cafs.collect import Report, collect
from cafs.errors import BusyError, CafsError, CorruptError
from cafs.indexing import Options, create_image
from cafs.store import Store, init
from cafs.writer import Writer
from tests.conftest import BIN, Run
from tests.faults import calls_of, run_with_fault


@pytest.fixture
def trees(home: Path, tmp_path: Path) -> dict[str, Path]:
    """Three trees: 'a' and 'b' share a little, 'c' is most of 'a'."""
    found = {}
    shared = os.urandom(20_000)
    for name in ("a", "b"):
        root = found[name] = tmp_path / f"tree-{name}"
        root.mkdir()
        (root / "shared").write_bytes(shared)
        for number in range(8):
            (root / f"{number}").write_bytes(os.urandom(20_000))
    shutil.copytree(found["a"], tmp_path / "tree-c")
    found["c"] = tmp_path / "tree-c"
    (found["c"] / "7").unlink()
    return found


def create(trees: dict[str, Path], tmp_path: Path, *names: str) -> Store:
    for name in names:
        create_image(Options(str(trees[name]), rehash=True), str(tmp_path / "store"), f"{name}:1")
    return Store(str(tmp_path / "store"))


def is_whole(store: Store, tree: Path) -> bool:
    fresh = Store(store.root)
    return all(fresh.read_object(fresh.hash(path.read_bytes())) == path.read_bytes() for path in tree.iterdir())


def test_what_no_ref_names_is_freed_and_the_rest_is_whole(trees: dict[str, Path], tmp_path: Path, cmd: Run) -> None:
    create(trees, tmp_path, "a", "b")
    before = sum(path.stat().st_size for path in (tmp_path / "store" / "packs").iterdir())
    assert cmd("cafs-store", "untag", "b:1").returncode == 0
    planned = json.loads(cmd("cafs-store", "gc", "--dry-run", "--grace", "0", "--json").stdout)
    assert sum(path.stat().st_size for path in (tmp_path / "store" / "packs").iterdir()) == before
    first = json.loads(cmd("cafs-store", "gc", "--json").stdout)
    assert (first["deleted"], first["waiting"], first["images"]) == (0, 5, 1) and planned["deleted"] == 5
    second = json.loads(cmd("cafs-store", "gc", "--grace", "0", "--json").stdout)
    assert second["deleted"] == 5 and second["deleted_bytes"] == planned["deleted_bytes"] > 150_000
    store = Store(str(tmp_path / "store"))
    assert is_whole(store, trees["a"]) and cmd("cafs-store", "fsck").stdout == b""
    with pytest.raises(CafsError):
        store.read_object(store.hash((trees["b"] / "3").read_bytes()))
    assert json.loads(cmd("cafs-store", "gc", "--grace", "0", "--json").stdout)["deleted"] == 0


def test_a_pack_that_is_mostly_dead_is_copied_and_the_image_reads_from_the_copy(trees: dict[str, Path], tmp_path: Path) -> None:
    store = create(trees, tmp_path, "a")
    for number in range(7):
        (trees["c"] / f"{number}").unlink()
    create(trees, tmp_path, "c")  # needs one object of the pack
    store.remove_ref("a:1")
    report = collect(store, grace_s=0)
    assert report.repacked == 1 and report.deleted_bytes > 150_000
    assert is_whole(store, trees["c"]) and list(fsck.check(Store(store.root))) == []
    assert sum(Store(store.root).pack_sizes().values()) < 30_000
    assert collect(Store(store.root), grace_s=0) == Report(images=1, objects=1)


def test_a_writer_that_began_before_the_list_is_waited_for(trees: dict[str, Path], tmp_path: Path) -> None:
    store = create(trees, tmp_path, "a")
    store.remove_ref("a:1")
    with Writer(Store(store.root)) as writer:
        assert writer.has(store.hash((trees["a"] / "3").read_bytes()))
        assert collect(Store(store.root), grace_s=0).deleted == 0
    assert collect(Store(store.root), grace_s=0).deleted == 5


def test_a_writer_that_began_after_the_list_relies_on_nothing_in_it(trees: dict[str, Path], tmp_path: Path) -> None:
    store = create(trees, tmp_path, "a")
    store.remove_ref("a:1")
    assert collect(store).waiting == 5
    with Writer(Store(store.root)) as writer:
        assert not writer.has(store.hash((trees["a"] / "3").read_bytes()))
        assert collect(Store(store.root), grace_s=0).deleted == 5, "this writer need not be waited for"
    assert list(fsck.check(Store(store.root))) == []


@pytest.mark.parametrize("name", ["a", "c"])
def test_an_image_that_is_made_again_after_it_was_listed_stays(trees: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The same image makes a pack and meta files of listed names; most of it makes other ones."""
    store = create(trees, tmp_path, "a")
    store.remove_ref("a:1")
    assert collect(store).waiting == 5
    store = create(trees, tmp_path, name)
    for _ in range(2):
        collect(Store(store.root), grace_s=0)
        assert is_whole(store, trees[name]) and list(fsck.check(Store(store.root))) == []


def test_an_image_that_is_tagged_after_it_was_listed_stays(trees: dict[str, Path], tmp_path: Path, cmd: Run) -> None:
    store = create(trees, tmp_path, "a")
    digest = store.get_ref("a:1")
    assert digest
    store.remove_ref("a:1")
    assert collect(store).waiting == 5
    assert cmd("cafs-store", "tag", digest.hex(), "again:1").returncode == 0
    assert collect(Store(store.root), grace_s=0).deleted == 0 and is_whole(store, trees["a"])


def test_a_copy_to_a_store_where_the_image_is_listed_copies_it_again(trees: dict[str, Path], tmp_path: Path, cmd: Run) -> None:
    create(trees, tmp_path, "a")
    assert cmd("cafs-store", "push", "a:1", tmp_path / "other").returncode == 0
    other = Store(str(tmp_path / "other"))
    other.remove_ref("a:1")
    assert collect(other).waiting == 5
    assert cmd("cafs-store", "push", "a:1", tmp_path / "other").returncode == 0
    collect(Store(other.root), grace_s=0)
    assert is_whole(other, trees["a"]) and list(fsck.check(Store(other.root))) == []


def test_a_whole_pack_that_is_copied_over_a_listed_one_stays(trees: dict[str, Path], tmp_path: Path) -> None:
    """The pack's name alone is on the list: publishing it takes it off, as for a pack that is written."""
    store = create(trees, tmp_path, "a")
    other = init(str(tmp_path / "other"))
    name = next(iter(store.pack_sizes()))
    candidates.write(other.backend, {f"packs/{name}": candidates.Candidate(f"packs/{name}", 0, frozenset())})
    found = image.resolve(store, "a:1")
    assert transfer.copy(found, store, other, "a:1").packs == 1
    assert candidates.names(other.backend) == set()
    assert is_whole(other, trees["a"])


def test_two_collections_do_not_run_at_once_and_a_dead_one_is_no_hindrance(trees: dict[str, Path], tmp_path: Path) -> None:
    store = create(trees, tmp_path, "a")
    name = lease.take(store.backend, "gc")
    os.rename(tmp_path / "store" / name, tmp_path / "store" / "leases" / "0-first")
    with pytest.raises(BusyError):
        collect(Store(store.root))
    record = json.loads((tmp_path / "store" / "leases" / "0-first").read_text()) | {"pid": 2**22 + 1}
    (tmp_path / "store" / "leases" / "0-first").write_text(json.dumps(record))
    assert collect(Store(store.root)).images == 1


def test_damage_to_what_is_needed_stops_a_collection(trees: dict[str, Path], tmp_path: Path) -> None:
    store = create(trees, tmp_path, "a", "b")
    store.remove_ref("b:1")
    digest = store.get_ref("a:1")
    assert digest
    path = tmp_path / "store" / "meta" / digest.hex()[:2] / f"{digest.hex()[2:]}.image"
    path.chmod(0o644)
    path.write_text("{}")
    with pytest.raises(CorruptError, match="cannot collect"):
        collect(Store(store.root), grace_s=0)
    assert is_whole(store, trees["b"])


@pytest.mark.needs("root", "fuse", "fusermount3")
def test_a_mounted_image_is_kept_until_it_is_unmounted(trees: dict[str, Path], tmp_path: Path, cmd: Run) -> None:
    store = create(trees, tmp_path, "a")
    point = tmp_path / "mnt"
    point.mkdir()
    assert cmd("cafs-mount", "a:1", point).returncode == 0
    store.remove_ref("a:1")
    assert collect(Store(store.root), grace_s=0).deleted == 0
    assert (point / "5").read_bytes() == (trees["a"] / "5").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    assert collect(Store(store.root), grace_s=0).deleted == 5


def test_a_collection_may_be_killed_at_every_step(trees: dict[str, Path], tmp_path: Path) -> None:
    """Also one that copies a pack; what is alive is whole after each, and the next one finishes."""
    for number in range(7):
        (trees["c"] / f"{number}").unlink()
    pristine = create(trees, tmp_path, "a", "b", "c")
    pristine.remove_ref("a:1")
    pristine.remove_ref("b:1")
    os.rename(pristine.root, tmp_path / "pristine")
    work = tmp_path / "store"

    def copy() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "pristine", work)

    def once() -> Report:
        return collect(Store(str(work)), grace_s=0)

    copy()
    calls = calls_of(once, str(work))
    assert any(call.startswith("unlink packs") for call in calls) and any(call.startswith("link tmp") for call in calls)
    for at in range(len(calls)):
        copy()
        run_with_fault(once, str(work), at, None)
        assert is_whole(Store(str(work)), trees["c"]), calls[at]
        for _ in range(2):
            list(fsck.check(Store(str(work)), repair=True))  # removes the dead one's leases
            once()
        assert list(fsck.check(Store(str(work)))) == [], calls[at]
        assert is_whole(Store(str(work)), trees["c"]) and sum(Store(str(work)).pack_sizes().values()) < 70_000, calls[at]
    print(f"{len(calls)} kills")


def test_creating_pushing_mounting_and_collecting_at_once_lose_nothing(
    trees: dict[str, Path], tmp_path: Path, cmd: Run
) -> None:
    """For some seconds: images come and go under several writers while a collection without grace runs all the time."""
    create(trees, tmp_path, "a", "b", "c")
    end = time.monotonic() + 8
    problems: list[str] = []
    rounds = {"writers": 0, "collections": 0}

    def write(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end or rounds["collections"] < 3:
            name, ref = chance.choice("abc"), f"w{number}:1"
            made = cmd("cafs-index", "create", trees[name], "-t", ref)
            if made.returncode:
                problems.append(made.stderr.decode())
            read = cmd("cafs-index", "verify", ref)
            if read.returncode:
                problems.append(f"{name}: {read.stderr.decode()}")
            sent = cmd("cafs-store", "push", ref, tmp_path / "other")
            if sent.returncode:
                problems.append(sent.stderr.decode())
            cmd("cafs-store", "untag", ref)
            cmd("cafs-store", "untag", ref, "--store", tmp_path / "other")
            rounds["writers"] += 1

    def sweep(store: Path) -> None:
        while time.monotonic() < end or rounds["collections"] < 3:
            if not (store / "cafs-store.json").exists():
                time.sleep(0.05)
                continue
            done = subprocess.run(
                [BIN / "cafs-store", "gc", "--grace", "0", "-q", "--store", store], capture_output=True, check=False
            )
            if done.returncode:
                problems.append(f"gc: {done.stderr.decode()}")
            rounds["collections"] += 1

    for ref in ("a:1", "b:1"):
        cmd("cafs-store", "untag", ref)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    threads += [threading.Thread(target=sweep, args=(tmp_path / name,)) for name in ("store", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(rounds)
    assert problems == []
    assert rounds["writers"] >= 3 and rounds["collections"] >= 3
    assert is_whole(Store(str(tmp_path / "store")), trees["c"])
    for name in ("store", "other"):
        assert cmd("cafs-store", "gc", "--grace", "0", "--store", tmp_path / name).returncode == 0
        assert cmd("cafs-store", "fsck", "--store", tmp_path / name).stdout == b""
    assert candidates.names(Store(str(tmp_path / "store")).backend) == set()


def test_a_pack_of_tiny_objects_is_not_copied_by_every_collection(home: Path, tmp_path: Path) -> None:
    """Its footer is larger than its objects."""
    tree = tmp_path / "tiny"
    tree.mkdir()
    for number in range(50):
        (tree / f"{number}").write_bytes(b"%d" % number)
    create_image(Options(str(tree)), str(tmp_path / "store"), "t:1")
    for _ in range(2):
        report = collect(Store(str(tmp_path / "store")), grace_s=0)
        assert (report.repacked, report.deleted) == (0, 0)


def test_layers_of_steps_are_kept_while_they_are_used(trees: dict[str, Path], tmp_path: Path, cmd: Run) -> None:
    store = create(trees, tmp_path, "a", "b")
    made = image.resolve(store, "b:1")
    key = "ab" * 32
    steps.write(store, key, steps.Record(made.layers[0], made.metadata[0], "2026-01-31T12:00:00Z", 1.0))
    steps.write(store, "cd" * 32, steps.Record(b"", b"", "", 0.0))
    assert cmd("cafs-store", "untag", "b:1").returncode == 0
    kept = json.loads(cmd("cafs-store", "gc", "--grace", "0", "--json").stdout)
    assert kept["deleted"] == 1, "the manifest alone"
    assert is_whole(store, trees["b"]) and steps.read(store, steps.name_of(store, key)) is not None
    for path in (tmp_path / "store" / "steps").glob("*/*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    gone = json.loads(cmd("cafs-store", "gc", "--grace", "0", "--json").stdout)
    assert gone["deleted"] == 4 and not list((tmp_path / "store" / "steps").glob("*/*"))
    assert is_whole(store, trees["a"]) and cmd("cafs-store", "fsck").stdout == b""
    steps.write(store, key, steps.Record(made.layers[0], made.metadata[0], "", 1.0))  # of what is not there any more
    assert json.loads(cmd("cafs-store", "gc", "--grace", "0", "--json").stdout)["deleted"] == 0
