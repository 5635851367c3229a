"""A pool as a user has it: its commands, a controller, and nothing of it left afterwards; fixtures are in conftest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
PLAIN = ("--no-container",)
DYING = """
import os, sys
from pool import client, state
left, when, commit = int(sys.argv[1]), sys.argv[2], state.State.commit
def counted(self):
    global left
    left -= self._is_open
    if left == 0 and when == "before":
        os.kill(os.getpid(), 9)
    commit(self)
    if left == 0:
        os.kill(os.getpid(), 9)
state.State.commit = counted
client.serve(os.environ["CAFS_POOL"])
"""
"""A controller that ends itself before or after its so-manieth durable step."""


def cp(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    options.setdefault("timeout", 60)
    return subprocess.run([str(BIN / "cpool"), *map(str, words)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def ok(*words: object, **options: object) -> str:
    done = cp(*words, **options)
    assert done.returncode == 0, (words, done.stderr)
    return str(done.stdout)


def job(number: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(ok("job", number, "--json"))
    return found


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pool; afterwards no agent of it is left."""
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    monkeypatch.chdir(tmp_path)
    ok("init")
    yield tmp_path / "pool"
    for pid in agents(tmp_path):
        os.kill(pid, signal.SIGKILL)


def agents(place: Path) -> list[int]:
    """The processes of agents whose directory is below a place."""
    start = os.fsencode(place)
    return processes(lambda words: {b"attach", b"daemon"} & set(words) and any(word.startswith(start) for word in words))


def processes(is_one: Callable[[list[bytes]], object]) -> list[int]:
    """Those whose words, of the command, are such."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if is_one(words):
            found.append(int(name))
    return found


@contextmanager
def serving() -> Iterator[subprocess.Popen[bytes]]:
    """A controller that has a worker that is ready."""
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        try:
            _until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
            yield controller
        except AssertionError:
            print(cp("nodes", "--json").stdout)
            raise
        finally:
            controller.terminate()


@contextmanager
def serving_with(code: str) -> Iterator[None]:
    """A controller of which something is changed; it is killed at the end."""
    whole = f"{code}; import os; from pool import client; client.serve(os.environ['CAFS_POOL'])"
    with subprocess.Popen([sys.executable, "-c", whole]) as one:
        try:
            _until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
            yield
        finally:
            one.kill()


@pytest.fixture
def controller(pool: Path) -> Iterator[subprocess.Popen[bytes]]:
    with serving() as found:
        yield found
        if found.poll() is None:
            cp("down", "--grace", "0")


def _until(is_so: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
