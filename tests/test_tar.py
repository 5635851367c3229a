"""Tar streams: the tree in an archive is indexed as the directory it was made from; what is unsound is refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cafs import acl
from cafs.errors import CorruptError, FormatError
from cafs.format import FILE, Header
from cafs.index import Index, load
from cafs.tar import Member, Reader
from cafs.tarindex import MemberReader, TreeIndexer, tar_tree
from tests.conftest import Run
from tests.test_mount import make_everything
from tests.waiting import SLOW

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "tar"
OWN = Path(__file__).parent / "vectors" / "tar"
STEP = 4 << 20


def members(data: bytes) -> list[tuple[Member, str]]:
    """Each member, with the digest of its content in steps."""
    reader = Reader(io.BytesIO(data))
    found = []
    for member in reader:
        digest = hashlib.sha256()
        for count, piece in reader.pieces(STEP):
            digest.update(piece or b"%d" % count)
        found.append((member, digest.hexdigest()))
    return found


def index_of(data: bytes) -> Index:
    return load(io.BytesIO(index_bytes(io.BytesIO(data))))


def index_bytes(stream: io.BytesIO) -> bytes:
    return TreeIndexer(MemberReader(Header()), lambda reader: tar_tree(reader, stream)).run()


def archive(*infos: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, tar type, content or link target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, text in infos:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
            else:
                info.linkname = text
                tar.addfile(info)
    return out.getvalue()


REG, DIR, SYM, LNK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

REFUSED = [
    "pax-bad-hdr-file", "pax-bad-mtime-file", "pax-nul-path", "pax-nul-xattrs", "neg-size", "issue10968", "issue11169",
    "issue12435", "writer-big", "writer-big-long", "pax-path-hdr",
]  # fmt: skip
SIZES = {
    "pax-nil-sparse-data": 1000, "pax-nil-sparse-hole": 1000, "pax-sparse-big": 60_000_000_000, "gnu-sparse-big": 60_000_000_000,
    "gnu-nil-sparse-data": 1000, "gnu-nil-sparse-hole": 1000, "pax-pos-size-file": 999, "sparse-formats": 200,
}  # fmt: skip
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="the vectors of other projects are not beside this checkout")


@needs_vectors
def test_the_vectors_of_other_projects_are_read_or_refused_as_they_should_be() -> None:
    for path in sorted(VECTORS.glob("*.tar")):
        if path.stem in REFUSED:
            with pytest.raises(FormatError):
                members(path.read_bytes())
        else:
            found = members(path.read_bytes())
            assert SIZES.get(path.stem, found[0][0].size if found else 0) == (found[0][0].size if found else 0), path
    with pytest.raises(FormatError):
        members(bz2.decompress((VECTORS / "pax-bad-hdr-large.tar.bz2").read_bytes()))


@needs_vectors
def test_four_sparse_formats_of_one_file_have_one_content() -> None:
    found = members((VECTORS / "sparse-formats.tar").read_bytes())
    assert len({digest for _, digest in found[:4]}) == 1
    assert members((VECTORS / "gnu-not-utf8.tar").read_bytes())[0][0].name == b"hi\x80\x81\x82\x83bye"


@pytest.mark.needs("root", "setcap", "setfacl")
@pytest.mark.parametrize("options", [["--format=pax", "--sparse", "--xattrs", "--xattrs-include=*"], ["--format=gnu", "--sparse"], ["--format=ustar"]])  # fmt: skip
def test_a_tar_of_a_tree_has_the_index_of_the_tree(home: Path, tmp_path: Path, cmd: Run, options: list[str]) -> None:
    tree = tmp_path / "tree"
    make_everything(tree, many=10)
    (tree / "sparse").unlink()
    with open(tree / "sparse", "wb") as file:
        file.truncate(50 << 20)
        for offset in (5 << 20, 20 << 20, 49 << 20):
            file.seek(offset + 4096)
            file.write(b"island")
    dropped = ["socket"]  # tar has no sockets
    if options[0] != "--format=pax":  # no xattrs and no nanoseconds
        for path in (tree / "plain", tree / "sub", tree / "setuid"):
            for name in os.listxattr(path):
                os.removexattr(path, name)
        for path in [*tree.rglob("*"), tree]:
            os.utime(path, (5, 5), follow_symlinks=False)
    if options[0] == "--format=ustar":
        dropped += ["long-link", "none", "plain", "setuid", "sticky", "disk", "n" * 255]  # too long; ids over 2 M
        (tree / "plain-link").unlink()
        (tree / "sub" / "zz-link").unlink()
    for name in dropped:
        (tree / name).unlink()
    for path in (tree / "sub", tree):
        os.utime(path, (5, 5))
    expected = cmd("cafs-index", "create", tree, "-o", "-")
    tar = ["tar", "-c", *options, "--numeric-owner", "--sort=inode", "-C", tree, "."]
    with subprocess.Popen(tar, stdout=subprocess.PIPE) as child:
        piped = cmd("cafs-index", "create", "-", "-o", "-", stdin=child.stdout)
    assert child.returncode == 0 and piped.returncode == 0, piped.stderr
    want, have = expected.stdout.splitlines(), piped.stdout.splitlines()
    assert [line for line in want if line not in set(have)] == []
    assert want == have


@pytest.mark.needs("root", "setfacl", "bsdtar")
@pytest.mark.parametrize(
    "tar", [["tar", "--acls", "--format=pax"], ["bsdtar", "--acls", "--format=pax"]], ids=lambda tar: tar[0]
)
def test_access_control_lists_go_through_archives_both_ways(home: Path, tmp_path: Path, cmd: Run, tar: list[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name in ("s", "masked", "named", "base"):
        (tree / name).touch()
        (tree / name).chmod(0o600)
    for words in (["u:1234:rw", "s"], ["u:5:rwx,g::r,m::r", "masked"], ["u:daemon:r,g:daemon:-", "named"], ["-d", "g:5:rwx", "sub"]):  # fmt: skip
        subprocess.run(["setfacl", *words[:-2], "-m", words[-2], tree / words[-1]], check=True)
    for path in (*tree.iterdir(), tree):
        os.utime(path, (5, 5))
    subprocess.run([*tar, "-C", tree, "-cf", tmp_path / "a.tar", "."], check=True)
    made = cmd("cafs-index", "create", tmp_path / "a.tar", "-o", tmp_path / "a.idx")
    assert made.returncode == 0, made.stderr
    of_tree = cmd("cafs-index", "create", tree, "-o", "-").stdout
    assert (tmp_path / "a.idx").read_bytes() == of_tree and of_tree.count(b"posix_acl") == 4
    cmd("cafs-index", "create", tree, "-t", "a:1")
    cmd("cafs-index", "export", "a:1", tmp_path / "out.tar")
    (tmp_path / "out").mkdir()
    subprocess.run([tar[0], "--acls", "-C", tmp_path / "out", "-xpf", tmp_path / "out.tar"], check=True)
    os.utime(tmp_path / "out", (5, 5))  # bsdtar leaves the top alone
    assert cmd("cafs-index", "create", tmp_path / "out", "-o", "-").stdout == of_tree


def test_who_cannot_keep_an_access_control_list_does_not_keep_its_mask(tmp_path: Path) -> None:
    value = acl.from_text(b"user::rw-,user:1234:rw-,group::---,mask::rw-,other::---")
    assert acl.mode_without(0o660, [(acl.ACCESS, value)]) == 0o600
    assert acl.from_text(acl.to_text(value)) == value
    assert acl.settled(0o660, ((acl.ACCESS, acl.from_text(b"u::rwx\ng::r\no:r")),)) == (0o744, ())
    for text in (b"user::rw-", b"user:1:r,user::r,group::r,other::r", b"user::r,group::r,other::r,user::r", b"who::r", b"u::y"):
        with pytest.raises(ValueError, match="access control list"):
            acl.from_text(text)
    with pytest.raises(ValueError, match="no user 'no-such-user'"):
        acl.from_text(b"user:no-such-user:r--")


@pytest.mark.parametrize("name", sorted(path.name for path in OWN.glob("*.tar.gz")))
def test_every_dialect_of_gnu_tar_bsdtar_and_busybox_gives_the_index_of_the_tree(name: str) -> None:
    wanted = OWN / f"{name.partition('-')[0]}.index"
    assert index_bytes(io.BytesIO((OWN / name).read_bytes())) == wanted.read_bytes()


def test_busybox_and_python_archives_are_read(tmp_path: Path, home: Path, cmd: Run) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "file").write_bytes(b"content")
    (tree / "d" / ("n" * 150)).write_bytes(b"long name")
    os.link(tree / "d" / "file", tree / "d" / "link")
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (9, 9))
    expected = cmd("cafs-index", "create", tree, "-o", "-").stdout
    made = subprocess.run(["busybox", "tar", "-c", "-C", tree, "."], capture_output=True, check=True).stdout
    assert index_of(made).encode() == expected
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
            if dialect == tarfile.USTAR_FORMAT:
                continue  # the long name does not fit
            tar.add(tree, ".")
        assert index_of(out.getvalue()).encode() == expected


def test_a_tar_into_a_store_is_the_same_image_as_the_directory(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(b"text")
    (tree / "large").write_bytes(bytes(5 << 20) + os.urandom(5 << 20))
    (tree / "zeros").write_bytes(bytes(1000))
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (9, 9))
    subprocess.run(["tar", "-cf", tmp_path / "t.tar", "-C", tree, "--numeric-owner", "."], check=True)
    one = cmd("cafs-index", "create", tree, "-t", "dir:1", "-q")
    two = cmd("cafs-index", "create", tmp_path / "t.tar", "-t", "tar:1")
    assert one.stdout == two.stdout and two.returncode == 0
    assert cmd("cafs-index", "cat", "tar:1", "/large").stdout == (tree / "large").read_bytes()
    assert cmd("cafs-store", "fsck").stdout == b""
    left_out = cmd("cafs-index", "create", tmp_path / "t.tar", "-o", "-", "--exclude", "/l*")
    assert b"/large" not in left_out.stdout and b"/small" in left_out.stdout


COMPRESSORS = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_tars_are_read_also_in_several_frames_and_a_cut_one_is_an_error(kind: str) -> None:
    data = archive(("a", REG, "a" * 5000), ("b", REG, "b" * 5000), ("c", REG, "c" * 700))
    compress = COMPRESSORS[kind]
    whole = compress(data[:3000]) + compress(data[3000:])
    assert index_of(whole).encode() == index_of(data).encode()
    for cut in range(1, len(whole) - (11_000 if kind == "none" else 0), max(len(whole) // 200, 1)):
        if kind == "none" and cut % 512 == 0:
            continue  # where a member ends, a cut shows only in what is missing
        with pytest.raises(CorruptError):
            index_of(whole[:cut])


def test_the_last_member_of_a_name_wins_and_unnamed_parents_are_plain() -> None:
    index = index_of(archive(("./x/y/f", REG, "one"), ("/x/y/f", REG, "second"), ("x//y/./g", REG, "g"), ("x", SYM, "z")))
    assert [entry.path for entry in index.entries()] == [b"/", b"/x"]
    index = index_of(archive(("x/y/f", REG, "one"), ("x/y/f", REG, "second"), ("x", DIR, "")))
    entries = {entry.path: entry for entry in index.entries()}
    assert entries[b"/x/y/f"].size == 6
    assert (entries[b"/x/y"].mode, entries[b"/x/y"].uid, entries[b"/x/y"].mtime_ns) == (0o755, 0, 0)


def test_hard_links_may_come_before_their_target_and_names_may_lead_through_links() -> None:
    index = index_of(
        archive(
            ("early", LNK, "lib/z"),
            ("early2", LNK, "early"),
            ("usr/lib", DIR, ""),
            ("lib", SYM, "usr/lib"),
            ("lib/z", REG, "z"),
        )
    )
    lines = index.encode().decode().splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["/", "/early", "/early2", "/lib", "/usr", "/usr/lib", "/usr/lib/z"]
    assert lines[3].startswith("h ") and lines[7].startswith("h ") and lines[2].startswith("f ")
    escaping = index_of(
        archive(("l", SYM, "../../../etc"), ("l/passwd", REG, "x"), ("abs", SYM, "/l"), ("abs/group", REG, "y"))
    )
    assert escaping.find(b"/etc/passwd") and escaping.find(b"/etc/group")


BAD = {
    "dots": (("a/../../b", REG, "x"),),
    "root-is-a-file": (("./", SYM, "x"),),
    "below-a-file": (("a", REG, "x"), ("a/b", REG, "y")),
    "link-to-nothing": (("a", LNK, "b"),),
    "link-to-itself": (("a", LNK, "a"),),
    "links-in-a-circle": (("a", LNK, "b"), ("b", LNK, "a")),
    "link-to-a-directory": (("d", DIR, ""), ("a", LNK, "d")),
    "symlinks-in-a-circle": (("a", SYM, "b"), ("b", SYM, "a"), ("a/x", REG, "x")),
    "long-component": (("n" * 256, REG, "x"),),
    "empty-target": (("a", SYM, ""),),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_tree_can_hold_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        index_of(archive(*BAD[name]))


def test_junk_is_no_tar(home: Path, tmp_path: Path, cmd: Run) -> None:
    (tmp_path / "junk").write_bytes(os.urandom(2000))
    done = cmd("cafs-index", "create", tmp_path / "junk", "-o", "-")
    assert done.returncode == 5 and b"junk': tar, at byte 512: not a tar archive" in done.stderr and done.stdout == b""
    empty = cmd("cafs-index", "create", "-", "-o", "-", stdin=subprocess.DEVNULL)
    assert empty.returncode == 5 and b"not a tar archive, it is empty" in empty.stderr


@given(st.data())
def test_a_changed_archive_is_a_value_or_a_format_error(data: st.DataObject) -> None:
    good = bytearray(archive(("a" * 120, REG, "x" * 600), ("l", SYM, "a"), ("h", LNK, "a" * 120)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, 4095))] = data.draw(st.integers(0, 255))
    for start in range(0, 4096, 512):  # let changes through the checksum
        block = good[start : start + 512]
        if block[257:262] == b"ustar":
            good[start + 148 : start + 156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:])
    try:
        assert index_of(bytes(good)).encode()
    except CorruptError:
        pass


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8), st.integers(0, 20), st.integers(1, 40))
def test_pieces_of_a_sparse_file_are_the_file(gaps: list[tuple[int, int]], tail: int, step: int) -> None:
    from cafs import sparse

    segments, expected, stored, at = [], bytearray(), bytearray(), 0
    for number, (gap, length) in enumerate(gaps, 1):
        at += gap
        segments.append((at, length))
        expected += bytes(gap) + bytes([number]) * length
        stored += bytes([number]) * length
        at += length
    expected += bytes(tail)
    source = io.BytesIO(bytes(stored))
    sparse.check(tuple(segments), len(expected), len(stored))
    found = b"".join(
        data or bytes(count * step) for count, data in sparse.pieces(tuple(segments), len(expected), step, source.read)
    )
    assert found[: len(expected)] == expected and not found[len(expected) :].strip(b"\0")
    assert FILE == b"f"


def raw(name: bytes, flag: bytes, content: bytes, uid: bytes = b"0000000\0") -> bytes:
    """A member that no library would write."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[108:116], head[116:124] = b"0000644\0", uid, b"0000000\0"
    head[124:136], head[136:148], head[156:157] = b"%011o\0" % len(content), b"00000000000\0", flag
    head[257:265] = b"ustar\00000"
    head[148:156] = b"%06o\0 " % sum(bytes(head[:148]) + b" " * 8 + bytes(head[156:]))
    return bytes(head) + content + bytes(-len(content) % 512)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    found = b""
    for key, value in records:
        rest = len(key) + len(value) + 3
        length = next(n for n in range(rest, rest + 10) if n == rest + len(str(n)))
        found += b"%d %s=%s\n" % (length, key, value)
    return found


