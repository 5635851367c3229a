"""A store that cannot be reached: what was mounted once mounts again, and what is cached is read."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from cafs.store import init
from tests.conftest import Run
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse")
ENGINES = pytest.mark.parametrize("engine", ["kernel", "fuse"])


@pytest.fixture
def digest(home: Path, tmp_path: Path, cmd: Run) -> str:
    """Of x:1, a tree of two files."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "tree" / "cached").write_bytes(b"c" * 5000)
    (tmp_path / "tree" / "far").write_bytes(os.urandom(9 << 20))
    return cmd("cafs-index", "create", tmp_path / "tree", "-t", "x:1").stdout.decode().strip()


@ENGINES
def test_a_mounted_image_mounts_again_by_digest_and_by_ref(
    home: Path, tmp_path: Path, cmd: Run, kernel: Run, digest: str, engine: str
) -> None:
    point = tmp_path / "mnt"
    arguments = ["--engine", engine, "--timeout", "0.5"]
    assert cmd("cafs-mount", *arguments, "x:1", point).returncode == 0
    (point / "cached").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    os.rename(home / "store", home / "away")
    (ref,) = (home / "cache" / "refs").iterdir()
    known = json.loads(ref.read_text())
    ref.write_text(json.dumps(known | {"time": known["time"] - 7300}))
    for name, words in ((digest, b""), (digest[:10], b""), (f"x:1@sha256:{digest}", b""), ("x:1", b"as it was 2 hours ago")):
        done = cmd("cafs-mount", *arguments, name, point)
        assert done.returncode == 0, done.stderr
        assert words in done.stderr and bool(words) == bool(done.stderr)
        assert (point / "cached").read_bytes() == b"c" * 5000
        began = time.monotonic()
        with pytest.raises(OSError) as caught:
            (point / "far").read_bytes()
        assert caught.value.errno == errno.EIO and time.monotonic() - began < 10 * SLOW
        assert cmd("cafs-mount", "--unmount", point).returncode == 0
    missing = cmd("cafs-mount", *arguments, "y:1", point)
    assert missing.returncode == 4 and b"not a store" in missing.stderr
    os.rename(home / "away", home / "store")
    assert cmd("cafs-mount", *arguments, "x:1", point).stderr == b""
    assert (point / "far").read_bytes() == (tmp_path / "tree" / "far").read_bytes()


@ENGINES
def test_a_store_that_is_another_now_is_asked_anew(
    home: Path, tmp_path: Path, cmd: Run, kernel: Run, digest: str, engine: str
) -> None:
    point = tmp_path / "mnt"
    assert cmd("cafs-mount", "--engine", engine, "x:1", point).returncode == 0
    assert cmd("cafs-mount", "--unmount", point).returncode == 0
    os.rename(home / "store", home / "before")
    init(str(home / "store"), "xxh128")
    assert cmd("cafs-index", "create", tmp_path / "tree", "-t", "x:1").returncode == 0
    done = cmd("cafs-mount", "--engine", engine, "x:1", point)
    assert done.returncode == 0, done.stderr
    assert (point / "far").read_bytes() == (tmp_path / "tree" / "far").read_bytes()
