"""Fixtures: a private store, cache and run directory for every test, and a way to run the commands as a user does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from cafs import linux
from runner.netlink import Netlink
from tests.crunning import image, shared  # noqa: F401  (fixtures)
from tests.pooling import controller, pool  # noqa: F401  (fixtures)
from tests.waiting import SLOW, wait_until

BIN = Path(sys.executable).parent
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]

hypothesis.settings.register_profile(
    "cafs",
    deadline=None,  # an example may take as long as this machine lets it
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
hypothesis.settings.load_profile("cafs")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that holds everything the tools keep; whatever a test left mounted below it is unmounted."""
    for name in ("STORE", "CACHE", "RUN", "STATE"):
        monkeypatch.setenv(f"CAFS_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("CAFS_DEBUG", raising=False)
    yield tmp_path
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        point = line.split(" ")[4]
        if point.startswith(str(tmp_path) + "/"):
            subprocess.run(["umount", "-l", point], check=False)


@pytest.fixture
def cmd(home: Path) -> Run:
    """Run one of our commands; the result has stdout and stderr as bytes."""

    def run(program: str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
        options["timeout"] = options.get("timeout", 60) * SLOW
        options.setdefault("capture_output", True)
        return subprocess.run([BIN / program, *map(str, arguments)], check=False, **options)  # type: ignore[call-overload,no-any-return]

    return run


def make_files(root: Path, count: int, large: int, smallest: int = 1, largest: int = 100_000) -> Path:
    """A tree of files called 0, 1, ..., of random content and sizes, and one called large; always the same."""
    root.mkdir()
    rng = random.Random(1)
    for number in range(count):
        (root / f"{number}").write_bytes(rng.randbytes(rng.randint(smallest, largest)))
    (root / "large").write_bytes(rng.randbytes(large))
    return root


def pid_of(home: Path, name: str, kind: str) -> int:
    """Of the 'supervisor' or 'worker' of the only mount of a kind: 'lazy' or 'fuse'."""
    (state,) = (home / "run" / kind).iterdir()
    return int((state / name).read_text())


def mounts_below(path: Path) -> list[str]:
    """Mount points in a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines if line.split(" ")[4].startswith(f"{path}/")]


def lazy_pids(home: Path) -> list[int]:
    """Of all supervisors and workers that this test has made, also of those whose directory is gone."""
    return sorted(int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if _holds(pid, f"{home}/run/lazy/"))


def _holds(pid: str, top: str) -> bool:
    """Whether a process has the mark of life of a state below TOP open."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for fd in descriptors:
        try:
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue  # closed meanwhile; the others count
        if path.startswith(top) and "/alive" in path:
            return True
    return False


@pytest.fixture
def kernel(home: Path, cmd: Run) -> Iterator[Run]:
    """Mount with the kernel engine; at the end nothing may be left mounted or running."""

    def run(name: str, point: Path, *options: object) -> subprocess.CompletedProcess[bytes]:
        point.mkdir(exist_ok=True)
        return cmd("cafs-mount", "--engine", "kernel", name, point, *options)

    yield run
    for mount in json.loads(b"[" + b",".join(cmd("cafs-mount", "--list", "--json").stdout.splitlines()) + b"]"):
        if mount["mountpoint"].startswith(str(home)):
            done = cmd("cafs-mount", "--unmount", mount["mountpoint"])
            assert done.returncode == 0, done.stderr
    assert mounts_below(home / "run") == []
    wait_until(lambda: lazy_pids(home) == [])
    assert [path for name in ("lazy", "fuse", "mounts") for path in (home / "run" / name).glob("*")] == []


def lacking(*needs: str) -> str | None:
    """Why this machine cannot run a test that needs these things; None if it can."""
    for need in needs:
        if need == "root" and os.geteuid():
            return "needs root"
        if need == "fuse" and not os.access("/dev/fuse", os.W_OK):
            return "needs /dev/fuse"
        if need not in ("root", "fuse") and not shutil.which(need):
            return f"needs the program {need}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("needs"):
            reason = lacking(*mark.args)
            if reason and os.environ.get("CI"):
                raise pytest.UsageError(f"{item.nodeid}: {reason}, which CI must have")
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*things): skip with a reason where a thing is missing; an error in CI")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would all commands
    if not os.geteuid():
        isolate()


def isolate() -> None:
    """Mounts, and a network with its bridges, addresses, rules and ports, that nobody sees but the tests of this process.

    A container copies all mounts that there are when it begins, and every CAFS_RUN leases the same addresses of one bridge.
    """
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET)
    linux.mount("none", "/", "none", linux.MS_REC | linux.MS_SLAVE)
    with Netlink() as link:
        link.set_up("lo")
