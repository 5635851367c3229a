"""What is fetched before it is asked for: the next chunks of a file read in order, and all of an image on request."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cafs.complete import Throttle
from tests.conftest import Run, wait_until
from tests.test_partial import CHUNK, Large
from tests.waiting import SLOW

ENGINES = pytest.mark.parametrize("engine", ["kernel", "fuse"])


@pytest.fixture
def long(home: Path, tmp_path: Path) -> Large:
    """A file of sixteen chunks, all different."""
    return Large(tmp_path, b"".join(os.urandom(CHUNK) for _ in range(16)))


def test_reading_in_order_fetches_the_next_chunks(long: Large) -> None:
    file = long.open()
    for number in range(3):
        assert file.read(number * CHUNK, 10) == long.content[number * CHUNK :][:10]
    wait_until(lambda: len(long.asked) == 5)  # 0, 1, 2; one ahead after the second, two after the third
    before = len(long.asked)
    assert file.read(3 * CHUNK, 10) == long.content[3 * CHUNK :][:10]
    file.close()
    assert before <= len(long.asked) == len(set(long.asked)), "none is fetched twice"


def test_reading_here_and_there_fetches_what_is_read(long: Large) -> None:
    file = long.open()
    for number in (9, 3, 12, 0, 7):
        file.read(number * CHUNK, 10)
    file.close()
    assert len(long.asked) == 5


@pytest.mark.needs("root", "fuse")
@ENGINES
def test_a_megabyte_in_the_middle_of_ten_gigabytes_takes_three_chunks_at_most(
    home: Path, tmp_path: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    point.mkdir()
    middle = (5 << 30) - CHUNK
    content = os.urandom(6 * CHUNK)
    with open(tree / "huge", "wb") as file:
        file.truncate(10 << 30)
        file.seek(middle - 2 * CHUNK)
        file.write(content)
    assert cmd("cafs-index", "create", tree, "-t", "x:1").returncode == 0
    assert cmd("cafs-mount", "--engine", engine, "x:1", point).returncode == 0
    with open(point / "huge", "rb", buffering=0) as file:
        for offset in (middle - (1 << 19), middle + (1 << 19)):  # over a border first
            assert os.pread(file.fileno(), 1 << 20, offset) == content[offset - middle + 2 * CHUNK :][: 1 << 20]
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    info = json.loads(cmd("cafs-store", "info", "--json").stdout)
    assert 2 * CHUNK <= info["cache_bytes_fetched"] <= 3 * CHUNK


@pytest.mark.needs("root", "fuse")
@ENGINES
def test_all_of_an_image_comes_on_request(home: Path, tmp_path: Path, cmd: Run, kernel: Run, engine: str) -> None:
    tree, point = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    point.mkdir()
    for number in range(50):
        (tree / f"{number}").write_bytes(os.urandom(3000))
    for name in ("large1", "large2"):
        (tree / name).write_bytes(os.urandom(9 << 20))
    assert cmd("cafs-index", "create", tree, "-t", "x:1").returncode == 0
    assert cmd("cafs-mount", "--engine", engine, "x:1", point, "--prefetch", "all").returncode == 0
    wait_until(lambda: len(list((home / "cache" / "data" / ".cafs-objects").glob("*/[!t]*"))) == 52)
    os.rename(home / "store", home / "away")
    for path in tree.iterdir():
        assert (point / path.name).read_bytes() == path.read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_a_limit_of_bytes_a_second_is_kept(home: Path, tmp_path: Path, cmd: Run) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(3):
        (tree / f"{number}").write_bytes(os.urandom(CHUNK + 1))
    assert cmd("cafs-index", "create", tree, "-t", "x:1").returncode == 0
    began = time.monotonic()
    assert cmd("cafs-store", "pull", "x:1", "--bwlimit", "12M").returncode == 0
    assert time.monotonic() - began > 0.9, "12 MB and a little at 12 MiB a second"
    assert len(list((home / "cache" / "data" / ".cafs-objects").glob("*/*.c"))) == 3
    wrong = cmd("cafs-store", "pull", "x:1", "--bwlimit", "much")
    assert wrong.returncode == 2 and b"'much' is no size" in wrong.stderr


def test_a_throttle_lets_nothing_wait_without_a_limit() -> None:
    began = time.monotonic()
    Throttle(0).take(1 << 60)
    assert time.monotonic() - began < 1 * SLOW
