"""The upper directory of an overlay as a layer: over what was below, it makes the tree that was seen, and holds no data twice."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cafs import commit, image, kept, lookup
from cafs import format as fmt
from cafs.format import Entry, Header
from cafs.index import Index, load
from cafs.indexing import Options, create_image, index_directory
from cafs.store import Store
from tests.conftest import Run

pytestmark = pytest.mark.needs("root", "fuse")


class Over:
    """An image mounted writably, again and again: what is done in `point` becomes one more layer."""

    def __init__(self, home: Path, kernel: Run, cmd: Run) -> None:
        self.home, self.kernel, self.cmd = home, kernel, cmd
        self.store = Store(os.environ["CAFS_STORE"])
        self.image = image.resolve(self.store, "x:1")
        self.point = home / "mnt"
        self.turn = 0
        self.upper = home

    def mount(self) -> Path:
        self.turn += 1
        self.upper = self.home / f"rw{self.turn}"
        self.upper.mkdir()
        done = self.kernel(self.image.digest.hex(), self.point, "--rw", self.upper, "--suid")
        assert done.returncode == 0, done.stderr
        return self.point

    def commit(self, stubs: tuple[bytes, ...] = ()) -> Index:
        """The layer.  Checks that the merged image is the tree as it was seen."""
        header = Header(self.store.hash_name, self.store.chunk_size)
        list(self.point.rglob("*"))  # reading makes overlayfs tidy its marks, which is a change
        seen = index_directory(str(self.point), header, 2)
        assert self.cmd("cafs-mount", "--unmount", self.point).returncode == 0
        before = len(self.image.layers)
        self.image = commit.commit(self.store, self.image, str(self.upper / "upper"), {}, None, stubs)
        made = image.load_tree(self.store, self.image)
        if not stubs:
            assert alone(made) == alone(seen)
        if len(self.image.layers) == before:
            return load(io.BytesIO(Header(is_layer=True).encode() + fmt.encode_trailer(0)))
        return image.load_layer(self.store, self.image.layers[-1])


@pytest.fixture
def over(home: Path, tmp_path: Path, kernel: Run, cmd: Run) -> Over:
    tree = tmp_path / "tree"
    for name in ("d/deep/er", "d/other", "e", "empty"):
        (tree / name).mkdir(parents=True)
    for name in ("a", "b", "d/c", "d/deep/f", "d/deep/er/g", "d/other/h", "e/i"):
        (tree / name).write_bytes(name.encode() * 2000)
    (tree / "large").write_bytes(random.Random(2).randbytes((9 << 20) + 5))
    os.symlink("d/c", tree / "link")
    os.link(tree / "d" / "c", tree / "d" / "c2")
    os.link(tree / "d" / "c", tree / "e" / "c3")
    os.mkfifo(tree / "pipe")
    os.setxattr(tree / "b", "user.x", b"1")
    create_image(Options(str(tree)), os.environ["CAFS_STORE"], "x:1")
    return Over(home, kernel, cmd)


def alone(index: Index) -> list[Entry]:
    """Each name as if it were the file's only one: a link between what was moved and what was not is lost, as in a copy."""
    return [replace(index.entry(index.inode(number)), path=index.path(number)) for number in range(len(index))]


def rows(layer: Index) -> dict[bytes, bytes]:
    return {entry.path: entry.type for entry in layer.entries()}


