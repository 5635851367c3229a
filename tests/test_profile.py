"""Profiles: what a run read is recorded, and the next cold run gets it in one sequential read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cafs.collect import collect
from cafs.store import Store
from tests.conftest import Run, lazy_pids, make_files, mounts_below, wait_until
from tests.faultproxy import Proxy, free_port
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "busybox")
ORDER = ["90", "5", "33", "71", "2"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_files(tmp_path / "tree", 100, 30 << 20, 60_000, 60_000)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """The test's directory by HTTP, 30 ms a request."""
    port = free_port()
    with subprocess.Popen(["busybox", "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", tmp_path]) as server:
        try:
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            with Proxy(("127.0.0.1", port), 0.03) as proxy:
                yield proxy
        finally:
            server.terminate()


def run(point: Path, tree: Path) -> None:
    """The workload: some files, and 100 bytes in the middle of the large one."""
    for name in ORDER:
        assert (point / name).read_bytes() == (tree / name).read_bytes()
    with open(point / "large", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 100, 17 << 20) == (tree / "large").read_bytes()[17 << 20 :][:100]


def record(cmd: Run, kernel: Run, tmp_path: Path, tree: Path) -> list[list[str]]:
    assert kernel("x:1", tmp_path / "k", "--record", tmp_path / "record").returncode == 0
    run(tmp_path / "k", tree)
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    header, *lines = (tmp_path / "record").read_text().splitlines()
    assert header == "cafs-record 1 sha256"
    return [line.split() for line in lines]


