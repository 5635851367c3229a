"""Files that go to jobs and come back, and commands beside jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from cafs.errors import UsageError
from pool import inputs, staging
from pool.processes import Job
from tests.conftest import BIN, wait_until
from tests.crunning import leftovers
from tests.pooling import PLAIN, agents, cp, is_served, job, ok, serving
from tests.waiting import SLOW


def test_files_go_to_a_job_and_come_back_from_it(pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("#!/bin/sh\ntr a-z A-Z <data/in.txt >out.txt; head -c 700000 /dev/zero >big; pwd; ls")
    (tmp_path / "script.sh").chmod(0o755)
    (tmp_path / "in.txt").write_text("some words\n")
    number = ok(
        "submit",
        *PLAIN,
        "--in",
        "script.sh",
        "--in",
        "in.txt:data/in.txt",
        "--out",
        "out.txt",
        "--out",
        "big",
        "--",
        "./script.sh",
    ).strip()
    (tmp_path / "got").mkdir()
    ok("fetch", number, "got")
    assert (tmp_path / "got" / "out.txt").read_text() == "SOME WORDS\n" and (tmp_path / "got" / "big").read_bytes() == bytes(
        700_000
    )
    assert ok("logs", "-f", number).splitlines()[1:] == ["big", "data", "out.txt", "script.sh"]
    assert job(number)["usage"]["files"] == [11, 700_000]  # type: ignore[index]
    wait_until(lambda: not os.listdir(pool / "inputs") and not os.listdir(next((pool / "agents").glob("*/jobs"))))
    ok("fetch", number, "again")
    assert (tmp_path / "again" / "out.txt").read_text() == "SOME WORDS\n", "also when the agent has forgotten it"


def test_what_a_job_leaves_that_is_no_file_of_its_own_does_not_come_back(
    pool: Path, controller: object, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    script = f"ln -s {tmp_path}/secret link; ln -s {tmp_path} above; mkdir dir; mkfifo pipe; echo x >file"
    names = ("link", "above/secret", "dir", "pipe", "none", "file")
    number = ok("submit", *PLAIN, *(word for name in names for word in ("--out", name)), "--", "sh", "-c", script).strip()
    done = cp("fetch", number, "got")
    assert done.returncode == 3 and "has left no 'link'" in done.stderr and done.stderr.count("has left no") == 5
    assert [one.name for one in (tmp_path / "got").rglob("*")] == ["file"]


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_in_an_image_files_are_where_the_command_runs(image: Path, pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words")
    number = ok(
        "submit",
        "--image",
        "b:1",
        "--in",
        "in.txt",
        "--out",
        "out/x",
        "--",
        "sh",
        "-c",
        "pwd; mkdir out; cat in.txt in.txt >out/x",
    ).strip()
    assert cp("wait", number).returncode == 0, cp("logs", number).stderr
    assert ok("fetch", number, "got") == "" and (tmp_path / "got" / "out" / "x").read_text() == "wordswords"
    assert ok("logs", "-f", number) == "/work\n"


def test_inputs_outlive_the_controller_and_are_kept_once(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    for _ in range(3):
        cp("submit", *PLAIN, "--hold", "--in", "a", "--in", "a:b", "--", "cat", "a", "b")
    assert len(os.listdir(pool / "inputs")) == 1
    spec = json.loads(ok("job", 1, "--json"))["spec"]
    assert [one[0] for one in spec["in"]] == ["a", "b"] and "same" not in str(spec)


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../b", "a//b", ".", "x\0y", "a" * 300, 7, None])
def test_names_that_lead_elsewhere_are_refused(name: object, tmp_path: Path) -> None:
    assert not staging.is_name(name)
    with pytest.raises(UsageError):
        inputs.check({"in": [[name, "0" * 64, 0o644]]})
    with pytest.raises(UsageError):
        inputs.check({"out": [name]})
    with pytest.raises(ValueError, match="cannot be"):
        staging.put(str(tmp_path / "work"), [[name, "", 0o644]])


def test_a_file_that_is_too_large_or_another_than_was_said_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inputs.keep(str(tmp_path), {"0" * 64: "eA=="})
    assert not (tmp_path / "inputs").exists()
    staging.put(str(tmp_path / "work"), [["a/b", "eA==", 0o7755]])
    assert stat.S_IMODE((tmp_path / "work" / "a" / "b").stat().st_mode) == 0o755


def test_more_than_fits_into_a_message_is_refused_at_once(pool: Path, tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(staging.SIZE_MAX + 1)
    refused = cp("submit", *PLAIN, "--in", "big", "--", "true")
    assert refused.returncode == 2 and "more than 4 MiB" in refused.stderr
    assert cp("submit", *PLAIN, "--in", "absent", "--", "true").returncode == 4
    assert cp("submit", *PLAIN, "--out", "../x", "--", "true").returncode == 2


def test_a_command_runs_beside_a_job_with_its_directory_and_environment(pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    number = ok("submit", *PLAIN, "-e", "A=b c", "--", "sleep", "60").strip()
    wait_until(lambda: job(number)["state"] == "running")
    done = cp("exec", number, "--", "sh", "-c", 'echo "$A" $CPOOL_JOB; ls; cat; echo err >&2; exit 5', input="not for it")
    assert (done.returncode, done.stdout, done.stderr) == (5, f"b c {number}\npool\nx\n", "err\n")
    assert ok("exec", "-i", number, "cat", input="words") == "words"
    assert cp("exec", number, "no-such-program").returncode == 127
    assert "is not a terminal" in cp("exec", "-t", number, "true", stdin=subprocess.DEVNULL).stderr
    ok("cancel", number, "--grace", "0")
    cp("wait", number)
    assert "is cancelled" in cp("exec", number, "true").stderr and cp("exec", 99, "true").returncode == 4


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_a_command_runs_in_the_container_of_a_job(image: Path, pool: Path, controller: object) -> None:
    number = ok("submit", "--image", "b:1", "--", "sh", "-c", "echo 1 >/tmp/mark; sleep 60").strip()
    wait_until(lambda: cp("exec", number, "cat", "/tmp/mark").stdout == "1\n")
    assert ok("exec", "-i", number, "sh", "-c", "cat; echo $CPOOL_JOB; hostname >/dev/null", input="in\n") == f"in\n{number}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        main, other = os.openpty()
        with subprocess.Popen([BIN / "cpool", "exec", "-it", number, "tty"], stdin=other, stdout=other, stderr=other) as child:
            assert child.wait(30 * SLOW) == 0
        assert b"/dev/pts/" in os.read(main, 4096)
    ok("cancel", number, "--grace", "0")
    cp("wait", number)
    wait_until(lambda: not leftovers(image))


# What else an agent and a controller do for jobs.


def test_each_job_that_asks_for_gpus_gets_its_own(
    pool: Path, controller: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By devices that are only called so: what is tested is who gets which."""
    from pool import agent, machine

    (tmp_path / "dev").mkdir()
    for number in (0, 1, 2, 10):
        (tmp_path / "dev" / f"nvidia{number}").touch()
    (tmp_path / "dev" / "nvidiactl").touch()
    monkeypatch.setattr(machine, "_DEVICES", str(tmp_path / "dev"))
    assert machine.gpus() == [0, 1, 2, 10]
    (tmp_path / "a.b" / "jobs").mkdir(parents=True)
    one = agent.Agent(str(tmp_path / "a.b"), "x")
    said: list[tuple[str, dict[str, object]]] = []
    one.peers = SimpleNamespace(say=lambda kind, **fields: said.append((kind, fields)), all=[])  # type: ignore[assignment]
    command = ["sh", "-c", f"echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/seen; sleep 60"]
    asked = {"attempt": 1, "command": command, "image": "", "cwd": "/", "env": {}, "cpus": 1, "memory": 0}
    for number, gpus in enumerate((2, 0, 1), 1):
        one._start({**asked, "id": number, "gpus": gpus})
    assert [one.jobs[number, 1].asked["gpu_ids"] for number in (1, 2, 3)] == [[0, 1], [], [2]]
    one._start({**asked, "id": 4, "gpus": 2})
    assert said[-1][0] == "refused", "only one is left: it goes back into the queue"
    wait_until(lambda: (tmp_path / "seen").exists() and len((tmp_path / "seen").read_text().splitlines()) == 3)
    assert sorted((tmp_path / "seen").read_text().splitlines()) == ["", "0,1", "2"]
    image = Job(str(tmp_path / "a.b" / "jobs" / "9.1"), {**asked, "id": 9, "image": "f" * 64, "gpu_ids": [1, 2]})
    words = image._command()
    assert words[words.index("--gpus") + 1] == "device=1,2"
    for number in (1, 2, 3):
        one.jobs[number, 1].kill_rest()
        os.waitpid(one.jobs[number, 1].pid, 0)


