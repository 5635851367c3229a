"""Layers of an image: what they make together is what laying one directory over another makes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs import format as fmt
from cafs import image, locator
from cafs.difference import difference
from cafs.errors import CafsError, FormatError, UsageError
from cafs.format import Entry, Header
from cafs.index import Index, load
from cafs.layers import merge
from cafs.store import Store
from cafs.writer import Writer
from tests.conftest import Run

NAMES = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: b"/" + b"/".join(names))
KINDS = st.sampled_from([fmt.DIRECTORY, fmt.SYMLINK, fmt.OPAQUE, fmt.WHITEOUT])


def index_of(entries: list[Entry], *, is_layer: bool) -> Index:
    entries = sorted(entries, key=lambda entry: fmt.order_key(entry.path))
    body = b"".join(entry.encode() for entry in entries)
    return load(io.BytesIO(Header(is_layer=is_layer).encode() + body + fmt.encode_trailer(len(entries))))


def some(kind: bytes, path: bytes, mark: int) -> Entry:
    if kind == fmt.WHITEOUT:
        return Entry(kind, path)
    return Entry(
        kind, path, 0o777 if kind == fmt.SYMLINK else 0o700, mtime_ns=mark, target=b"t" if kind == fmt.SYMLINK else b""
    )


Node = dict[bytes, "tuple[bytes, int, Node]"]


def apply(tree: Node, layer: dict[bytes, bytes], mark: int) -> None:
    """The plain meaning of a layer on a tree of nested dictionaries: (kind, mtime, what is in it)."""
    for path, kind in sorted(layer.items(), key=lambda item: fmt.order_key(item[0])):
        *above, last = path.split(b"/")[1:]
        node = tree
        if kind == fmt.WHITEOUT:
            for name in above:
                node = node[name][2] if name in node else {}
            node.pop(last, None)
            continue
        for name in above:
            if name not in node:
                node[name] = (fmt.DIRECTORY, 0, {})
            if node[name][0] != fmt.DIRECTORY:
                raise FormatError("below a file")
            node = node[name][2]
        keeps = kind == fmt.DIRECTORY and last in node and node[last][0] == fmt.DIRECTORY
        node[last] = (fmt.SYMLINK if kind == fmt.SYMLINK else fmt.DIRECTORY, mark, node[last][2] if keeps else {})


def flatten(node: Node, above: bytes = b"") -> list[tuple[bytes, bytes, int]]:
    found = []
    for name, (kind, mark, inside) in sorted(node.items()):
        found.append((above + b"/" + name, kind, mark))
        found += flatten(inside, above + b"/" + name)
    return found


@given(st.lists(st.dictionaries(PATHS, KINDS, max_size=6), min_size=1, max_size=4))
def test_merging_is_laying_one_tree_over_another(layers: list[dict[bytes, bytes]]) -> None:
    indexes = [index_of([Entry(fmt.DIRECTORY, b"/", 0o755)], is_layer=False)]
    expected: Node = {}
    refused = False
    for mark, layer in enumerate(layers, 1):
        layer = {
            path: kind
            for path, kind in layer.items()
            if not any(layer.get(path.rsplit(b"/", n)[0]) in (fmt.SYMLINK, fmt.WHITEOUT) for n in range(1, path.count(b"/")))
        }
        indexes.append(index_of([some(kind, path, mark) for path, kind in layer.items()], is_layer=True))
        try:
            apply(expected, layer, mark)
        except FormatError:
            refused = True
    try:
        merged = load(io.BytesIO(merge(indexes)))
    except FormatError:
        assert refused
        return
    if not refused:  # what lies below a file may have been hidden by a later layer: then both are right
        found = [(entry.path, entry.type, entry.mtime_ns) for entry in merged.entries()]
        assert found[1:] == flatten(expected)


def test_a_linked_inode_keeps_the_names_that_survive() -> None:
    file = Entry(fmt.FILE, b"/a", 0o644, size=1, digest=b"1" * 32)
    links = [Entry(fmt.HARDLINK, path, target=b"/a") for path in (b"/b", b"/c")]
    base = index_of([Entry(fmt.DIRECTORY, b"/", 0o755), file, *links], is_layer=False)
    merged = load(io.BytesIO(merge([base, index_of([Entry(fmt.WHITEOUT, b"/a")], is_layer=True)])))
    assert [(entry.type, entry.path, entry.target) for entry in merged.entries()][1:] == [
        (fmt.FILE, b"/b", b""),
        (fmt.HARDLINK, b"/c", b"/b"),
    ]
    assert merged.links == {1: 2} and merged.entry(1).digest == file.digest
    over = index_of([Entry(fmt.FILE, b"/b", 0o600, size=1, digest=b"2" * 32)], is_layer=True)
    merged = load(io.BytesIO(merge([base, over])))
    assert [(entry.type, entry.mode) for entry in merged.entries()][1:] == [(b"f", 0o644), (b"f", 0o600), (b"h", 0o644)]


def test_what_does_not_fit_is_refused() -> None:
    base = index_of([Entry(fmt.DIRECTORY, b"/", 0o755)], is_layer=False)
    layer = index_of([], is_layer=True)
    with pytest.raises(UsageError):
        merge([layer, base])
    other = load(io.BytesIO(b"cafs-index 1 xxh128 4194304 layer\nend 0\n"))
    with pytest.raises(UsageError):
        merge([base, other])


@pytest.mark.needs("root", "fuse", "fusermount3")
def test_an_image_of_several_layers_is_one_tree_for_every_command(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    (tree / "d").mkdir(parents=True)
    point.mkdir()
    (tree / "d" / "kept").write_text("kept")
    (tree / "d" / "gone").write_text("gone")
    assert cmd("cafs-index", "create", tree, "-t", "base:1").returncode == 0
    store = Store(str(tmp_path / "store"))
    base = image.resolve(store, "base:1")
    text = b"new content"
    digest = store.hash(text)
    from cafs.pack import encode_frame

    with Writer(store) as writer:
        writer.put(digest, 0, encode_frame(text, 0, None))
    layer = index_of(
        [Entry(fmt.WHITEOUT, b"/d/gone"), Entry(fmt.FILE, b"/d/new", 0o644, size=len(text), digest=digest)], is_layer=True
    )
    data = layer.encode()
    store.put_locator(store.hash(data), locator.encode(store, layer))
    made = image.put_layers(store, (base.layers[0], store.put_meta(data, "index")), {"config": {"User": "5"}})
    store.set_ref("two:1", made.digest)
    assert cmd("cafs-index", "ls", "two:1").stdout.split() == [b"/", b"/d", b"/d/kept", b"/d/new"]
    assert cmd("cafs-index", "cat", "two:1", "/d/new").stdout == text
    assert cmd("cafs-mount", "two:1", point).returncode == 0
    assert sorted(os.listdir(point / "d")) == ["kept", "new"] and (point / "d" / "new").read_bytes() == text
    assert cmd("cafs-index", "verify", "two:1", point).stdout == b""
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    assert cmd("cafs-index", "verify", "two:1").returncode == 0
    assert cmd("cafs-store", "fsck").stdout == b""
    assert json_config(cmd, "two:1") == b"5"
    (tmp_path / "layer.idx").write_bytes(layer.encode())
    assert cmd("cafs-index", "merge", "base:1", tmp_path / "layer.idx", "-t", "folded:1").returncode == 0
    assert cmd("cafs-index", "diff", "two:1", "folded:1").returncode == 0
    piped = cmd("cafs-index", "merge", "base:1", tmp_path / "layer.idx", "-o", "-").stdout
    assert piped.count(b"\n") == 6
    wrong = cmd("cafs-index", "merge", tmp_path / "layer.idx", tmp_path / "layer.idx")
    assert wrong.returncode == 2 and b"what it lies on is missing" in wrong.stderr


def json_config(cmd: Run, ref: str) -> bytes:
    """The user of an image's config, by way of an export."""
    import json
    import tarfile

    data = cmd("cafs-index", "export", ref, "docker-archive:-:x:1").stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert len(manifest[0]["Layers"]) == 2
        config = json.load(archive.extractfile(manifest[0]["Config"]))  # type: ignore[arg-type]
    return str(config["config"]["User"]).encode()


