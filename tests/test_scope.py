"""Scopes: tenants of one store who share nothing, cannot guess what the others have, and lose nothing by them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cafs import fsck, scope
from cafs.collect import collect
from cafs.errors import CafsError, CorruptError
from cafs.indexing import Options, create_image
from cafs.pack import FRAME
from cafs.store import Store, init
from tests.conftest import Run
from tests.test_s3 import Bucket, bucket  # noqa: F401


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "small").write_bytes(b"hello\n" * 2000)
    (root / "large").write_bytes(os.urandom(9 << 20))
    return root


def secret(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.key"
    path.write_bytes(os.urandom(24) + b"!\n")
    path.chmod(0o600)
    return path


def names_below(path: Path) -> str:
    return "\n".join(str(found.relative_to(path)) for found in sorted(path.rglob("*")))


def test_two_tenants_and_an_open_part_live_in_one_store(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    keys = {name: secret(tmp_path, name) for name in ("ann", "bob")}
    store = tmp_path / "store"
    made = {name: cmd("cafs-index", "create", tree, "-t", "x:1", "--scope", key).stdout for name, key in keys.items()}
    assert made["ann"] == made["bob"] and len(made["ann"]) == 65  # digests are those of the content
    cmd("cafs-store", "untag", "x:1", "--scope", keys["bob"])
    assert cmd("cafs-store", "ls", "-q", "--scope", keys["ann"]).stdout == b"x:1\n"
    assert cmd("cafs-store", "ls", "-q", "--scope", keys["bob"]).stdout == b""
    assert cmd("cafs-store", "ls").returncode == 4  # nobody has made the part without a scope
    for command in (("cafs-store", "init"), ("cafs-index", "create", tree, "-t", "open:1")):
        assert cmd(*command).returncode == 0
    assert cmd("cafs-store", "ls", "-q").stdout == b"open:1\n"
    assert cmd("cafs-store", "untag", "open:1").returncode == 0
    for options in ([], ["--scope", keys["bob"]]):
        assert cmd("cafs-store", "gc", "--grace", "0", *options).returncode == 0
        assert cmd("cafs-store", "fsck", "--repair", *options).stdout == b""
    assert not list((store / "packs").glob("?" * 64))
    assert cmd("cafs-store", "fsck", "--scope", keys["ann"]).returncode == 0
    prefix = made["ann"].decode()[:12]
    for name in ("small", "large"):
        read = cmd("cafs-index", "cat", prefix, f"/{name}", "--scope", keys["ann"])
        assert read.stdout == (tree / name).read_bytes(), read.stderr


def test_nothing_that_shows_in_a_scope_tells_a_digest(home: Path, tmp_path: Path, tree: Path) -> None:
    place = tmp_path / "store"
    address = f"{place}#scope={secret(tmp_path, 'ann')}"
    made = create_image(Options(str(tree)), address, "x:1")
    plain = init(str(tmp_path / "plain"))
    create_image(Options(str(tree)), plain.root, "x:1")
    digests = {row[0] for name in plain.pack_sizes() for row in plain.read_footer(name).rows()}
    assert len(digests) == 5 and made.digest in {digest.hex() for digest, _ in plain.meta_names()}
    shown = names_below(place)
    records = b"".join(
        pack.read_bytes()[-5 * 49 - FRAME.size - 200 :] for pack in (place / "scopes").rglob("packs/*") if pack.name != "list"
    )
    for digest in digests | {digest for digest, _ in plain.meta_names()}:
        assert digest.hex()[2:] not in shown and digest not in records
    assert not set(shown.split("/")) & set(names_below(tmp_path / "plain").split("packs/"))
    packs = {path.name for path in (place / "scopes").rglob("packs/*")}
    assert packs & set(plain.pack_sizes()) == set()
    assert sorted(Store(address).meta_names()) == sorted(plain.meta_names())


def test_images_move_between_scopes_and_come_out_whole(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    ann, bob = (f"{tmp_path}/{name}#scope={secret(tmp_path, name)}" for name in ("ann", "bob"))
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for command in (("push", "x:1", ann), ("push", "x:1", bob, "--store", ann), ("pull", "x:1", bob, "-t", "back:1")):
        done = cmd("cafs-store", *command)
        assert done.returncode == 0, done.stderr
    for address in (ann, bob, str(tmp_path / "store")):
        assert cmd("cafs-store", "fsck", "--store", address).stdout == b""
        assert cmd("cafs-index", "verify", "x:1", tree, "--store", address).returncode == 0
    again = cmd("cafs-store", "push", "x:1", bob, "--json")
    assert b'"objects":0' in again.stdout
    whole = cmd("cafs-store", "push", "x:1", f"{tmp_path}/copy#{ann.partition('#')[2]}", "--store", ann, "--json")
    assert b'"packs":1' in whole.stdout  # of the same scope: packs are copied as they are


@pytest.mark.needs("root", "fuse", "runc")
def test_a_scoped_image_is_mounted_and_run(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    key = secret(tmp_path, "ann")
    (tree / "bin").mkdir()
    (tree / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "bin" / "busybox").chmod(0o755)
    cmd("cafs-index", "create", tree, "-t", "x:1", "--scope", key)
    point = tmp_path / "m"
    point.mkdir()
    assert cmd("cafs-mount", "x:1", point, "--scope", "ann.key", cwd=tmp_path).returncode == 0
    assert (point / "large").read_bytes() == (tree / "large").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    done = cmd("crun", "run", "--rm", "--scope", key, "x:1", "/bin/busybox", "cat", "/small")
    assert done.stdout == (tree / "small").read_bytes(), done.stderr


def test_the_wrong_secret_or_none_opens_nothing(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    key, other = secret(tmp_path, "ann"), secret(tmp_path, "other")
    create_image(Options(str(tree)), f"{tmp_path}/store#scope={key}", "x:1")
    assert cmd("cafs-index", "ls", "x:1", "--scope", other).returncode == 4
    (inside,) = (tmp_path / "store" / "scopes").iterdir()
    done = cmd("cafs-store", "ls", "--store", inside)
    assert done.returncode == 2 and b"hint: --scope SECRETFILE" in done.stderr
    (tmp_path / "store" / "scopes" / scope.read(str(other)).id).symlink_to(inside)
    assert cmd("cafs-store", "ls", "--scope", other).returncode == 2


def test_what_is_no_secret_is_refused_with_a_hint(home: Path, tmp_path: Path, cmd: Run) -> None:
    key = secret(tmp_path, "ann")
    short, shown = tmp_path / "short", tmp_path / "shown"
    short.write_bytes(b"x" * 15 + b"\r\n")
    short.chmod(0o600)
    shown.write_bytes(b"x" * 40)
    shown.chmod(0o644)
    for path, said in ((short, "16 to 4096"), (shown, "everybody"), (tmp_path / "none", "No such file")):
        done = cmd("cafs-store", "init", "--scope", path)
        assert done.returncode and said in done.stderr.decode() and done.stderr.count(b"\n") <= 2
    done = cmd("cafs-store", "init", "--scope", key, "--store", f"{tmp_path}/s#scope={key}")
    assert done.returncode == 2 and b"two scopes" in done.stderr
    for options in (["--scope", ""], ["--store", f"{tmp_path}/store#scope="]):  # an unset variable is not the open part
        done = cmd("cafs-store", "init", *options)
        assert done.returncode == 2 and b"without a secret file" in done.stderr
    assert not (tmp_path / "store").exists() and not (tmp_path / "s").exists()


def test_the_names_are_those_of_the_man_page(tmp_path: Path) -> None:
    found = scope.Scope(b"0123456789abcdef")

    def keyed(key: bytes, text: bytes) -> bytes:
        """RFC 2104, by hand."""
        inner, outer = (bytes(byte ^ pad for byte in key.ljust(64, b"\0")) for pad in (0x36, 0x5C))
        return hashlib.sha256(outer + hashlib.sha256(inner + text).digest()).digest()

    key = keyed(b"0123456789abcdef", b"cafs scope 1 names")
    assert found.id == keyed(b"0123456789abcdef", b"cafs scope 1 id").hex()[:32]
    assert found.name(b"d" * 32) == keyed(key, b"d" * 32)
    assert found.name(b"d" * 16) == found.name(b"d" * 16)[:16] and len(found.name(b"d" * 16)) == 16


def test_damage_in_a_scope_is_found_and_never_read(home: Path, tmp_path: Path, tree: Path) -> None:
    address = f"{tmp_path}/store#scope={secret(tmp_path, 'ann')}"
    create_image(Options(str(tree)), address, "x:1")
    (pack,) = (path for path in (tmp_path / "store").rglob("packs/*") if path.name != "list")
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    store = Store(address)
    assert {finding.problem for finding in fsck.check(store)} >= {"damaged-object", "missing-object"}
    store.refresh()
    (name,) = store.pack_sizes()
    bad = min(store.read_footer(name).rows(), key=lambda row: row[2])
    frame = store.backend.read_range(f"packs/{name}", bad[2], bad[3])
    with pytest.raises(CorruptError):
        store.check_record(frame, bad[0], bad[1])
    (index,) = (path for path in (tmp_path / "store").rglob("*.index"))
    index.chmod(0o644)
    index.write_bytes(b"junk")
    assert "damaged-meta" in {finding.problem for finding in fsck.check(store)}
    with pytest.raises(CafsError):
        collect(Store(address), grace_s=0)


def test_scopes_of_a_bucket_are_prefixes_of_it(bucket: Bucket, tmp_path: Path, tree: Path, cmd: Run) -> None:  # noqa: F811
    address = f"{bucket.url}#scope={secret(tmp_path, 'ann')}"
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert cmd("cafs-store", "push", "x:1", address).returncode == 0
    assert cmd("cafs-index", "verify", "x:1", tree, "--store", address).returncode == 0
    assert cmd("cafs-store", "ls", "--store", bucket.url).returncode == 4
    assert cmd("cafs-store", "push", "x:1", bucket.url).returncode == 0  # scopes alone do not make it somebody else's place
    assert (
        cmd("cafs-store", "fsck", "--store", address).stdout == cmd("cafs-store", "fsck", "--store", bucket.url).stdout == b""
    )
