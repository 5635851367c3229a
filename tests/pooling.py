"""A pool as a user has it: its commands, a controller, and nothing of it left afterwards; fixtures are in conftest."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.waiting import SLOW, wait_until

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
    options["timeout"] = options.get("timeout", 60) * SLOW
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
    kill_all(agents(tmp_path))


def agents(place: Path) -> list[int]:
    """The processes of agents whose directory is below a place."""
    start = os.fsencode(place)
    return processes(lambda words: {b"attach", b"daemon"} & set(words) and any(word.startswith(start) for word in words))


def processes(is_one: Callable[[list[bytes]], object]) -> list[int]:
    """Those whose words, of the command, are such."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        words = read_proc(name, "cmdline").split(b"\0")
        if words != [b""] and is_one(words):
            found.append(int(name))
    return found


def read_proc(pid: object, name: str) -> bytes:
    """A file of a process in /proc; b'' of one that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def kill_all(pids: Iterable[int]) -> None:
    """Those that have not ended meanwhile."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Also not dead and unreaped."""
    return read_proc(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


def is_served() -> bool:
    """Whether a controller listens: cpool nodes also answers without one."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(os.path.join(os.environ["CAFS_POOL"], "socket")) == 0


@contextmanager
def serving() -> Iterator[subprocess.Popen[bytes]]:
    """A controller that has a worker that is ready."""
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        try:
            wait_until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
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
            wait_until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
            yield
        finally:
            one.kill()


@pytest.fixture
def controller(pool: Path) -> Iterator[subprocess.Popen[bytes]]:
    with serving() as found:
        yield found
        if found.poll() is None:
            cp("down", "--grace", "0")