TREE = st.dictionaries(PATHS, st.tuples(st.sampled_from("dflh"), st.integers(0, 1)), max_size=9)


def tree_of(wanted: dict[bytes, tuple[str, int]]) -> Index:
    """A whole tree: directories above are made, 'h' is another name of the last file, or a file if there is none."""
    entries = {b"/": Entry(fmt.DIRECTORY, b"/", 0o755)}
    files: list[bytes] = []
    for path, (kind, mark) in sorted(wanted.items(), key=lambda item: fmt.order_key(item[0])):
        above = [path[:at] for at, byte in enumerate(path) if at and byte == ord("/")]
        if any(one in entries and entries[one].type != fmt.DIRECTORY for one in above):
            continue
        entries |= {one: Entry(fmt.DIRECTORY, one, 0o755) for one in above if one not in entries}
        if kind == "h" and files:
            entries[path] = Entry(fmt.HARDLINK, path, target=files[-1])
        elif kind in "hf":
            entries[path] = Entry(fmt.FILE, path, 0o644, mtime_ns=mark)
            files.append(path)
        else:
            is_link = kind == "l"
            entries[path] = Entry(
                fmt.SYMLINK if is_link else fmt.DIRECTORY,
                path,
                0o777 if is_link else 0o755,
                target=b"t" * (mark + is_link) * is_link,
            )
    return index_of(list(entries.values()), is_layer=False)


