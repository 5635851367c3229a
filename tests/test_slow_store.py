"""A store that answers late or never: reads end in bounded time, and what many ask for is fetched once."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.waiting import SLOW, wait_until

pytestmark = pytest.mark.needs("root", "fuse", "fusermount3")


@pytest.fixture
def control(home: Path, tmp_path: Path, cmd: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The control directory of a slow file system that holds the store; the ref s:1 has /a, /b and the large /c."""
    tree, control = tmp_path / "tree", tmp_path / "control"
    for path in (tree, control, tmp_path / "slow", tmp_path / "one", tmp_path / "two"):
        path.mkdir()
    (tree / "a").write_bytes(os.urandom(100_000))
    (tree / "b").write_bytes(os.urandom(100_000))
    (tree / "c").write_bytes(os.urandom(9 << 20))
    assert cmd("cafs-index", "create", tree, "-t", "s:1").returncode == 0
    (control / "log").touch()
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "slowfs.py", tmp_path / "store", tmp_path / "slow", control]
    ) as server:
        wait_until(lambda: os.path.exists(tmp_path / "slow" / "cafs-store.json"))
        monkeypatch.setenv("CAFS_STORE", str(tmp_path / "slow"))
        yield control
        (control / "hold").unlink(missing_ok=True)
        for point in ("one", "two", "slow"):
            subprocess.run(["umount", "-l", tmp_path / point], capture_output=True, check=False)
        server.wait(20 * SLOW)


def pack_reads(control: Path) -> list[str]:
    return [line for line in (control / "log").read_text().splitlines() if len(line.split()[0]) == 64]


@pytest.mark.parametrize("engine", ["fuse", "kernel"])
def test_a_read_that_the_store_never_answers_is_eio_in_time_and_works_later(
    control: Path, tmp_path: Path, cmd: Run, engine: str
) -> None:
    assert (
        cmd("cafs-mount", "--engine", engine, "s:1", tmp_path / "one", "--timeout", "1", "--log", tmp_path / "log").returncode
        == 0
    )
    (control / "hold").touch()
    for name in ("a", "c"):
        begin = time.monotonic()
        with pytest.raises(OSError) as caught:
            (tmp_path / "one" / name).read_bytes()
        assert caught.value.errno == errno.EIO and 0.9 < time.monotonic() - begin < 10 * SLOW
    assert len(os.listdir(tmp_path / "one")) == 3, "what needs no store is answered meanwhile"
    log = (tmp_path / "log").read_text()
    what = "'/a'" if engine == "fuse" else hashlib.sha256((tmp_path / "tree" / "a").read_bytes()).hexdigest()
    assert what in log and "no answer within 1 s" in log
    (control / "hold").unlink()
    for name in ("a", "b", "c"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "tree" / name).read_bytes()


def test_each_object_is_fetched_once_however_many_processes_and_threads_ask(control: Path, tmp_path: Path, cmd: Run) -> None:
    for point in ("one", "two"):  # two servers over one cache
        assert cmd("cafs-mount", "--engine", "fuse", "s:1", tmp_path / point, "--timeout", "30").returncode == 0
    before = len(pack_reads(control))
    (control / "hold").touch()
    with ThreadPoolExecutor(12) as pool:
        reads = [pool.submit((tmp_path / point / name).read_bytes) for point in ("one", "two") for name in ("a", "b") * 3]
        wait_until(lambda: len(pack_reads(control)) - before >= 1)
        time.sleep(0.5)  # time for whoever would fetch a second time; no more than that can be waited for
        (control / "hold").unlink()
        contents = {read.result(30 * SLOW) for read in reads}
    assert contents == {(tmp_path / "tree" / name).read_bytes() for name in ("a", "b")}
    fetched = [line.split()[1] for line in pack_reads(control)[before:]]
    assert len(fetched) == len(set(fetched)), "no part of a pack was read twice"