def test_the_image_of_a_job_that_waits_is_not_collected(pool: Path, home: Path) -> None:
    (home / "tree").mkdir()
    (home / "tree" / "file").write_text("content")
    for words in (("cafs-index", "create", "-q", home / "tree", "-t", "x:1"),):
        subprocess.run([BIN / words[0], *map(str, words[1:])], check=True)
    with subprocess.Popen([BIN / "cpool", "serve"]) as serving_one:
        wait_until(is_served)
        number = ok("submit", "--image", "x:1", "--hold", "--", "true").strip()
        wait_until(lambda: bool(os.listdir(home / "store" / "leases")))
        subprocess.run([BIN / "cafs-store", "untag", "x:1"], check=True)
        digest = json.loads(ok("job", number, "--json"))["spec"]["image"]
        subprocess.run([BIN / "cafs-store", "gc", "--grace", "0"], check=True, capture_output=True)
        assert subprocess.run(
            [BIN / "cafs-index", "ls", digest], capture_output=True, text=True, check=True
        ).stdout.split() == ["/", "/file"]
        ok("cancel", number)
        wait_until(lambda: not os.listdir(home / "store" / "leases"), 40)
        subprocess.run([BIN / "cafs-store", "gc", "--grace", "0"], check=True, capture_output=True)
        assert subprocess.run([BIN / "cafs-index", "ls", digest], capture_output=True, check=False).returncode == 4
        ok("down")
        serving_one.wait()