@given(TREE, TREE)
def test_the_difference_of_two_trees_laid_over_one_is_the_other(
    one: dict[bytes, tuple[str, int]], two: dict[bytes, tuple[str, int]]
) -> None:
    lower, upper = tree_of(one), tree_of(two)
    layer = load(io.BytesIO(difference(lower, upper)))
    assert merge([lower, layer]) == upper.encode()
    for number in range(
        len(upper)
    ):  # what is seen without merging: the topmost entry, with the links that its own layer counts
        found = layer.find(upper.path(number))
        index, entry = (layer, found) if found is not None else (lower, lower.find(upper.path(number)))
        assert entry is not None
        if index.kind(index.inode(entry)) != fmt.DIRECTORY:
            seen = index.links.get(index.inode(entry), 1)
            assert seen == upper.links.get(upper.inode(number), 1)
    assert len(load(io.BytesIO(difference(upper, upper)))) == 0


def test_an_image_over_another_has_one_layer_more_and_is_the_tree(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("kept", "gone", "linked"):
        (tree / name).write_bytes(name.encode())
    os.link(tree / "linked", tree / "other")
    base = cmd("cafs-index", "create", tree, "-t", "base:1").stdout
    assert cmd("cafs-index", "create", tree, "--base", "base:1").stdout == base, "nothing differs: no layer"
    (tree / "gone").unlink()
    (tree / "other").unlink()
    (tree / "new").write_bytes(b"new")
    assert cmd("cafs-index", "create", tree, "--base", "base:1", "-t", "top:1").returncode == 0
    assert cmd("cafs-index", "create", tree, "-t", "flat:1").returncode == 0
    assert cmd("cafs-index", "diff", "top:1", "flat:1").stdout == b""
    assert cmd("cafs-index", "verify", "top:1", tree).returncode == 0
    store = Store(str(home / "store"))
    below, above = image.resolve(store, "base:1"), image.resolve(store, "top:1")
    assert above.layers[:-1] == below.layers
    lines = store.get_meta(above.layers[-1], "index").decode().splitlines()[1:-1]
    assert [(line[0], line.split()[-1]) for line in lines] == [
        ("d", "/"),
        ("w", "/gone"),
        ("f", "/linked"),
        ("f", "/new"),
        ("w", "/other"),
    ]
    with pytest.raises(CafsError, match="1024 layers"):
        image.put_layers(store, below.layers * 1025, {})
    assert cmd("cafs-store", "untag", "base:1").returncode == 0
    assert cmd("cafs-store", "gc", "--grace", "0").returncode == 0
    assert cmd("cafs-store", "fsck").stdout == b"" and cmd("cafs-index", "verify", "top:1", tree).returncode == 0
    done = cmd("cafs-index", "create", tree, "--base", "top:1", "-o", "-")
    assert done.returncode == 2 and b"-o" in done.stderr
