"""The store survives being killed at every step, full and failing disks, and says what is damaged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cafs import atomic, fsck, image
from cafs.digest import PLAIN
from cafs.errors import CafsError, CorruptError, FormatError, NotFound, UsageError
from cafs.indexing import Options, create_image
from cafs.refs import split_ref
from cafs.store import Store, init, open_or_init
from tests.conftest import Run
from tests.faults import calls_of, run_with_fault


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "dir").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"content")
    (root / "large").write_bytes(os.urandom(1 << 16) * 70)
    return root


def make(tree: Path, store: Path, tag: str = "t:1") -> str:
    return create_image(Options(str(tree), rehash=True), str(store), tag).digest


def test_every_file_system_call_of_indexing_can_be_the_last(home: Path, tree: Path, tmp_path: Path) -> None:
    """Kill, EIO and ENOSPC at each call of making a store, putting objects, meta and a ref; also inside the rerun."""
    clean = tmp_path / "clean"
    digest = make(tree, clean)
    points = 0
    calls = calls_of(lambda: make(tree, tmp_path / "probe"), str(tmp_path / "probe"))
    assert any(call.startswith("link") for call in calls) and any(
        call.startswith("rename refs") or "refs" in call for call in calls
    )
    for fault in (None, errno.EIO, errno.ENOSPC):
        for at in range(len(calls)):
            store = tmp_path / "store"
            shutil.rmtree(store, ignore_errors=True)
            code = run_with_fault(lambda store=store: make(tree, store), str(store), at, fault)
            assert code in ((-9,) if fault is None else (0, 1)), (calls[at], fault, code)
            # A ref is there only when everything that it needs is.
            if (store / "cafs-store.json").exists():
                opened = Store(str(store))
                if opened.get_ref("t:1"):
                    serious = [f for f in fsck.check(opened) if f.problem not in ("leftover", "dead-lease")]
                    assert not serious, (calls[at], serious)
                assert opened.get_ref("t:1") or code != 0, calls[at]
            # The rerun is killed too, a few calls in; then it is let through, and all is well.
            run_with_fault(lambda store=store: make(tree, store), str(store), at // 2, None)
            assert make(tree, store) == digest, calls[at]
            assert [f for f in fsck.check(Store(str(store)), repair=True) if not f.repaired] == []
            assert list(fsck.check(Store(str(store)))) == [], calls[at]
            points += 2
    print(f"{points} faults at {len(calls)} calls")
    assert points >= 6 * 25


def test_nothing_is_named_before_it_is_durable(home: Path, tree: Path, tmp_path: Path) -> None:
    """Power loss keeps only what was fsynced: so files are synced before their names, and all before the ref."""
    store = tmp_path / "s"
    init(str(store))
    calls = calls_of(lambda: make(tree, store), str(store))
    dirty: set[str] = set()
    for call in calls:
        name, _, path = call.partition(" ")
        if name in ("write", "writev"):
            dirty.add(path)
        elif name == "fsync":
            dirty.discard(path)
        elif name in ("link", "rename"):
            assert path not in dirty, call
    ref = next(i for i, call in enumerate(calls) if call.startswith("rename refs"))
    assert "fsync packs" in calls[:ref] and any(call.startswith("fsync meta") for call in calls[:ref])
    assert calls[ref + 1].startswith("fsync refs")


def test_the_same_tree_gives_the_same_store_bytes_with_any_number_of_threads(home: Path, tree: Path, tmp_path: Path) -> None:
    for number in range(200):
        (tree / "dir" / f"f{number}").write_bytes(os.urandom(2000))
    digests = {
        create_image(Options(str(tree), jobs=jobs, rehash=True), str(tmp_path / f"s{jobs}"), None).digest for jobs in (1, 8)
    }
    assert len(digests) == 1
    listed = [sorted(p.name for p in (tmp_path / f"s{jobs}" / "packs").iterdir()) for jobs in (1, 8)]
    assert listed[0] == listed[1]


def test_a_second_run_reads_no_file_and_writes_no_pack(home: Path, tree: Path, tmp_path: Path) -> None:
    for path in (tree / "dir" / "file", tree / "large"):
        os.utime(path, (1, 1))
    first = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    assert first.files_read == 2 and first.packs == 1
    # ctime is fresh, so the racy rule keeps nothing: the second run reads again but stores nothing.
    second = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    assert second.packs == 0 and second.objects == 0 and second.digest == first.digest


def test_the_stat_cache_forgets_files_whose_ctime_is_fresh_and_keeps_others(
    home: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cafs.statcache.RACY_NS", -(10**12))  # as if all had been there for long
    first = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    second = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    assert (first.files_read, second.files_read) == (2, 0)
    (tree / "dir" / "file").write_bytes(b"CONTENT")
    third = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    assert third.files_read == 1 and third.digest != first.digest
    shutil.rmtree(tmp_path / "s" / "packs")
    (tmp_path / "s" / "packs").mkdir()
    fourth = create_image(Options(str(tree)), str(tmp_path / "s"), None)
    assert fourth.files_read == 2, "an object that is gone is put again"


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "meta", "missing-meta", "ref", "permissions"])
def test_fsck_names_each_kind_of_damage(home: Path, tree: Path, tmp_path: Path, cmd: Run, damage: str) -> None:
    store = tmp_path / "store"
    make(tree, store)
    pack = next((store / "packs").glob("?" * 64))
    index = next((store / "meta").glob("*/*.index"))
    expected = {
        "flip": "damaged-object",
        "truncate": "damaged-pack",
        "missing": "missing-pack",
        "meta": "damaged-meta",
        "missing-meta": "missing-meta",
        "ref": "ref-to-nowhere",
        "permissions": "permissions",
    }[damage]
    for path in (pack, index):
        path.chmod(0o644)
    if damage == "flip":
        with open(pack, "r+b") as file:
            file.seek(100)
            file.write(b"\xff\x00\xff")
    elif damage == "truncate":
        os.truncate(pack, pack.stat().st_size - 1)
    elif damage == "missing":
        pack.unlink()
    elif damage == "meta":
        index.write_bytes(index.read_bytes()[:-1] + b"\x00")
    elif damage == "missing-meta":
        index.unlink()
    elif damage == "ref":
        next((store / "refs").glob("*/*")).write_text("0" * 64 + "\n")
    if damage != "permissions":
        for path in (pack, index):
            if path.exists():
                path.chmod(0o444)
    done = cmd("cafs-store", "fsck")
    assert done.returncode == 5
    assert expected in done.stdout.decode(), done.stdout
    if damage == "permissions":
        assert cmd("cafs-store", "fsck", "--repair").returncode == 0
        assert cmd("cafs-store", "fsck").returncode == 0
    if damage == "truncate":  # what is in the pack is saved without its footer
        assert cmd("cafs-store", "fsck", "--repair").returncode == 0
        assert cmd("cafs-store", "fsck").stdout == b""
        assert cmd("cafs-index", "cat", "t:1", "/dir/file").stdout == b"content"
    if damage in ("flip", "truncate", "missing", "meta", "missing-meta"):
        # Indexing the tree again puts back what is gone.
        cmd("cafs-store", "fsck", "--repair")
        make(tree, store)
        assert cmd("cafs-store", "fsck").returncode == 0


def test_indexing_again_replaces_a_damaged_pack_of_the_same_name(home: Path, tree: Path, tmp_path: Path, cmd: Run) -> None:
    store = tmp_path / "store"
    make(tree, store)
    [pack] = (store / "packs").glob("?" * 64)
    pack.chmod(0o644)
    os.truncate(pack, 1000)
    make(tree, store)  # without any fsck
    assert cmd("cafs-index", "cat", "t:1", "/large").stdout == (tree / "large").read_bytes()
    assert cmd("cafs-store", "fsck").stdout == b""


def test_a_damaged_object_is_never_returned(home: Path, tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    make(tree, store)
    opened = Store(str(store))
    opened.refresh()
    name = next(iter(opened.pack_sizes()))
    pristine = (store / "packs" / name).read_bytes()
    digest = opened.hash(b"content")
    (_, offset, stored) = next(opened.locate(digest))
    for at in range(offset, offset + stored):
        damaged = bytearray(pristine)
        damaged[at] ^= 0x40
        (store / "packs" / name).unlink()
        (store / "packs" / name).write_bytes(damaged)
        with pytest.raises(CorruptError):
            opened.read_object(digest, PLAIN)


def test_a_sha256sum_of_a_file_finds_its_object(home: Path, tree: Path, tmp_path: Path) -> None:
    make(tree, tmp_path / "store")
    said = subprocess.run(["sha256sum", tree / "dir" / "file"], capture_output=True, text=True, check=True).stdout.split()[0]
    opened = Store(str(tmp_path / "store"))
    assert opened.read_object(bytes.fromhex(said)) == b"content"


@pytest.mark.parametrize("stray", ["refs/t/.nfs0001", "refs/.nfs0002", "meta/.nfs0003", "packs/.nfs0004"])
def test_a_stray_file_stops_no_command(home: Path, tree: Path, tmp_path: Path, cmd: Run, stray: str) -> None:
    make(tree, tmp_path / "store")
    (tmp_path / "store" / stray).touch()
    assert cmd("cafs-store", "ls", "-q").stdout == b"t:1\n"
    checked = cmd("cafs-store", "fsck")
    assert checked.stdout.decode() == (f"stray-file\t{stray}\n" if stray.startswith("refs") else "")


def test_a_damaged_ref_does_not_stop_the_others(home: Path, tree: Path, tmp_path: Path, cmd: Run) -> None:
    make(tree, tmp_path / "store")
    make(tree, tmp_path / "store", "u:1")
    (tmp_path / "store" / "refs" / "t" / "1").write_text("junk")
    listed = cmd("cafs-store", "ls", "-q")
    assert (listed.returncode, listed.stdout) == (0, b"u:1\n") and b"ref 't:1' is damaged" in listed.stderr
    assert cmd("cafs-store", "rm", "u:1").returncode == 0


@pytest.mark.parametrize(
    "text",
    ["[1]", '{"chunk_size":4194304,"format":1,"hash":["x"]}', '{"chunk_size":0,"format":1,"hash":"sha256"}',
     '{"chunk_size":134217728,"format":1,"hash":"sha256"}', '{"chunk_size":true,"format":1,"hash":"sha256"}', "{", "[" * 60_000],
)  # fmt: skip
def test_a_damaged_format_file_is_a_format_error(home: Path, tmp_path: Path, text: str) -> None:
    init(str(tmp_path / "s"))
    (tmp_path / "s" / "cafs-store.json").unlink()
    (tmp_path / "s" / "cafs-store.json").write_text(text)
    with pytest.raises(FormatError):
        Store(str(tmp_path / "s"))


@pytest.mark.parametrize("command", [["fsck", "--repair"], ["gc"]], ids=lambda command: command[0])
def test_leftovers_of_a_crash_go_when_their_lease_is_dead(
    home: Path, tree: Path, tmp_path: Path, cmd: Run, command: list[str]
) -> None:
    """By a reboot of this machine, or by age where its pid means nothing here; a fresh lease of another machine stays."""
    import json
    import time

    from cafs import lease

    store = tmp_path / "store"
    make(tree, store)
    path = store / lease.take(Store(str(store)).backend, "writer")
    mine = json.loads(path.read_text())
    (store / "tmp" / "tmp.4242.x").touch()
    os.utime(store / "tmp" / "tmp.4242.x", (time.time() - 3700,) * 2)
    (store / "tmp" / "tmp.4243.x").touch()  # of somebody who writes a tag just now
    for change, age_s, is_dead in (
        ({}, 0, False),
        ({"pid": 2**22 + 1}, 0, True),
        ({"boot_id": "before"}, 0, True),
        ({"host": "another"}, 0, False),
        ({"host": "another"}, 3600, True),
        ({"pid_namespace": "pid:[1]", "pid": 2**22 + 1}, 0, False),
    ):
        path.write_text(json.dumps(mine | change))
        os.utime(path, (time.time() - age_s,) * 2)
        assert lease.is_dead(path.read_bytes(), age_s) is is_dead, (change, age_s)
    path.write_text(json.dumps(mine | {"boot_id": "before"}))
    assert cmd("cafs-store", "gc", "--dry-run").returncode == 0 and path.exists()
    assert cmd("cafs-store", *command).returncode == 0
    assert [one.name for one in (store / "tmp").iterdir()] == ["tmp.4243.x"] and list((store / "leases").iterdir()) == []


def test_files_of_a_store_have_the_modes_that_the_man_page_says_whatever_the_umask(
    home: Path, tree: Path, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        make(tree, tmp_path / "s")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.parts[-2] not in ("leases",)]
    modes = {path.relative_to(tmp_path / "s").parts[0]: path.stat().st_mode & 0o777 for path in files if path.name != "list"}
    assert modes["packs"] == modes["meta"] == 0o444


@pytest.mark.needs("root", "setpriv")
def test_a_store_is_for_its_owner_alone_unless_it_is_opened_for_a_group(home: Path, tree: Path, cmd: Run) -> None:
    base = Path("/var/tmp") / f"cafs-private-{os.getpid()}"
    base.mkdir()
    base.chmod(0o755)
    before = os.umask(0)
    try:
        store = base / "a" / "store"
        assert cmd("cafs-index", "create", tree, "-t", "x:1", "--store", store).returncode == 0
        assert store.stat().st_mode & 0o777 == 0o750

        def reads(group: int) -> bool:
            who = ["setpriv", "--reuid=65534", f"--regid={group}", "--clear-groups"]
            return subprocess.run([*who, "cat", store / "refs" / "x" / "1"], capture_output=True, check=False).returncode == 0

        assert not reads(65534)
        (base / "a").chmod(0o700)
        closed = cmd("cafs-store", "init", "--group", "1234", "--store", store)
        assert closed.returncode == 1 and b"cannot pass through" in closed.stderr
        (base / "a").chmod(0o711)
        assert cmd("cafs-store", "init", "--group", "1234", "--store", store).returncode == 0
        assert reads(1234) and not reads(65534)
        assert cmd("cafs-store", "init", "--group", "no-such-group", "--store", store).returncode == 4
    finally:
        os.umask(before)
        shutil.rmtree(base)


def test_a_manifest_that_is_a_bomb_is_refused(home: Path, tree: Path, tmp_path: Path) -> None:
    import zstandard

    make(tree, tmp_path / "s")
    store = Store(str(tmp_path / "s"))
    bomb = b'{"cafs-image":1,"config":{"x":[' + b"[]," * (20 << 20) + b"[]]}}"
    path = Path(store.backend.path(store.meta_name(store.hash(bomb), "image")))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(bomb))
    with pytest.raises(CorruptError):
        image.get(store, store.hash(bomb))


def test_two_writers_at_once_leave_one_sound_store(home: Path, tree: Path, tmp_path: Path, cmd: Run) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda n: cmd("cafs-index", "create", tree, "-t", f"t:{n}"), range(4)))
    assert [d.returncode for d in done] == [0] * 4, [d.stderr for d in done]
    assert len({d.stdout for d in done}) == 1
    assert cmd("cafs-store", "fsck").stdout == b""


def test_stores_of_another_hash_or_version_are_refused(home: Path, tmp_path: Path) -> None:
    init(str(tmp_path / "x"), "xxh128")
    with pytest.raises(UsageError):
        init(str(tmp_path / "x"), "sha256")
    assert open_or_init(str(tmp_path / "x")).hash_name == "xxh128"
    (tmp_path / "x" / "cafs-store.json").unlink()
    (tmp_path / "x" / "cafs-store.json").write_text('{"chunk_size":4194304,"format":2,"hash":"sha256"}')
    with pytest.raises(FormatError):
        Store(str(tmp_path / "x"))
    with pytest.raises(NotFound):
        Store(str(tmp_path / "nothing"))


@pytest.mark.parametrize("ref", ["", "A:1", "a:", "a:b:c", "../x", "a/../b", "a:.x", "a:" + "b" * 129, "a b", "/a", "a\n"])
def test_what_is_no_ref_is_refused(ref: str) -> None:
    with pytest.raises(UsageError):
        split_ref(ref)


def test_a_name_of_docker_hub_is_the_short_one() -> None:
    for spelled in (
        "alpine",
        "library/alpine",
        "docker.io/alpine",
        "docker.io/library/alpine:latest",
        "index.docker.io/library/alpine",
    ):
        assert split_ref(spelled) == ("alpine", "latest"), spelled
    assert split_ref("docker.io/me/x:1") == ("me/x", "1") and split_ref("quay.io/library/x")[0] == "quay.io/library/x"
    assert split_ref("library/a/b")[0] == "library/a/b"


def test_refs_may_have_slashes_and_ports(home: Path, tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    digest = make(tree, store, "localhost:5000/team/app:v1")
    make(tree, store, "a/b:c")
    make(tree, store, "a:b")
    opened = Store(str(store))
    assert opened.refs() == ["a/b:c", "a:b", "localhost:5000/team/app:v1"]
    for name in (*opened.refs(), digest, digest[:8], f"a:b@sha256:{digest}"):
        assert image.resolve(opened, name).digest.hex() == digest
    with pytest.raises(CafsError):
        image.resolve(opened, "nothing:1")


def test_a_ref_that_was_stored_with_the_name_of_a_registry_is_found_kept_and_removed(home: Path, tree: Path, cmd: Run) -> None:
    digest = make(tree, home / "store", "alpine:3")
    (tree / "more").write_text("another image")
    other = make(tree, home / "store", "other:1")
    old = home / "store" / "refs" / "docker.io+library+alpine" / "3"
    old.parent.mkdir()
    (home / "store" / "refs" / "other" / "1").rename(old)  # as a store has it that is older than the short name
    assert cmd("cafs-store", "gc", "--grace", "0").returncode == 0
    opened = Store(str(home / "store"))
    assert image.resolve(opened, "docker.io/library/alpine:3").digest.hex() == other
    assert image.resolve(opened, "alpine:3").digest.hex() == digest
    assert cmd("cafs-store", "rm", "docker.io/library/alpine:3").returncode == 0 and opened.refs() == []


def test_contents_compressed_together_are_stored_as_if_each_were_alone(home: Path, tmp_path: Path) -> None:
    from cafs.format import Header
    from cafs.objects import ObjectMaker
    from cafs.writer import Writer

    contents = [b"a" * 5000, os.urandom(3000), b"", b"x", b"text " * 100_000]
    with Writer(init(str(tmp_path / "s"))) as writer:
        maker = ObjectMaker(Header(), writer)
        together = maker.make_all(contents)
        assert [one.frames for one in together] == [maker.make(data).frames for data in contents]


@pytest.mark.parametrize("place", ["/proc/nothing", "/proc/nothing/more"])
def test_a_store_where_nothing_can_be_made_is_said(place: str, home: Path, cmd: Run) -> None:
    done = cmd("cafs-store", "init", env=os.environ | {"CAFS_STORE": place})
    assert done.returncode in (1, 4) and b"internal error" not in done.stderr and b"/proc/nothing" in done.stderr, done.stderr


def test_a_user_without_a_home_is_told_so_and_nothing_is_made_here(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("CAFS_", "XDG_", "HOME"))}
    code = "import os, pwd; from cafs import errors, paths; os.setgid(54321); os.setuid(54321); print(paths.store())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=keep, capture_output=True, text=True, check=False)
    assert "UsageError: user 54321 has no home directory" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_directory_that_another_makes_meanwhile_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is missing at the first look, and there at the second."""
    real = os.mkdir
    looks = []

    def late(path: str, mode: int = 0o777) -> None:
        looks.append(path)
        if len(looks) == 1:
            real(tmp_path / "a")
            raise FileNotFoundError(errno.ENOENT, "missing", path)
        if path.endswith("/b"):
            real(path)  # by another, too
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", late)
    atomic.make_directory(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir() and [os.path.basename(path) for path in looks] == ["b", "a", "b"]


@pytest.mark.needs("root", "setpriv")
def test_a_group_reads_a_store_beside_containers_and_what_is_put_there_with_any_umask(
    tree: Path, cmd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path("/var/tmp") / f"cafs-group-{os.getpid()}"
    (base / "state").mkdir(parents=True)
    base.chmod(0o755)
    (base / "state").chmod(0o700)  # as a container leaves it that was there first
    monkeypatch.setenv("CAFS_STATE", str(base / "state"))
    monkeypatch.setenv("CAFS_STORE", str(base / "state" / "store"))
    try:
        assert cmd("cafs-store", "init", "--group", "1234").returncode == 0
        assert cmd("cafs-index", "create", tree, "-t", "t:1", umask=0o077).returncode == 0
        who = ["setpriv", "--reuid=65534", "--regid=1234", "--clear-groups"]
        for words, is_open in ((["cat", base / "state/store/refs/t/1"], True), (["ls", base / "state"], False)):
            assert (subprocess.run([*who, *words], capture_output=True, check=False).returncode == 0) == is_open, words
    finally:
        shutil.rmtree(base)