UNSOUND = {
    "negative-uid": raw(b"f", b"0", b"x", uid=b"\xff" * 8),
    "nul-in-sparse-name": raw(
        b"p", b"x", pax((b"GNU.sparse.name", b"a\0b"), (b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"1"))
    )
    + raw(b"f", b"0", b"x"),
    "sparse-size-over-63-bits": raw(b"p", b"x", pax((b"GNU.sparse.size", b"9999999999999999999"), (b"GNU.sparse.map", b"0,1")))
    + raw(b"f", b"0", b"x"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_no_index_can_say_is_refused_before_a_ref_is_set(home: Path, tmp_path: Path, cmd: Run, name: str) -> None:
    done = cmd("cafs-index", "create", "-", "-t", "x:1", input=UNSOUND[name] + bytes(1024))
    assert done.returncode == 5 and b"Traceback" not in done.stderr, done.stderr
    assert cmd("cafs-store", "ls").stdout == b""


def peak_mib(data: bytes) -> tuple[int, str]:
    """Peak memory of a process that indexes an archive, and what it said."""
    code = (
        "import io, re, sys; from cafs.tarindex import *; from cafs.format import Header\n"
        "from cafs.errors import CorruptError\n"
        "try: TreeIndexer(MemberReader(Header()), lambda reader: tar_tree(reader, sys.stdin.buffer.raw)).run(); said = 'done'\n"
        "except CorruptError as error: said = str(error)\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10, said[:200])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False, timeout=60 * SLOW)
    assert done.returncode == 0, done.stderr
    peak, _, said = done.stdout.decode().partition(" ")
    return int(peak), said


def test_bombs_are_refused_in_bounded_memory() -> None:
    names = b"".join(raw(b"n", b"L", b"a/" * (1 << 19)) + raw(b"f", b"0", b"x") for _ in range(3))
    peak, said = peak_mib(names)
    assert peak < 150 and "is too long" in said
    headers = b"".join(raw(b"g", b"g", pax((b"key%03d" % number, b"v" * (1 << 19)))) for number in range(200))
    peak, said = peak_mib(headers + raw(b"f", b"0", b"x"))
    assert peak < 150 and "global headers are too large" in said
    many = raw(b"p", b"x", b"6 a=b\n" * 170_000) + raw(b"f", b"0", b"x")
    assert peak_mib(many)[1] == "done\n"


def test_a_large_file_of_zeros_in_a_small_zstd_archive_needs_little_memory() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    head = bytearray(raw(b"zeros", b"0", b""))
    size = 1 << 30
    head[124:136] = b"%011o\0" % size
    head[148:156] = b"%06o\0 " % sum(bytes(head[:148]) + b" " * 8 + bytes(head[156:]))
    data = packer.compress(bytes(head)) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    assert len(data) < 1 << 20
    peak, said = peak_mib(data)
    assert peak < 250 and said == "done\n"


def test_compression_is_seen_also_when_a_pipe_gives_one_byte_first() -> None:
    class Slowly(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(1 if self.tell() < 8 else size)

    plain = archive(("f", REG, "content"))
    for packed in (plain, gzip.compress(plain), bz2.compress(plain), lzma.compress(plain), zstandard.compress(plain)):
        assert index_bytes(Slowly(packed)) == index_bytes(io.BytesIO(plain))


def test_an_archive_cut_off_after_an_extended_header_is_an_error() -> None:
    whole = raw(b"first", b"0", b"x") + raw(b"p", b"x", pax((b"path", b"second"))) + raw(b"second", b"0", b"y")
    assert len(index_of(whole)) == 3
    with pytest.raises(FormatError, match="cut off after an extended header"):
        index_of(whole[: -2 * 512])


def test_an_xz_stream_that_wants_much_memory_is_refused() -> None:
    plain = archive(("f", REG, "content"))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    with pytest.raises(CorruptError, match="emory"):
        index_bytes(io.BytesIO(lzma.compress(plain, filters=filters)))
    padded = lzma.compress(plain[:512]) + bytes(8) + lzma.compress(plain[512:], preset=9) + bytes(4 << 10)
    assert index_bytes(io.BytesIO(padded)) == index_bytes(io.BytesIO(plain))