def test_a_recording_mount_writes_first_reads_in_order_also_of_what_is_cached(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert cmd("cafs-store", "pull", "x:1").returncode == 0
    lines = record(cmd, kernel, tmp_path, tree)
    names = [hashlib.sha256((tree / name).read_bytes()).hexdigest() for name in ORDER]
    assert [line[1] for line in lines[:5]] == names
    large = [line for line in lines[5:] if line[1].endswith(".c")]
    assert len(large) == len(lines) - 5 and str(16 << 20) in {line[2] for line in large}
    shown = cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record", "--show", "--json").stdout.splitlines()
    assert [json.loads(line)["object"] for line in shown[:5]] == names
    bars = cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record", "--show").stdout.decode()
    assert len(bars.splitlines()) == 20 and "#" in bars
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f").write_text("of another image")
    cmd("cafs-index", "create", tmp_path / "other", "-t", "y:1")
    other = cmd("cafs-index", "profile", "y:1", "--from", tmp_path / "record")
    assert other.returncode == 1 and b"the record is of another image" in other.stderr


def test_the_next_cold_run_is_served_by_the_hot_pack(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, proxy: Proxy
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    record(cmd, kernel, tmp_path, tree)
    done = cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record", "--json")
    assert done.returncode == 0, done.stderr
    count = json.loads(done.stdout)["objects"]
    assert 7 <= count <= 9  # five files, the list, and one chunk, or what the kernel read ahead of it
    shutil.rmtree(home / "cache")
    before = len(proxy.log)
    assert kernel("x:1", tmp_path / "k", "--store", f"{proxy.url}/store").returncode == 0
    run(tmp_path / "k", tree)
    paths = [path for _, path, _, _ in proxy.log[before:]]
    assert not [path for path in paths if "/packs/" in path], "all came from the profile"
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    shutil.rmtree(home / "cache")
    before = len(proxy.log)
    assert kernel("x:1", tmp_path / "k", "--store", f"{proxy.url}/store", "--prefetch", "none").returncode == 0
    run(tmp_path / "k", tree)
    assert not [path for _, path, _, _ in proxy.log[before:] if "/profiles/" in path]
    done = kernel("x:1", tmp_path / "other", "--store", f"{proxy.url}/store", "--prefetch", "unknown")
    assert done.returncode == 4 and b"no profile" in done.stderr


def test_a_damaged_profile_costs_time_only(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    record(cmd, kernel, tmp_path, tree)
    assert cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record").returncode == 0
    (path,) = (home / "store" / "profiles").glob("*/default")
    whole = path.read_bytes()
    for damage in (whole[:200] + bytes(1000) + whole[1200:], whole[:5000], b"", whole[:-1] + b"x"):
        path.unlink()
        path.write_bytes(damage)
        shutil.rmtree(home / "cache")
        assert kernel("x:1", tmp_path / "k").returncode == 0
        run(tmp_path / "k", tree)
        assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
        wait_until(lambda: lazy_pids(home) == [])


def test_a_profile_goes_with_its_image(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    record(cmd, kernel, tmp_path, tree)
    cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record", "--name", "a")
    wait_until(lambda: lazy_pids(home) == [])
    assert collect(Store(str(home / "store")), grace_s=0).deleted == 0
    assert cmd("cafs-store", "fsck").stdout == b""
    cmd("cafs-store", "untag", "x:1")
    assert collect(Store(str(home / "store")), grace_s=0).deleted > 0
    assert not list((home / "store" / "profiles").glob("*/*"))


def test_what_is_no_record_or_name_is_refused(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for text, code in (("", 5), ("cafs-record 1 sha256\nx\n", 5), ("cafs-record 1 xxh128\n", 5)):
        (tmp_path / "bad").write_text(text)
        done = cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "bad")
        assert done.returncode == code and b"record" in done.stderr and done.stderr.count(b"\n") == 1
    (tmp_path / "good").write_text("cafs-record 1 sha256\n")
    done = cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "good", "--name", "../x")
    assert done.returncode == 2
    assert cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "none").returncode == 4


def test_two_profiles_with_one_large_file_come_without_waiting_for_each_other(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    record(cmd, kernel, tmp_path, tree)
    (tree / "more").write_bytes(b"more")
    cmd("cafs-index", "create", tree, "-t", "y:1")
    for image in ("x:1", "y:1"):
        assert cmd("cafs-index", "profile", image, "--from", tmp_path / "record").returncode == 0
    shutil.rmtree(home / "cache")
    began = time.monotonic()
    for image, point in (("x:1", "k"), ("y:1", "k2")):
        assert kernel(image, tmp_path / point, "--timeout", 20 * SLOW).returncode == 0
    for point in ("k", "k2"):
        run(tmp_path / point, tree)
    assert time.monotonic() - began < 15 * SLOW, "less than the limit, which a deadlock ends with"


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_a_container_can_be_recorded(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree = tmp_path / "image"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", tree / "bin" / "busybox")
    (tree / "read").write_bytes(b"r" * 5000)
    (tree / "unread").write_bytes(b"u" * 5000)
    assert cmd("cafs-index", "create", tree, "-t", "c:1").returncode == 0
    for number in range(2):
        done = cmd("crun", "run", "--rm", "--record", tmp_path / f"record{number}", "c:1", "/bin/busybox", "cat", "/read")
        assert (done.returncode, done.stdout) == (0, b"r" * 5000), done.stderr
        text = (tmp_path / f"record{number}").read_text()
        assert hashlib.sha256(b"r" * 5000).hexdigest() in text and hashlib.sha256(b"u" * 5000).hexdigest() not in text
    wait_until(lambda: mounts_below(home / "run") == [] and lazy_pids(home) == [])
    drawn = cmd("cafs-index", "profile", "c:1", "--from", tmp_path / "record0", "--show", "--svg", tmp_path / "out.svg")
    assert drawn.returncode == 0, drawn.stderr
    assert ElementTree.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")
    wrong = cmd("cafs-index", "profile", "c:1", "--from", tmp_path / "record0", "--svg", tmp_path / "out.svg")
    assert wrong.returncode == 2 and b"--svg goes with --show" in wrong.stderr


def test_a_profile_goes_with_its_image_is_checked_and_helps_one_that_shares_objects(
    home: Path, tmp_path: Path, tree: Path, proxy: Proxy, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    record(cmd, kernel, tmp_path, tree)
    assert cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record").returncode == 0
    pushed = cmd("cafs-store", "push", "x:1", home / "other")
    assert pushed.returncode == 0, pushed.stderr
    (mine,), (theirs,) = ((home / name / "profiles").glob("*/default") for name in ("store", "other"))
    assert mine.read_bytes() == theirs.read_bytes()
    with open(tmp_path / "record", "a") as file:
        file.write(f"1 {hashlib.sha256((tree / '50').read_bytes()).hexdigest()} 0 100\n")
    assert cmd("cafs-index", "profile", "x:1", "--from", tmp_path / "record").returncode == 0
    assert cmd("cafs-store", "push", "x:1", home / "other").returncode == 0
    assert mine.read_bytes() == theirs.read_bytes(), "one that was made anew goes there too"
    (tree / "more").write_bytes(b"more")
    assert cmd("cafs-index", "create", tree, "--base", "x:1", "-t", "x:2", "--store", home / "other").returncode == 0
    shutil.rmtree(home / "cache")
    address = f"{proxy.url}/other"
    assert kernel("x:2", tmp_path / "k", "--store", address).returncode == 0
    wait_until(lambda: len(list((home / "cache" / "data" / ".cafs-objects").glob("*/[!t]*"))) == len(ORDER) + 1)
    before = len(proxy.log)
    for name in ORDER:
        assert (tmp_path / "k" / name).read_bytes() == (tree / name).read_bytes()
    assert len(proxy.log) == before
    named = kernel("x:2", tmp_path / "k2", "--store", address, "--prefetch", "other")
    assert named.returncode == 4 and b"has no profile 'other'" in named.stderr
    data = bytearray(theirs.read_bytes())
    data[100] ^= 1
    theirs.chmod(0o644)
    theirs.write_bytes(data)
    found = cmd("cafs-store", "fsck", "--store", home / "other")
    assert found.returncode == 5 and found.stdout.startswith(b"damaged-profile\tprofiles/")
    assert cmd("cafs-store", "fsck", "--repair", "--store", home / "other").returncode == 0
    assert not theirs.exists()
