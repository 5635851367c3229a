"""A store on a network file system: late names, a link whose answer was lost, a root that is nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from cafs import atomic
from cafs.errors import CafsError
from cafs.fsck import check
from cafs.indexing import Options, create_image
from cafs.store import Store
from tests.conftest import BIN, Run
from tests.faults import calls_of, run_with_fault
from tests.waiting import SLOW


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a").write_bytes(b"first content " * 100)
    (root / "b").write_bytes(b"second content " * 100)
    return root


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)  # the client sends it again and is told that the name exists

    monkeypatch.setattr(os, "link", twice)
    assert atomic.create_file(str(tmp_path / "x"), b"mine")
    monkeypatch.undo()
    assert not atomic.create_file(str(tmp_path / "x"), b"other")
    assert (tmp_path / "x").read_bytes() == b"mine" and os.listdir(tmp_path) == ["x"]


def test_a_pack_that_is_seen_late_is_waited_for_on_a_network_file_system_only(
    home: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_image(Options(str(tree)), str(tmp_path / "s"), "t:1")
    store = Store(str(tmp_path / "s"))
    store.refresh()
    digest = store.hash(b"first content " * 100)
    [(name, _, _)] = store.locate(digest)
    path, aside = Path(store.backend.path(f"packs/{name}")), tmp_path / "aside"
    path.rename(aside)
    with pytest.raises(CafsError):
        store.read_object(digest)
    store = Store(str(tmp_path / "s"))
    aside.rename(path)
    store.refresh()
    path.rename(aside)
    monkeypatch.setattr("cafs.mountinfo.fstype", lambda _: "nfs4")
    asked = threading.Event()
    real = os.listdir

    def listdir(where: str) -> list[str]:
        asked.set()
        return real(where)

    monkeypatch.setattr(os, "listdir", listdir)
    threading.Thread(target=lambda: (asked.wait(10 * SLOW), aside.rename(path)), daemon=True).start()
    assert store.read_object(digest) == b"first content " * 100
    assert asked.is_set()


@pytest.mark.needs("root", "setpriv")
def test_a_root_without_roots_rights_can_use_a_store_that_it_may_write_to(home: Path, tree: Path, tmp_path: Path) -> None:
    """As on NFS with root_squash: no overriding of modes, no chown, files that are not its own."""
    for name in ("store", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "store").chmod(0o777)
    os.chown(tmp_path / "store", 65534, 65534)
    squashed = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-chown,-fowner,-fsetid", "--inh-caps=-all"]
    for command in (["cafs-index", "create", tree, "-t", "t:1"], ["cafs-store", "fsck"], ["cafs-index", "cat", "t:1", "/a"]):
        done = subprocess.run([*squashed, BIN / command[0], *command[1:]], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout == b"first content " * 100


def test_a_repair_may_be_killed_at_every_step_and_loses_nothing_that_was_good(home: Path, tree: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    create_image(Options(str(tree)), str(pristine), "t:1")
    store = Store(str(pristine))
    store.refresh()
    bad, good = store.hash(b"first content " * 100), store.hash(b"second content " * 100)
    [(name, offset, _)] = store.locate(bad)
    pack = Path(store.backend.path(f"packs/{name}"))
    pack.chmod(0o644)
    with open(pack, "r+b") as file:
        file.seek(offset + 30)
        file.write(b"\xff\xff\xff")
    pack.chmod(0o444)

    def repair(root: Path) -> None:
        list(check(Store(str(root)), repair=True))

    def copy() -> Path:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        return Path(shutil.copytree(pristine, tmp_path / "work"))

    work = copy()
    calls = calls_of(lambda: repair(work), str(work))
    assert any(call.startswith("link packs") or call.startswith("rename packs") for call in calls)
    for at in range(len(calls)):
        work = copy()
        run_with_fault(lambda work=work: repair(work), str(work), at, None)  # type: ignore[misc]
        assert Store(str(work)).read_object(good) == b"second content " * 100, calls[at]
        repair(work)
        assert Store(str(work)).read_object(good) == b"second content " * 100, calls[at]
        left = [(found.problem, found.subject.split()[0]) for found in check(Store(str(work)))]
        assert left == [("missing-object", bad.hex())], calls[at]
        create_image(Options(str(tree), rehash=True), str(work), "t:1")
        assert list(check(Store(str(work)), repair=True)) == [], calls[at]
    print(f"{len(calls)} kills")


def test_a_push_goes_round_a_damaged_copy_and_fails_only_without_a_good_one(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(3):
        (tree / f"{number}").write_bytes(os.urandom(5000))
    copy = tmp_path / "copy"
    cmd("cafs-index", "create", tree, "-t", "x:1")
    store = Store(str(tmp_path / "store"))
    [name] = store.pack_sizes()
    first = min(store.read_footer(name).rows(), key=lambda row: row[2])
    path = Path(store.backend.path(f"packs/{name}"))  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[first[2] + 30] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    done = cmd("cafs-store", "push", "x:1", copy)
    assert done.returncode == 5 and b"no good copy of object" in done.stderr and done.stderr.count(b"\n") == 2
    (tree / "extra").write_bytes(b"makes another pack")
    other = tmp_path / "other"
    cmd("cafs-index", "create", tree, "-t", "y:1", "--store", other)
    [second] = Store(str(other)).pack_sizes()
    shutil.copy(other / "packs" / second, tmp_path / "store" / "packs")
    done = cmd("cafs-store", "push", "x:1", copy)
    assert done.returncode == 0, done.stderr
    assert cmd("cafs-store", "fsck", "--store", copy).stdout == b""
    assert cmd("cafs-index", "verify", "x:1", "--store", copy).returncode == 0
    for path in (tmp_path / "store" / "meta").glob("*/*.erofs1"):
        path.unlink()  # it follows from the index
    assert cmd("cafs-store", "push", "x:1", tmp_path / "third").returncode == 0
    assert cmd("cafs-store", "fsck", "--store", tmp_path / "third").stdout == b""
