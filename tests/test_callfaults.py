"""What ends in mid-call, and what becomes of the call: one answer each, and nothing is done twice that must not be."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pool.calling import Function
from tests.crunning import make_rootfs
from tests.functioning import NEEDS, answer, deploy, end_all, functions_at, instances, remove_all, routers, wait
from tests.pooling import BIN, agents, cp, job, kill_all, ok, read_proc, serving
from tests.waiting import SLOW

pytestmark = pytest.mark.needs(*NEEDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch, functions_at(tmp_path_factory.mktemp("fault"), patch) as found:
        yield found


@pytest.fixture(autouse=True)
def alone(base: Path) -> Iterator[None]:
    yield
    remove_all()


class Running:
    """A call in the background that is at work."""

    def __init__(self, function: str, name: str, seconds: float, *more: str) -> None:
        words = [BIN / "cpool", "fn", "call", function, *more]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._child.stdin
        self._child.stdin.write(json.dumps({"name": name, "s": seconds}))
        self._child.stdin.close()
        self._child.stdin = None
        wait(lambda: f"begun {name}" in ok("fn", "logs", function))

    def end(self) -> tuple[int, str, str]:
        """(exit code, answer, errors)."""
        out, err = self._child.communicate(timeout=90 * SLOW)
        return self._child.returncode, out, err


def hosts(base: Path) -> list[int]:
    """Processes that hold the lock of a function host."""
    found = []
    for path in base.glob("pool/agents/*/calls/lock"):
        status = path.stat()
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == place:
                found.append(int(words[4]))
    return found


def times(function: str, word: str) -> int:
    return ok("fn", "logs", function).splitlines().count(word)


def pool_id() -> str:
    """Of processes of ours: others of this machine may be of another pool's job of that number."""
    (agent,) = Path(os.environ["CAFS_POOL"], "agents").glob("*.local")
    return agent.name.partition(".")[0]


def handlers_of(function: str) -> list[int]:
    """Processes in the containers of its instances."""
    (one,) = instances(function)
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{name}/cmdline").read_bytes().startswith(b"python3\0/run/cpool/shim.py"):
                environ = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                mine = {b"CPOOL_JOB=%d" % one["id"], b"CPOOL_POOL=" + pool_id().encode()}
                found += [int(name)] if mine <= set(environ) else []
        except OSError:
            continue
    return found