def fill(path: Path) -> None:
    """Append to a file until there is no room."""
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


@pytest.mark.needs("root")
def test_a_full_disk_ends_the_controller_with_a_word_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        monkeypatch.setenv("CAFS_POOL", str(place / "pool"))
        ok("init")
        one = subprocess.Popen([BIN / "cpool", "serve"], stderr=subprocess.PIPE, text=True)
        try:
            wait_until(is_served)
            first = ok("submit", *PLAIN, "--hold", "--", "true").strip()
            fill(place / "filler")
            done = [int(first)]
            for _ in range(100):  # the log of the database may have some room left
                refused = cp("submit", *PLAIN, "--hold", "--", "true", *["x" * 1000] * 100)
                if refused.returncode:
                    break
                done.append(int(refused.stdout))
            assert refused.returncode in (1, 7) and "Traceback" not in refused.stderr, refused.stderr
            said = one.communicate(timeout=30 * SLOW)[1]
            assert one.returncode == 1 and "cpool: cannot write the state of the pool: database or disk is full" in said, said
            fill(place / "filler")
            unread = cp("jobs", "-a")  # there is no room for the file that SQLite's readers share
            assert unread.returncode == 1 and "hint: there is no room" in unread.stderr, unread
        finally:
            one.kill()
            one.communicate()
        (place / "filler").unlink()
        with serving():
            assert [json.loads(line)["id"] for line in ok("jobs", "-a", "--json").splitlines()] == done
            ok("release", first)
            assert cp("wait", first).returncode == 0
            ok("down")
        for pid in agents(place):
            os.kill(pid, signal.SIGKILL)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.needs("root")
def test_a_plain_job_that_says_what_memory_it_needs_gets_no_more_and_nothing_of_it_gets_away(
    pool: Path, controller: object
) -> None:
    hungry = "x = bytearray(300 << 20); print(len(x))"
    run = ("submit", *PLAIN, "--", "python3", "-c", hungry)
    limited = ok(*run[:2], "--memory", "100m", *run[2:]).strip()
    free = ok(*run).strip()
    assert cp("wait", limited).returncode == 137 and cp("wait", free).returncode == 0
    assert 90 << 20 < job(limited)["usage"]["memory"] < 200 << 20 and job(free)["usage"]["memory"] > 300 << 20  # type: ignore[index]
    script = f"env -i setsid sh -c 'sleep 4747.{os.getpid()} & exec sleep 4747.{os.getpid()}' & sleep 4747.{os.getpid()}"
    number = ok("submit", *PLAIN, "--", "sh", "-c", script).strip()
    wait_until(
        lambda: (
            len(subprocess.run(["pgrep", "-f", f"^sleep 4747.{os.getpid()}"], capture_output=True, check=False).stdout.split())
            == 3
        )
    )
    ok("cancel", number, "--grace", "0")
    cp("wait", number)
    assert subprocess.run(["pgrep", "-f", f"sleep 4747.{os.getpid()}"], capture_output=True, check=False).stdout == b""
    place = next((pool / "agents").glob("*.local")).name
    wait_until(lambda: not [one for top in ("*/", "") for one in Path("/sys/fs/cgroup").glob(f"{top}cafs-jobs/{place}/*/")])
