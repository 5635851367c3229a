"""A small image of busybox for containers, and what may be left of one afterwards: nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import SLOW, until

BIN = Path(sys.executable).parent
TOOLS = (
    "date",
    "httpd",
    "mkdir",
    "mount",
    "mknod",
    "rm",
    "seq",
    "tar",
    "tr",
    "wget",
    "yes",
    "ping",
    "wc",
    "sort",
    "chmod",
    "cp",
    "sh",
    "cat",
    "id",
    "env",
    "pwd",
    "sleep",
    "true",
    "kill",
    "ls",
    "touch",
    "hostname",
    "grep",
    "tty",
    "stat",
    "ip",
    "head",
    "echo",
    "cut",
    "ln",
    "timeout",
)


def make_rootfs(root: Path) -> None:
    """A small image: busybox, users, a file that cannot be executed."""
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "home/joe"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, root / "bin" / "busybox")
    for name in TOOLS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "bin" / "data").write_text("not a program")
    (root / "etc" / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\njoe:x:1000:1001::/home/joe:/bin/sh\n7:x:42:42::/:/bin/sh\n"
    )
    (root / "etc" / "group").write_text("root:x:0:\njoe:x:1001:\nextra:x:2000:joe\n")
    (root / "tmp").chmod(0o1777)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shared_at(tmp_path_factory.mktemp("crun")) as base:
        yield base


@contextmanager
def shared_at(base: Path) -> Iterator[Path]:
    """One store with the image b:1, mounted once, so that each test starts warm."""
    environment = {f"CAFS_{n}": str(base / n.lower()) for n in ("STORE", "CACHE", "RUN", "STATE")}
    make_rootfs(base / "rootfs")
    (base / "mnt").mkdir()
    subprocess.run([BIN / "cafs-index", "create", base / "rootfs", "-t", "b:1"], env=os.environ | environment, check=True)
    subprocess.run([BIN / "cafs-mount", "b:1", base / "mnt"], env=os.environ | environment, check=True)
    yield base
    subprocess.run([BIN / "cafs-mount", "--unmount", base / "mnt"], env=os.environ | environment, check=True)


@pytest.fixture
def image(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment of `shared`; afterwards nothing of a container may be left."""
    for name in ("STORE", "CACHE", "RUN", "STATE"):
        monkeypatch.setenv(f"CAFS_{name}", str(shared / name.lower()))
    yield shared
    try:
        assert until(lambda: leftovers(shared) == []), leftovers(shared)
    finally:
        left = subprocess.run([BIN / "crun", "ps", "-aq"], capture_output=True, text=True, check=False).stdout.split()
        if left:
            subprocess.run([BIN / "crun", "rm", "-f", *left], capture_output=True, check=False)


def leftovers(base: Path) -> list[str]:
    found = [
        str(p)
        for d in ("state/containers", "state/alive", "run/runc", "state/names", "run/images")
        for p in (base / d).glob("*")
    ]
    found += [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f"{base}/" in line and not re.search(f" {base}/(mnt|run/lazy|run/erofs)", line)  # those are below mnt
    ]
    events = base / "state" / "events"
    ours = {json.loads(line)["id"] for line in events.read_text().splitlines()} if events.exists() else set()
    for pattern in ("*/cafs/*", "cafs/*"):  # of version 1, and 2
        found += [str(p) for p in Path("/sys/fs/cgroup").glob(pattern) if p.is_dir() and p.name in ours]
    return found


def crun(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "crun"), "run", "--rm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOW, check=False, **options)  # type: ignore[call-overload,no-any-return]