def test_a_handler_or_a_container_that_is_killed_fails_its_call(base: Path) -> None:
    deploy("mark", "python:h:mark")
    running = Running("mark", "a", 30)
    (pid,) = handlers_of("mark")
    os.kill(pid, signal.SIGKILL)
    code, out, err = running.end()
    assert (code, out) == (1, "") and "process has ended in the call" in err
    running = Running("mark", "b", 30)
    (one,) = instances("mark")
    ok("cancel", one["id"], "--grace", "0")
    code, out, err = running.end()
    assert (code, out) == (1, "") and "process has ended in the call" in err
    assert answer("mark", {"name": "c", "s": 0}) == "c"
    assert [times("mark", f"begun {name}") for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("many", [1, 2])
def test_that_memory_was_missing_is_known_however_late_the_end_is_seen(base: Path, many: int) -> None:
    """The host stands still from before the end until the container, and the cgroup that counted, have gone."""
    deploy("leak", "python:h:leak_when_told", "--memory", "64M", "--max", 1, "--concurrency", many)
    running = Running("leak", "a", 0)
    (pid,), (host,) = handlers_of("leak"), hosts(base)
    counted = next(line.split(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if "/cafs/" in line)
    (one,) = instances("leak")
    os.kill(host, signal.SIGSTOP)
    try:
        (place,) = base.glob(f"pool/agents/*/jobs/{one['id']}.1/calls/out")
        (place / "go").touch()
        wait(lambda: not list(Path("/sys/fs/cgroup").glob(f"*{counted}")) and not instances("leak"))
    finally:
        os.kill(host, signal.SIGCONT)
    code, out, err = running.end()
    assert (code, out) == (1, "") and "has ended in the call: it had no memory left" in err, err


@pytest.mark.parametrize("many", [1, 2])
def test_that_a_program_had_no_memory_left_is_said(many: int) -> None:
    deploy("fat", "jsonl:/bin/fat", "--memory", "32M", "--max", 1, "--concurrency", many)
    done = cp("fn", "call", "fat", input="1")
    assert done.returncode == 1 and "the program has ended in the call, exit code 137: it had no memory left" in done.stderr
    done = cp("fn", "call", "fat", input="2")
    assert done.returncode == 1 and "exit code 4\n" in done.stderr, "which is no end for want of memory"


def test_a_function_host_that_is_killed_leaves_calls_of_which_the_outcome_is_unknown(base: Path) -> None:
    deploy("mark", "python:h:mark", "--max", 1)
    running = Running("mark", "a", 600)
    (host,) = hosts(base)
    os.kill(host, signal.SIGKILL)
    code, out, err = running.end()
    assert (code, out) == (7, "") and "outcome unknown" in err
    assert answer("mark", {"name": "b", "s": 0}) == "b", "a new host, and a new instance"
    assert times("mark", "begun a") == 1, "it was not done again"
    running = Running("mark", "twice", 5 * SLOW, "--idempotent")
    (host,) = hosts(base)
    os.kill(host, signal.SIGKILL)
    assert running.end()[:2] == (0, '"twice"\n')
    assert times("mark", "begun twice") == 2, "this one may be"


def test_an_agent_that_is_killed_disturbs_no_call(base: Path) -> None:
    deploy("mark", "python:h:mark")
    running = Running("mark", "a", 4)
    (host,) = hosts(base)
    killed = [pid for pid in agents(base) if pid != host]
    kill_all(killed)
    assert running.end()[:2] == (0, '"a"\n')
    wait(lambda: '"state": "ready"' in ok("nodes", "--json"), 40)
    assert answer("mark", {"name": "b", "s": 0}) == "b" and len(instances("mark")) == 1


def test_a_router_that_is_killed_is_replaced_and_callers_get_their_answers(base: Path) -> None:
    deploy("mark", "python:h:mark", "--concurrency", 2)
    running = [Running("mark", "a", 3), Running("mark", "b", 5)]
    (router,) = routers(base)
    os.kill(router, signal.SIGKILL)
    assert [one.end() for one in running] == [(0, '"a"\n', ""), (0, '"b"\n', "")]
    assert [times("mark", f"begun {name}") for name in "ab"] == [1, 1], "each was done once"
    assert len(routers(base)) == 1 and len(instances("mark")) == 1
    key = ("--key", "once")
    first = Running("mark", "c", 0, *key).end()
    os.kill(routers(base)[0], signal.SIGKILL)
    wait(lambda: cp("fn", "call", "mark", *key, input='{"name":"c","s":0}').stdout == '"c"\n')
    assert first[1] == '"c"\n' and times("mark", "begun c") == 1, "an answer that the host has kept is not made again"


def test_a_new_router_asks_hosts_that_have_no_instance_any_more(base: Path) -> None:
    deploy("mark", "python:h:mark", "--idle", "0.3")
    words = ("fn", "call", "mark", "--key", "of an instance that is gone")
    first = cp(*words, input='{"name":"a","s":0}')
    wait(lambda: not instances("mark"))
    os.kill(routers(base)[0], signal.SIGKILL)
    wait(lambda: cp(*words, input='{"name":"a","s":0}').stdout == first.stdout == '"a"\n')
    assert times("mark", "begun a") == 1 and not instances("mark")


def test_why_a_container_does_not_start_is_said_and_not_only_what_to_do(base: Path, tmp_path: Path) -> None:
    make_rootfs(tmp_path / "odd")
    (tmp_path / "odd" / "dev").rmdir()
    (tmp_path / "odd" / "dev").symlink_to("/etc")
    subprocess.run([BIN / "cafs-index", "create", tmp_path / "odd", "-t", "odd:1"], capture_output=True, check=True)
    done = cp("fn", "deploy", "no", "--image", "odd:1", "--handler", "python:h:echo")
    assert done.returncode == 1 and "crun: the image's '/dev' is not a directory" in done.stderr, done.stderr


def test_a_map_goes_on_over_a_router_that_is_killed_and_no_line_is_lost(base: Path) -> None:
    deploy("echo", "python:h:nap", "--max", 2, "--concurrency", 4)
    many = 400
    words = [BIN / "cpool", "fn", "map", "echo"]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout
    child.stdin.write("0.05\n" * many)
    child.stdin.close()
    child.stdin = None
    first = [child.stdout.readline() for _ in range(20)]
    os.kill(routers(base)[0], signal.SIGKILL)
    rest = child.stdout.read()
    assert child.wait(60 * SLOW) == 0 and "".join(first) + rest == '"slept"\n' * many


def test_calls_go_on_without_a_controller(base: Path) -> None:
    """The one before is killed and another begins."""
    deploy("mark", "python:h:mark")
    running = Running("mark", "a", 3)
    pid = next(
        int(name)
        for name in filter(str.isdigit, os.listdir("/proc"))
        if read_proc(name, "cmdline").split(b"\0")[1:3] == [os.fsencode(BIN / "cpool"), b"serve"]
        and f"CAFS_POOL={base}/pool".encode() in read_proc(name, "environ").split(b"\0")
    )
    os.kill(pid, signal.SIGKILL)
    assert running.end()[:2] == (0, '"a"\n')
    assert "no controller runs" in ok("nodes", "--json")
    assert answer("mark", {"name": "b", "s": 0}) == "b", "the instance that there is serves on"
    with serving() as controller:
        assert answer("mark", {"name": "c", "s": 0}) == "c" and len(instances("mark")) == 1
        deploy("other", "python:h:echo")
        assert answer("other", 1) == 1, "and it is the new one's router now"
        ok("fn", "rm", "mark", "other")
        controller.terminate()
        controller.wait(30 * SLOW)
    subprocess.Popen([BIN / "cpool", "serve"])  # for whoever comes next; it ends with the fixture's `down`
    wait(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)


def test_a_caller_that_is_interrupted_takes_its_call_back(base: Path) -> None:
    deploy("mark", "python:h:mark", "--max", 1)
    running = Running("mark", "a", 60)
    running._child.send_signal(signal.SIGINT)
    assert running.end()[0] == 130
    began = time.monotonic()
    assert answer("mark", {"name": "b", "s": 0}) == "b" and time.monotonic() - began < 10 * SLOW
    assert times("mark", "done a") == 0


JUMPING = """
import os, time
from time import time as real, time_ns as real_ns
def skew():
    with open(os.environ["SKEW"]) as file:
        return int(file.read() or 0)
time.time = lambda: real() + skew()
time.time_ns = lambda: real_ns() + skew() * 1_000_000_000
"""
"""A sitecustomize for all of our processes."""


def test_a_clock_that_jumps_by_a_day_in_mid_call_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine: controller, router, agent and function host see it."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    (tmp_path / "skew").write_text("0")
    for name, value in (("PYTHONPATH", tmp_path), ("SKEW", tmp_path / "skew"), ("CAFS_POOL", tmp_path / "pool")):
        monkeypatch.setenv(name, str(value))
    ok("init")
    with serving() as controller:
        try:
            deploy("mark", "python:h:mark", "--concurrency", 2, "--max", 1)
            for skew in (86400, -86400):
                running, name = Running("mark", f"a{skew}", 1), f"b{skew}"
                (tmp_path / "skew").write_text(str(skew))
                assert answer("mark", {"name": name, "s": 0}) == name and running.end()[:2] == (0, f'"a{skew}"\n')
            assert [times("mark", f"begun {one}{skew}") for one in "ab" for skew in (86400, -86400)] == [1] * 4
            assert len(instances("mark")) == 1 and '"state": "ready"' in ok("nodes", "--json")
            number = ok("submit", "--no-container", "--cpus", "0.1", "--", "true").strip()
            assert cp("wait", number).returncode == 0 and job(number)["submitted_s"] < time.time() - 80_000, "it is seen"  # type: ignore[operator]
        finally:
            cp("down", "--grace", "0")
            controller.wait(60 * SLOW)
            end_all(tmp_path)


def test_no_clock_that_may_jump_decides_anything_about_calls() -> None:
    """All of it is by time.monotonic(); the wall's clock is for what is shown, and for the handler's deadline."""
    room = Path(__file__).parent.parent / "pool"
    for name in (
        "hosting",
        "execution",
        "known",
        "admitting",
        "hosted",
        "router",
        "callers",
        "instances",
        "answers",
        "routed",
        "hostlinks",
        "controlling",
        "loop",
        "session",
        "calling",
        "lines",
        "autoscaling",
    ):
        for node in ast.walk(ast.parse((room / f"{name}.py").read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr in ("monotonic", "sleep"), (name, node.attr)


def test_spawned_calls_outlive_their_router(base: Path) -> None:
    deploy("nap", "python:h:nap", "--max", 1)
    with Function("nap") as nap:
        ids = [nap.spawn(0.4) for _ in range(12)]
    for _ in range(2):
        os.kill(routers(base)[0], signal.SIGKILL)
        assert all(cp("fn", "result", one).returncode in (0, 6) for one in ids[-3:]), "never: no such call"
    assert [ok("fn", "result", "--wait", one) for one in ids] == ['"slept"\n'] * 12
    os.kill(routers(base)[0], signal.SIGKILL)
    assert [ok("fn", "result", "--wait", one) for one in ids[:2]] == ['"slept"\n'] * 2, "nor when it has its answer"


def test_a_key_of_a_spawned_call_is_kept_as_long_as_its_answer(base: Path) -> None:
    deploy("dice", "python:h:dice", "--max", 1)
    one = ok("fn", "spawn", "--key", "daily", "dice", input="1").strip()
    first = ok("fn", "result", "--wait", one)
    os.kill(routers(base)[0], signal.SIGKILL)
    for _ in range(2):
        assert ok("fn", "spawn", "--key", "daily", "dice", input="2").strip() == one
        assert ok("fn", "result", "--wait", one) == first