def test_nothing_done_makes_no_layer_and_copies_that_changed_nothing_are_none(over: Over) -> None:
    point = over.mount()
    (point / "a").read_bytes()
    with open(point / "b", "r+b"):
        pass  # copied up
    os.chmod(point / "e", (point / "e").stat().st_mode)
    (point / "a").rename(point / "z")
    (point / "z").rename(point / "a")
    status = (over.home / "tree").stat()
    os.utime(point, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert rows(over.commit()) == {} and len(over.image.layers) == 1


def test_a_renamed_directory_becomes_lines_and_no_data(over: Over) -> None:
    point = over.mount()
    (point / "d").rename(point / "moved")
    (point / "moved" / "deep" / "f").unlink()
    (point / "moved" / "new").write_bytes(b"new")
    (point / "moved" / "other").rename(point / "moved" / "another")
    layer = over.commit()
    found = rows(layer)
    assert found[b"/d"] == fmt.WHITEOUT and found[b"/moved"] == fmt.DIRECTORY
    assert found[b"/moved/deep/er/g"] == fmt.FILE and found[b"/moved/another/h"] == fmt.FILE
    assert b"/moved/deep/f" not in found and b"/moved/other" not in found
    assert found[b"/moved/c2"] == fmt.HARDLINK
    packs = [path for path in (over.home / "store" / "packs").iterdir() if path.name != "list"]
    assert sum(path.stat().st_size for path in packs[1:]) < 4096 or len(packs) == 1


def test_attributes_alone_are_stored_without_their_content(over: Over) -> None:
    before = sum(path.stat().st_size for path in (over.home / "store" / "packs").iterdir())
    point = over.mount()
    for name in ("a", "large", "d/deep"):
        os.chown(point / name, 7, 8)
    (point / "large").rename(point / "e" / "large")
    os.link(point / "e" / "large", point / "again")
    found = rows(over.commit())
    assert found[b"/large"] == fmt.WHITEOUT and found[b"/again"] == fmt.CHUNKED and found[b"/e/large"] == fmt.HARDLINK
    assert sum(path.stat().st_size for path in (over.home / "store" / "packs").iterdir()) < before + 4096


def test_what_replaces_a_directory_hides_what_was_in_it(over: Over) -> None:
    point = over.mount()
    shutil.rmtree(point / "d")
    (point / "d").mkdir()
    (point / "d" / "only").write_bytes(b"only")
    shutil.rmtree(point / "e")
    (point / "e").write_bytes(b"a file now")
    (point / "empty").rmdir()
    found = rows(over.commit())
    assert found[b"/d"] == fmt.OPAQUE and found[b"/e"] == fmt.FILE and found[b"/empty"] == fmt.WHITEOUT
    point = over.mount()
    (point / "d").rename(point / "d2")
    (point / "d").mkdir()
    (point / "d2" / "only").rename(point / "d" / "only")
    (point / "e").unlink()
    (point / "e").mkdir()
    found = rows(over.commit())
    assert found[b"/d"] == fmt.OPAQUE and found[b"/d2"] == fmt.DIRECTORY and found[b"/e"] == fmt.DIRECTORY


def test_a_directory_that_comes_back_into_one_made_anew_is_listed_whole(over: Over) -> None:
    point = over.mount()
    (point / "d").rename(point / "aside")
    (point / "d").mkdir()
    (point / "aside" / "deep").rename(point / "d" / "deep")
    found = rows(over.commit())
    assert found[b"/d"] == fmt.OPAQUE and found[b"/d/deep/er/g"] == fmt.FILE


def test_what_was_made_to_mount_on_is_left_out_unless_something_is_in_it(over: Over) -> None:
    point = over.mount()
    (point / "empty" / "stub").write_bytes(b"")
    (point / "e" / "stub").mkdir()
    (point / "full").mkdir()
    (point / "full" / "file").write_bytes(b"x")
    found = rows(over.commit((b"/empty/stub", b"/e/stub", b"/full", b"/a")))
    assert b"/empty/stub" not in found and b"/e/stub" not in found
    assert found[b"/full"] == fmt.DIRECTORY and found[b"/full/file"] == fmt.FILE


def _names(point: Path, rng: random.Random, want: Callable[[Path], bool]) -> Path | None:
    found = sorted(path for path in point.rglob("*") if want(path) and not (path.parent.is_symlink()))
    return rng.choice(found) if found else None


def _directory(point: Path, rng: random.Random) -> Path:
    return _names(point, rng, lambda path: path.is_dir() and not path.is_symlink()) or point


def change(point: Path, rng: random.Random) -> None:
    """One thing that a container may do to its files; names are few, so that they meet."""
    new = _directory(point, rng) / rng.choice("abcdwxyz")
    file = _names(point, rng, lambda path: path.is_file() and not path.is_symlink())
    old = _names(point, rng, lambda path: True)
    try:
        match rng.randrange(11):
            case 0 if not new.is_fifo():
                new.write_bytes(rng.randbytes(rng.randrange(9000)))
            case 1 if file:
                with open(file, "ab") as out:
                    out.write(b"more")
            case 2 if file:
                os.chmod(file, rng.choice((0o600, 0o4755, 0o644)))
            case 3 | 4 | 5 if old:
                old.rename(new)
            case 6 if old:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            case 7:
                new.mkdir()
            case 8 if file:
                os.link(file, new)
            case 9:
                os.symlink("somewhere", new)
            case 10:
                os.setxattr(_directory(point, rng), "user.n", rng.randbytes(3))
    except OSError:
        pass  # it is there already, or a directory would go into itself


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_the_layers_make_the_tree_that_was_seen(over: Over, seed: int) -> None:
    """Slow, for each is three mounts: renames of what was renamed, over and into one another, are not thought of by hand."""
    rng = random.Random(seed)
    for _ in range(3):
        point = over.mount()
        for _ in range(rng.choice((5, 40))):
            change(point, rng)
        over.commit()


def test_paths_are_found_in_mapped_layers_as_in_the_merged_tree(over: Over) -> None:
    rng = random.Random(99)
    for _ in range(3):
        point = over.mount()
        for _ in range(25):
            change(point, rng)
        over.commit()
    whole = image.load_tree(over.store, over.image)
    top = commit.open_below(over.store, over.image.layers)
    assert [node.path for node in top.below()] == [whole.path(number) for number in range(1, len(whole))]
    for number in range(1, len(whole)):
        node = top.walk(whole.path(number))
        assert node is not None and node.entry == alone(whole)[number]
    for path in (b"/none", b"/a/b", b"/d/none", b"/dd"):
        assert (top.walk(path) is None) == (whole.find(path) is None)


def test_a_name_in_a_mapped_index_is_found_among_those_it_begins(home: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("a", "a b", "a-b", "a\x01", "aa"):
        (tree / name).mkdir(parents=True)
        (tree / name / "x").write_bytes(b"x")
    create_image(Options(str(tree)), os.environ["CAFS_STORE"], "x:1")
    store = Store(os.environ["CAFS_STORE"])
    found = lookup.MappedIndex(kept.get_index(store, image.resolve(store, "x:1").layers[0]))
    names = [b"a", b"a\x01", b"a b", b"a-b", b"aa"]
    assert list(found.children(b"/")) == names
    for name in names:
        assert list(found.children(b"/" + name)) == [b"x"]
        assert found.find(b"/" + name + b"/x") is not None and found.find(b"/" + name + b"x") is None
