"""Metadata images: what the kernel and erofs-utils see in them is what the index says, whatever the index."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cafs import erofs, fsck, image
from cafs import format as fmt
from cafs.digest import OBJECTS
from cafs.errors import UnsupportedError
from cafs.format import Entry, Header
from cafs.index import Index, load
from cafs.store import Store
from tests.conftest import Run
from tests.test_index_format import VECTORS
from tests.test_mount import make_everything

pytestmark = pytest.mark.needs("root", "fsck.erofs", "dump.erofs")
EDGE = [0, 1, 4095, 4096, 4097, (4 << 20), (1 << 43) - 1, (1 << 43) + 1, (1 << 63) - 1]


def index_of(*entries: Entry, is_layer: bool = False) -> Index:
    entries_ = sorted((Entry(fmt.DIRECTORY, b"/", 0o755), *entries), key=lambda entry: fmt.order_key(entry.path))
    body = b"".join(entry.encode() for entry in entries_)
    return load(io.BytesIO(Header(is_layer=is_layer).encode() + body + fmt.encode_trailer(len(entries_))))


@contextmanager
def mounted(data: bytes, tmp_path: Path) -> Iterator[bytes]:
    """A mount of the image, which fsck.erofs has passed."""
    file, point = tmp_path / "image.erofs", tmp_path / "erofs"
    file.write_bytes(data)
    point.mkdir(exist_ok=True)
    subprocess.run(["fsck.erofs", file], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", file, point], check=True)
    try:
        yield os.fsencode(point)
    finally:
        subprocess.run(["umount", point], check=True)


def seen(top: bytes) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    for directory, names, files in os.walk(top):
        for path in [os.path.join(directory, name) for name in [*names, *files]] + [directory]:
            status = os.lstat(path)
            xattrs = {}
            if not stat.S_ISLNK(status.st_mode):
                xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            found[path[len(top) :] or b"/"] = (
                stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns,
                status.st_rdev, status.st_nlink, os.readlink(path) if stat.S_ISLNK(status.st_mode) else status.st_size * stat.S_ISREG(status.st_mode),
                xattrs,
            )  # fmt: skip
    return found


def said(index: Index) -> dict[bytes, tuple[object, ...]]:
    """The same from the index alone."""
    kinds = dict(zip(b"fFdlcbps", (0o10, 0o10, 0o4, 0o12, 0o2, 0o6, 0o1, 0o14), strict=True))
    children = {entry: sum(index.kind(one) == b"d" for one in index.children(entry)) for entry in range(len(index))}
    found: dict[bytes, tuple[object, ...]] = {}
    for number in range(len(index)):
        inode = index.inode(number)
        entry = index.entry(inode)
        xattrs = {os.fsdecode(name): value for name, value in entry.xattrs}
        if entry.digest:
            name = entry.digest.hex() + (".c" if entry.type == b"F" else "")
            xattrs |= {
                "trusted.overlay.metacopy": b"",
                "trusted.overlay.redirect": f"/.cafs-objects/{name[:2]}/{name[2:]}".encode(),
            }
        found[index.path(number)] = (
            kinds[entry.type[0]] << 12, entry.mode, entry.uid, entry.gid, entry.mtime_ns, os.makedev(*entry.device),
            2 + children[inode] if entry.type == b"d" else index.links.get(inode, 1), entry.target or entry.size, xattrs,
        )  # fmt: skip
    return found


def test_the_kernel_sees_every_kind_of_entry_as_the_index_says(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_everything(tmp_path / "tree", many=70_000)
    cmd("cafs-index", "create", tmp_path / "tree", "-t", "all:1")
    store = Store(str(home / "store"))
    found = image.resolve(store, "all:1")
    data = store.get_meta(found.metadata[0], "erofs1")
    index = image.load_layer(store, found.layers[0])
    assert data == erofs.encode(index)
    with mounted(data, tmp_path) as top:
        assert seen(top) == said(index)


def test_sizes_times_links_and_targets_at_their_limits(tmp_path: Path) -> None:
    entries = [
        Entry(fmt.CHUNKED if size > 4 << 20 else fmt.FILE, b"/%d" % size, 0o644, size=size, digest=b"d" * 32 * bool(size))
        for size in EDGE
    ]
    entries += [Entry(fmt.SYMLINK, b"/l%d" % size, 0o777, target=b"t" * size) for size in (1, 3900, 4000, 4001, 4095)]
    entries += [Entry(fmt.FIFO, b"/t%d" % at, mtime_ns=ns) for at, ns in enumerate((fmt.INT64_MIN, -1, 0, fmt.INT64_MAX))]
    entries += [Entry(fmt.FILE, b"/many", 0o600)] + [Entry(fmt.HARDLINK, b"/x%d" % at, target=b"/many") for at in range(66_000)]
    value = bytes(range(256)) * 255
    entries += [
        Entry(fmt.DIRECTORY, b"/x", 0o700, xattrs=((b"user.big", value), (b"user.same", b"v"))),
        Entry(fmt.FILE, b"/y", 0o700, size=1, digest=b"e" * 32, xattrs=((b"user.big", value), (b"user.same", b"v"))),
        Entry(fmt.FILE, b"/z", 0o700, xattrs=tuple((b"user.%03d" % at, b"s") for at in range(300))),
        Entry(fmt.FILE, b"/zz", 0o700, xattrs=tuple((b"user.%03d" % at, b"s") for at in range(300))),
    ]
    index = index_of(*entries)
    with mounted(erofs.encode(index), tmp_path) as top:
        assert seen(top) == said(index)


names = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(names.filter(lambda one: one != OBJECTS), max_size=60), st.integers(0, 4095), st.integers(0, 300))
def test_directories_of_any_names_are_read_back(tmp_path: Path, found: set[bytes], target: int, extra: int) -> None:
    entries = [Entry(fmt.SYMLINK, b"/" + name, 0o777, target=b"t" * (target or 1)) for name in found if name != b"d"]
    entries += [Entry(fmt.DIRECTORY, b"/d", 0o755)] + [Entry(fmt.DIRECTORY, b"/d/%d" % at, 0o755) for at in range(extra)]
    index = index_of(*entries)
    with mounted(erofs.encode(index), tmp_path) as top:
        assert seen(top) == said(index)


def test_no_inode_crosses_the_end_of_a_block() -> None:
    for size in range(3900, 4100):
        names = [Entry(fmt.FIFO, b"/d/%03d" % at + b"n" * 200, 0o644) for at in range(18)]
        found = erofs._Image(index_of(Entry(fmt.DIRECTORY, b"/d", 0o755, xattrs=((b"user.a", b"x" * size),)), *names))
        found.encode()
        assert all(at % 4096 <= 4096 - 64 for at in found.offset.values())


def test_a_layer_has_the_marks_of_overlayfs(tmp_path: Path) -> None:
    layer = index_of(
        Entry(fmt.WHITEOUT, b"/gone"), Entry(fmt.OPAQUE, b"/new", 0o700), Entry(fmt.FILE, b"/new/f", 0o644), is_layer=True
    )
    with mounted(erofs.encode(layer), tmp_path) as top:
        assert stat.S_ISCHR(os.lstat(top + b"/gone").st_mode) and os.lstat(top + b"/gone").st_rdev == 0
        assert os.getxattr(top + b"/new", "trusted.overlay.opaque") == b"y"


def test_what_overlayfs_would_take_for_something_else_has_no_metadata_image() -> None:
    with pytest.raises(UnsupportedError, match="whiteout"):
        erofs.encode(index_of(Entry(fmt.CHAR_DEVICE, b"/zero", device=(0, 0))))
    with pytest.raises(UnsupportedError, match="objects"):
        erofs.encode(index_of(Entry(fmt.DIRECTORY, b"/.cafs-objects", 0o755)))
    lonely = load(io.BytesIO(Header(is_layer=True).encode() + Entry(fmt.FILE, b"/a/b", 0o644).encode() + fmt.encode_trailer(1)))
    huge = (Entry(fmt.CHUNKED, b"/%d" % at, 0o644, size=(1 << 63) - 1, digest=b"d" * 32) for at in range(20))
    with pytest.raises(UnsupportedError, match="so large"):
        erofs.encode(index_of(*huge))
    with pytest.raises(UnsupportedError, match="opaque"):
        erofs.encode(
            load(io.BytesIO(Header(is_layer=True).encode() + Entry(fmt.OPAQUE, b"/", 0o755).encode() + fmt.encode_trailer(1)))
        )
    with pytest.raises(UnsupportedError, match="parent"):
        erofs.encode(lonely)


def test_the_bytes_of_the_layout_are_frozen() -> None:
    index = load(io.BytesIO((VECTORS / "all-types.ok").read_bytes()))
    assert hashlib.sha256(erofs.encode(index)).hexdigest() == "329ade1e3660717c15a7e94574f6ba74e5e9f4386afe830de0f4efa0fddd6c6c"


def test_fsck_compares_the_metadata_image_with_its_index(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "f").write_bytes(b"x")
    cmd("cafs-index", "create", tmp_path / "tree", "-t", "a:1")
    store = Store(str(home / "store"))
    found = image.resolve(store, "a:1")
    os.unlink(store.backend.path(store.meta_name(found.metadata[0], "erofs1")))  # type: ignore[attr-defined]
    assert [(one.problem, one.repaired) for one in fsck.check(store, repair=True)] == [("missing-meta", True)]
    assert list(fsck.check(store)) == []
    other = store.put_meta(erofs.encode(index_of()), "erofs1")
    store.set_ref("a:1", image.put_layers(store, found.layers, {}, (other,)).digest)
    assert [one.problem for one in fsck.check(store)] == ["wrong-metadata"]
