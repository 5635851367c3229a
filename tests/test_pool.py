"""cpool as a user runs it: a real controller, real agents, jobs that end well, badly or not at all, kills at any moment."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs.errors import RemoteError
from pool import address, frames, links, mapping, processes, scaling, simulation, specs, state
from pool import machine as machine_of
from pool.placement import Need, Placement, Worker, why_not
from pool.settings import Settings
from tests.conftest import BIN, wait_until
from tests.crunning import make_rootfs
from tests.faultproxy import free_port
from tests.pooling import DYING, PLAIN, agents, cp, is_alive, job, kill_all, ok, serving, serving_with
from tests.waiting import SLOW


def test_a_job_runs_here_and_its_code_and_words_come_back(controller: object) -> None:
    number = ok(
        "submit",
        *PLAIN,
        "-e",
        "A=b c",
        "--",
        "sh",
        "-c",
        'echo "$A $CPOOL_JOB $CPOOL_ATTEMPT $CPOOL_WORKER"; pwd; echo err >&2; exit 3',
    ).strip()
    assert cp("wait", number).returncode == 3
    found = cp("logs", number)
    assert found.stdout == f"b c {number} 1 local\n{os.getcwd()}\n" and found.stderr == "err\n"
    shown = job(number)
    assert (shown["state"], shown["code"], shown["reason"], shown["worker"]) == ("finished", 3, "exit code 3", "local")
    fields = [line.split()[0] for line in ok("job", number).splitlines()]
    assert {"state", "worker", "command", "cpus"} <= set(fields) and len(set(fields)) == len(fields) and "spec" not in fields
    assert cp("wait", ok("submit", *PLAIN, "--", "no-such-program").strip()).returncode == 127
    assert cp("wait", ok("submit", *PLAIN, "--workdir", "/no/such", "--", "true").strip()).returncode == 125
    assert cp("wait", ok("submit", *PLAIN, "--", "sh", "-c", "kill -9 $$").strip()).returncode == 137


def test_much_output_comes_whole(controller: object, tmp_path: Path) -> None:
    text = os.urandom(700_000).hex()
    (tmp_path / "text").write_text(text)
    number = ok("submit", *PLAIN, "--", "sh", "-c", f"cat {tmp_path}/text; cat {tmp_path}/text >&2").strip()
    assert cp("wait", number).returncode == 0
    found = cp("logs", "-f", number)
    assert found.stdout == text and found.stderr == text
    wait_until(lambda: not os.listdir(next((tmp_path / "pool" / "agents").glob("*/jobs"))))
    assert cp("logs", number).stdout == text, "also when the agent has forgotten it"


def test_of_too_much_output_the_first_and_the_last_is_kept_and_that_is_said(pool: Path, tmp_path: Path) -> None:
    half = 1 << 20
    (pool / "pool.toml").write_text(f"[pool]\noutput_max = {2 * half}\n")
    script = f"yes begin | head -c {3 * half}; until test -f {tmp_path}/go; do sleep 0.05; done; echo the end"
    with serving():
        number = ok("submit", *PLAIN, "--", "sh", "-c", script).strip()
        wait_until(lambda: job(number)["state"] == "running")
        path = next((tmp_path / "pool" / "agents").glob("*/jobs")) / f"{number}.1" / "out"
        wait_until(lambda: path.stat().st_size == 3 * half and path.stat().st_blocks * 512 <= 2 * half + (1 << 20))
        kill_all(agents(tmp_path))  # what another agent knows of it is the file
        (tmp_path / "go").touch()
        assert cp("wait", number).returncode == 0
        for _ in range(2):
            done = cp("logs", number)
            assert done.returncode == 3 and done.stdout == "begin\n" * (half // 6) + done.stdout[half // 6 * 6 :]
            assert done.stdout.endswith("begin\nthe end\n") and 2 * half <= len(done.stdout) < 2 * half + 8192
            left = 3 * half + len("the end\n") - len(done.stdout)
            assert f"job {number}: {left} bytes of its standard output were left out: output_max" in done.stderr
            wait_until(lambda: not path.exists())
        fast = cp("map", *PLAIN, "--", "sh", "-c", f"yes x | head -c {8 * half}; echo {{}}", input="the end\n")
        assert fast.returncode == 3 and fast.stdout.endswith("x\nthe end\n") and "were left out" in fast.stderr
        ok("down")


def test_an_output_with_a_hole_ends_no_agent(pool: Path, tmp_path: Path) -> None:
    (pool / "pool.toml").write_text(f"[pool]\noutput_max = {1 << 20}\n")
    with serving():
        hole = ok("submit", *PLAIN, "--", "sh", "-c", "truncate -s 1G /proc/self/fd/1; chmod 400 /proc/self/fd/2").strip()
        assert cp("wait", hole).returncode == 0
        assert cp("logs", hole).returncode == 3 and job(hole)["attempt"] == 1
        assert ok("map", *PLAIN, "echo", ":::", "alive") == "alive\n"
        ok("down")


def test_down_cancels_what_waits_without_starting_it(pool: Path, tmp_path: Path) -> None:
    for _ in range(2):
        number = ok("submit", *PLAIN, "--", "sh", "-c", f"echo begun >>{tmp_path}/ran; sleep 20").strip()
    cp("logs", number)
    ok("down")
    assert not (tmp_path / "ran").exists() and job(number)["state"] == "cancelled" and job(number)["attempt"] == 0


def test_pieces_of_an_output_come_once_each_also_after_a_full_disk(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pool.controller import Controller

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        held.state.put_host("local", "")
        held.look_at_hosts()
        number = held.state.submit(specs.check({"command": ["true"]}))
        held.state.change(held.state.job(number), state=state.FINISHED, worker="local", attempt=1, code=0)
        remote, asked = held.remotes["local"], []
        monkeypatch.setattr(held, "send", lambda _, frame: asked.append(frame))
        end = {"id": number, "attempt": 1, "code": 0, "out_size": 6, "err_size": 0}
        held.outputs.fetch_or_forget(remote, number, 1, end)
        (fetch,) = held.outputs._fetching.values()
        held.outputs._stand_still(fetch, OSError(28, "No space left on device"))
        for _ in range(3):
            fetch.again = 0.0
            held.outputs.mind()
        requests = list(held.outputs._asked)
        assert len(requests) == 1 == len(asked)
        held.outputs.answered(remote, requests[0], 2, b"AB")
        for data in (b"CD", b"EF"):
            (request,) = held.outputs._asked
            held.outputs.answered(remote, request, 0, data)
        assert (pool / "logs" / f"{number}.out").read_bytes() == b"ABCDEF"
        held.state.commit()
        held.state.close()


def test_a_worker_is_not_put_aside_for_what_was_cancelled_or_fails_everywhere(pool: Path) -> None:
    from pool.controller import Controller

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        for name in ("a", "b"):
            held.state.put_host(name, f"{name}@127.0.0.1:1")
        held.look_at_hosts()
        first = held.remotes["a"]
        job_of_image = held.state.job(held.state.submit(specs.check({"command": ["true"], "image": "x:1"})))
        first.cannot_run_images("no runc")
        held.state.change(job_of_image, code=0)
        first.has_ended(job_of_image, 5.0)
        assert not first.unable and first._unable_until == 0.0
        failed = held.state.job(held.state.submit(specs.check({"command": ["false"]})))
        held.state.change(failed, code=1)
        for _ in range(50):
            held._judge(first, failed, 0.01)
        assert not first.is_aside, "nothing has gone well elsewhere since"
        for _ in range(50):
            first.refused("no room")
        assert first._refusals == 1, "those that were under way together count once"
        held.state.commit()
        held.state.close()


def test_what_map_prints_and_what_a_job_leaves_is_every_byte_of_it(controller: object, tmp_path: Path) -> None:
    """Also more than was ever kept: 80 MiB of a file, 64 of a stream."""
    script = "head -c 90000000 /dev/urandom >{0}; sha256sum <{0}; chmod 750 {0}"
    number = ok("submit", *PLAIN, "--out", "b", "--", "sh", "-c", script.format("b")).strip()
    ok("fetch", number, "got")
    assert hashlib.sha256((tmp_path / "got" / "b").read_bytes()).hexdigest() == ok("logs", number).split()[0]
    assert (tmp_path / "got" / "b").stat().st_mode & 0o777 == 0o750
    done = subprocess.run([BIN / "cpool", "map", *PLAIN, "cat", ":::", tmp_path / "got" / "b"], capture_output=True, check=True)
    assert done.stdout == (tmp_path / "got" / "b").read_bytes()


def test_what_cannot_be_had_any_more_is_said_and_nothing_is_called_whole(controller: object, tmp_path: Path) -> None:
    shell = ok("submit", *PLAIN, "--no-requeue", "--", "sh", "-c", "echo begun; exec sleep 60").strip()
    wait_until(lambda: cp("logs", shell).stdout == "begun\n")
    place = next((tmp_path / "pool" / "agents").glob("*/jobs"))
    kill_all(agents(tmp_path))
    os.rename(place / f"{shell}.1", tmp_path / "gone")
    assert cp("wait", shell).returncode == 1
    done = cp("logs", shell)
    assert done.returncode == 3 and f"job {shell}: what it wrote was lost with worker local" in done.stderr


def test_a_job_that_is_cancelled_or_late_ends_with_all_its_processes(controller: object, tmp_path: Path) -> None:
    script = f"trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/deep; while :; do sleep 1; done' & echo $$ > {tmp_path}/top; wait; while :; do sleep 1; done"
    number = ok("submit", *PLAIN, "--", "sh", "-c", script).strip()
    wait_until(lambda: (tmp_path / "deep").exists() and (tmp_path / "deep").read_text().endswith("\n"))
    pids = [int((tmp_path / name).read_text()) for name in ("top", "deep")]
    ok("cancel", number, "--grace", "0.2")
    assert cp("wait", number).returncode == 143 and job(number)["state"] == "cancelled"
    wait_until(lambda: not any(map(is_alive, pids)))
    late = ok("submit", *PLAIN, "--timeout", "0.2", "--", "sleep", "1000").strip()
    assert cp("wait", late).returncode == 124 and job(late)["reason"] == "ran out of time"
    ok("cancel", ok("submit", *PLAIN, "--cpus", "9999", "--", "true").strip())


def test_one_key_is_one_job_and_another_job_with_it_is_refused(controller: object) -> None:
    first = ok("submit", *PLAIN, "--key", "k", "--", "echo", "once")
    assert cp("wait", first.strip()).returncode == 0
    assert ok("submit", *PLAIN, "--key", "k", "--", "echo", "once") == first
    other = cp("submit", *PLAIN, "--key", "k", "--", "echo", "twice")
    assert other.returncode == 6 and "is that of job" in other.stderr


def test_what_is_made_above_a_pool_is_closed_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "above" / "pool"))
    ok("init", umask=0)
    assert [(tmp_path / one).stat().st_mode & 0o777 for one in ("above", "above/pool")] == [0o700, 0o700]


@pytest.mark.parametrize("option", ["--image", "--key", "--tenant", "--name"])
def test_an_option_of_a_job_with_an_empty_value_is_refused(pool: Path, option: str) -> None:
    done = cp("submit", *(() if option == "--image" else PLAIN), option, "", "--", "true")
    assert done.returncode == 2 and f"{option} is empty" in done.stderr


def test_a_job_that_fails_is_tried_again_as_often_as_was_said(controller: object, tmp_path: Path) -> None:
    number = ok(
        "submit", *PLAIN, "--retries", "1", "--", "sh", "-c", f"echo $CPOOL_ATTEMPT >> {tmp_path}/tries; exit 1"
    ).strip()
    assert cp("wait", number).returncode == 1
    assert (tmp_path / "tries").read_text() == "1\n2\n" and job(number)["failures"] == 1


def test_what_each_attempt_has_written_is_kept(controller: object) -> None:
    script = "echo $CPOOL_ATTEMPT; echo err >&2; test $CPOOL_ATTEMPT = 3"
    number = ok("submit", *PLAIN, "--retries", "2", "--", "sh", "-c", script).strip()
    assert cp("wait", number).returncode == 0
    for attempt in (1, 2, 3):
        wait_until(lambda attempt=attempt: cp("logs", "--attempt", attempt, number).returncode == 0)
        said = cp("logs", "--attempt", attempt, number)
        assert (said.stdout, said.stderr) == (f"{attempt}\n", "err\n")
    assert ok("logs", number) == "3\n" and cp("logs", "--attempt", "9", number).returncode == 4


def test_a_directory_that_nobody_has_asked_for_need_not_be_there(controller: object, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    number = ok("submit", *PLAIN, "--hold", "--", "pwd", cwd=tmp_path / "here").strip()
    (tmp_path / "here").rmdir()
    ok("release", number)
    assert cp("wait", number).returncode == 0 and ok("logs", number) == os.path.expanduser("~") + "\n"


@pytest.mark.needs("root")
def test_what_has_used_up_its_memory_is_said_to_have(controller: object) -> None:
    code = "x = bytearray(200 << 20); print(len(x))"
    number = ok("submit", *PLAIN, "--memory", "32M", "--", sys.executable, "-S", "-c", code).strip()
    assert cp("wait", number).returncode == 137
    assert job(number)["reason"] == "exit code 137: it had no memory left, of --memory"


def test_what_waits_says_why_and_what_is_held_waits(controller: object) -> None:
    large = ok("submit", *PLAIN, "--gpus", "99", "--", "true").strip()
    assert job(large)["waits"] == f"no worker fits: needs 99 GPUs, the largest has {len(machine_of.gpus())}"
    held = ok("submit", *PLAIN, "--hold", "--", "true").strip()
    assert job(held)["state"] == "held"
    ok("release", held)
    assert cp("wait", held).returncode == 0
    shown = ok("top", "--once", env=os.environ | {"COLUMNS": "200"})
    assert "1 workers, 0 of" in shown and f"{large} " in shown and "queued" in shown
    ok("node", "drain", "local")
    waiting = ok("submit", *PLAIN, "--", "true").strip()
    assert "is drained" in str(job(waiting)["waits"])
    ok("node", "resume", "local")
    assert cp("wait", waiting).returncode == 0
    assert [json.loads(line)["id"] for line in ok("jobs", "--json").splitlines()] == [int(large)]


def test_jobs_come_after_others_and_end_if_those_fail(controller: object, tmp_path: Path) -> None:
    first = ok("submit", *PLAIN, "--hold", "--", "true").strip()
    second = ok("submit", *PLAIN, "--after", first, "--", "sh", "-c", f"touch {tmp_path}/second; exit 1").strip()
    third = ok("submit", *PLAIN, "--after", first, "--after", second, "--", "touch", tmp_path / "third").strip()
    assert job(second)["waits"] == f"comes after job {first}"
    ok("release", first)
    assert cp("wait", second).returncode == 1 and cp("wait", third).returncode == 143
    assert job(third)["reason"] == f"job {second}, after which it comes, has failed" and not (tmp_path / "third").exists()
    assert cp("submit", *PLAIN, "--after", "99", "--", "true").returncode == 4


def test_a_job_comes_after_very_many_and_each_is_looked_up_once(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pool.controller import Controller

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        before = [held.state.submit(specs.check({"command": ["true"]})) for _ in range(25_000)]
        for number in before:
            held.state._do("UPDATE jobs SET state = 'finished', code = 0 WHERE id = ?", [number])
        last = held.state.submit(specs.check({"command": ["true"]}))
        held.add(held.state.job(last))
        spec = specs.check_one(held.state, {"spec": {"command": ["true"], "after": [last, *before]}})
        held.add(held.state.job(held.state.submit(spec)))
        looked_up, has_job = [0], state.State.has_job

        def counted(self: state.State, number: int) -> bool:
            looked_up[0] += 1
            return has_job(self, number)

        monkeypatch.setattr(state.State, "has_job", counted)
        one = held.remotes["local"]
        one.has_greeted = True
        one.reported(
            {
                "cpus": 0,
                "memory": 1,
                "free_memory": 1,
                "free_disk": 1,
                "load": 0,
                "gpus": 0,
                "running": 0,
                "images": "",
                "arch": "x",
            }
        )
        for _ in range(3):
            held.waiting.may_place = True
            held.waiting.place()
        assert looked_up[0] <= 25_000
        held.state.close()


def test_only_so_many_of_an_array_run_at_once(controller: object, tmp_path: Path) -> None:
    """The first two stay until two are seen; whoever comes counts."""
    stay = f"until test -f {tmp_path}/go; do sleep 0.01; done"
    script = f"mkdir {tmp_path}/$CPOOL_INDEX; ls -d {tmp_path}/[0-9] | wc -l; {stay}; rmdir {tmp_path}/$CPOOL_INDEX"
    numbers = ok("submit", *PLAIN, "--cpus", "0.1", "--array", "1-8%2", "--", "sh", "-c", script).split()
    wait_until(lambda: len(list(tmp_path.glob("[0-9]"))) == 2)
    assert [job(number)["state"] for number in numbers].count("queued") == 6
    (tmp_path / "go").touch()
    assert cp("wait", *numbers).returncode == 0
    assert max(int(cp("logs", number).stdout) for number in numbers) == 2


def test_a_job_goes_only_where_it_may_and_does_not_wait_for_ever(controller: object) -> None:
    ok("host", "add", "local", "--label", "fast", "--label", "near")
    assert (
        cp("wait", ok("submit", *PLAIN, "--constraint", "fast", "--constraint", "near", "--", "true").strip()).returncode == 0
    )
    for flags in (("--constraint", "far"), ("--exclude", "local")):
        patient, number = (
            ok("submit", *PLAIN, *flags, "--queue-timeout", limit, "--", "true").strip() for limit in (1000, 0.2)
        )
        assert job(patient)["waits"] == "no worker has the labels that it wants, or all are excluded"
        assert cp("wait", number).returncode == 143 and job(number)["reason"] == "waited too long for a worker"
        assert job(patient)["state"] == "queued"


def test_without_a_controller_jobs_are_queued_and_the_next_one_runs_them(pool: Path) -> None:
    done = cp("submit", *PLAIN, "--array", "3-5", "--", "sh", "-c", "echo $CPOOL_INDEX")
    assert done.stdout == "1\n2\n3\n" and "queued; no controller runs" in done.stderr
    waits = cp("wait", "1")
    assert waits.returncode == 7 and "cpool serve" in waits.stderr
    assert job(1)["state"] == "queued"
    with serving():
        assert cp("wait", "1", "2", "3").returncode == 0
        assert [cp("logs", n).stdout for n in (1, 2, 3)] == ["3\n", "4\n", "5\n"]
        second = cp("serve")
        assert second.returncode == 6 and "a controller runs" in second.stderr
        ok("down")


def test_a_step_for_cron_starts_and_records_and_judges_slowly(pool: Path, tmp_path: Path) -> None:
    cp("submit", *PLAIN, "--", "sh", "-c", f"until test -f {tmp_path}/go; do sleep 0.01; done; exit 3")
    ok("tick")
    assert job(1)["state"] == "running"
    (tmp_path / "go").touch()
    wait_until(lambda: ok("tick") == "" and job(1)["state"] == "finished")
    assert job(1)["code"] == 3
    cp("submit", *PLAIN, "--", "true")
    with state.locked(str(pool)):
        held = state.State(str(pool))
        held.put_host("gone", "root@127.0.0.1:1")
        held.change(held.job(2), state=state.RUNNING, worker="gone", attempt=1)
        held.set_meta("heard.gone", str(time.time() - 10))
        held.commit()
        held.close()
    ok("tick")
    assert job(2)["state"] == "running", "it may be back in a moment"
    with state.locked(str(pool)):
        held = state.State(str(pool))
        held.set_meta("heard.gone", str(time.time() - 60))
        held.commit()
        held.close()
    ok("tick")
    assert (job(2)["state"], job(2)["losses"], job(2)["reason"]) == ("queued", 1, "worker gone was lost")


def is_all_done() -> bool:
    done = cp("jobs", "--json")
    return done.returncode == 0 and not done.stdout


def test_where_only_cron_is_the_controller_all_can_be_asked_and_ended(pool: Path, tmp_path: Path) -> None:
    first = cp(
        "submit", *PLAIN, "--out", "file", "--", "sh", "-c", "head -c 300000 /dev/zero | tee file; exit 3"
    ).stdout.strip()
    wait_until(lambda: ok("tick") == "" and job(first)["state"] == "finished", 30)
    ok("tick")  # what it has written comes after its end
    assert cp("wait", first).returncode == 3 and len(ok("logs", first)) == 300_000
    ok("fetch", first, "got")
    assert (tmp_path / "got" / "file").stat().st_size == 300_000
    (known,) = [json.loads(line) for line in ok("nodes", "--json").splitlines()]
    assert (known["name"], known["state"], known["reason"]) == ("local", "unknown", "no controller runs")
    second = cp("submit", *PLAIN, "--", "sh", "-c", "echo begun; exec sleep 1000").stdout.strip()
    ok("tick")
    assert job(second)["state"] == "running" and ok("logs", second) == "begun\n", "its agent is asked"
    ok("cancel", second, "--grace", "0")
    assert job(second)["state"] == "cancelled"
    third = cp("submit", *PLAIN, "--", "sleep", "1000").stdout.strip()
    ok("tick")
    assert agents(tmp_path)
    ok("down", "--grace", "0")
    assert job(third)["state"] == "cancelled"
    wait_until(lambda: not agents(tmp_path))


def test_a_machine_that_was_launched_is_drained_as_any_worker_is(pool: Path) -> None:
    row = {
        "name": "m-1",
        "kind": "k",
        "zone": "z",
        "price": 1.0,
        "state": "ready",
        "address": "x@127.0.0.1:1",
        "intended_s": 1.0,
    }
    with state.locked(str(pool)):
        held = state.State(str(pool))
        held.put_machine(row)
        held.commit()
        ok_now = held.set_worker_state("m-1", "drain")
        held.commit()
        assert ok_now and held.meta("state.m-1") == "drain" and not held.set_worker_state("m-2", "drain")
        held.close()
    ok("node", "resume", "m-1")
    assert cp("node", "drain", "m-2").returncode == 4


def test_a_controller_that_is_killed_at_each_durable_step_loses_and_doubles_nothing(pool: Path, tmp_path: Path) -> None:
    """Before what was decided is on disk, and after that but before anybody is told."""
    count = steps = 0
    for step in range(1, 9):
        for when in ("before", "after"):
            numbers = f"{count}-{count + 3}"
            count += 4
            ok(
                "submit",
                *PLAIN,
                "--cpus",
                "0.4",
                "--array",
                numbers,
                "--",
                "sh",
                "-c",
                f"echo $CPOOL_INDEX >> {tmp_path}/ran; exit $((CPOOL_INDEX % 3))",
            )
            with subprocess.Popen([sys.executable, "-c", DYING, str(step), when]) as dying:
                wait_until(lambda dying=dying: dying.poll() is not None or is_all_done(), 60)
                steps += dying.poll() == -signal.SIGKILL
                dying.kill()  # if there are not so many steps
    with serving():
        assert cp("wait", *range(1, count + 1)).returncode == (count - 1) % 3
        found = [json.loads(line) for line in ok("jobs", "-a", "--json").splitlines()]
        ok("down")
    assert steps >= 10, steps
    assert sorted(map(int, (tmp_path / "ran").read_text().split())) == list(range(count)), "each ran once"
    assert all((one["state"], one["code"], one["attempt"]) == ("finished", one["spec"]["index"] % 3, 1) for one in found)
    print(f"killed at {steps} durable steps, {count} jobs")


def test_an_agent_that_is_killed_leaves_its_jobs_to_the_next(controller: object, tmp_path: Path) -> None:
    script = f"echo begun; until test -f {tmp_path}/go; do sleep 0.01; done; exit 5"
    waiting = ok("submit", *PLAIN, "--cpus", "0.5", "--", "sh", "-c", script).strip()
    wait_until(lambda: job(waiting)["state"] == "running")
    for number in range(3):
        kill_all(agents(tmp_path))
        wait_until(lambda: len(agents(tmp_path)) >= 2 and cp("nodes", "--json").stdout.count('"ready"'))
        assert cp("wait", ok("submit", *PLAIN, "--cpus", "0.5", "--", "true").strip()).returncode == 0, number
    (tmp_path / "go").touch()
    assert cp("wait", waiting).returncode == 5 and job(waiting)["attempt"] == 1
    assert cp("logs", waiting).stdout == "begun\n"


def test_what_ran_when_a_worker_was_booted_is_done_again(controller: object, tmp_path: Path) -> None:
    """All of its processes have gone, and it is back before it was lost."""
    number = ok("submit", *PLAIN, "--", "sh", "-c", "test $CPOOL_ATTEMPT = 2 || exec sleep 1000").strip()
    once = ok("submit", *PLAIN, "--no-requeue", "--", "sleep", "1000").strip()
    wait_until(lambda: job(number)["state"] == job(once)["state"] == "running")
    places = [next((tmp_path / "pool" / "agents").glob(f"*/jobs/{one}.1/job.json")) for one in (number, once)]
    shells = [json.loads(place.read_text())["pid"] for place in places]
    for pid in agents(tmp_path):
        os.kill(pid, signal.SIGKILL)
    for pid in shells:
        os.killpg(pid, signal.SIGKILL)
    assert cp("wait", number).returncode == 0 and cp("wait", once).returncode == 1
    assert (job(number)["attempt"], job(number)["losses"], job(once)["code"]) == (2, 1, -1)


def test_a_process_of_another_boot_is_none_of_a_job(tmp_path: Path) -> None:
    one = processes.Job(str(tmp_path / "p.w" / "jobs" / "1.1"), {"id": 1, "attempt": 1, "pid": os.getpid()})
    one.asked |= {"pid_start": machine_of.start_time(os.getpid()), "boot_id": machine_of.boot_id()}
    assert one.is_alive()
    one.asked["boot_id"] = "another"
    assert not one.is_alive()


def test_an_agent_of_another_build_becomes_the_controllers_and_its_jobs_notice_nothing(pool: Path, tmp_path: Path) -> None:
    older = "from pool import program, client; program.MODULES = (*program.MODULES, 'drawing'); import os; client.serve(os.environ['CAFS_POOL'])"
    with subprocess.Popen([sys.executable, "-c", older]) as first:
        wait_until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
        script = f"echo $$; until test -f {tmp_path}/go; do sleep 0.05; done; head -c 3000000 /dev/zero | sha256sum >/dev/null; exit 3"
        number = ok("submit", *PLAIN, "--", "sh", "-c", script).strip()
        wait_until(lambda: job(number)["state"] == "running")
        carrier = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])
        (pid,) = [one for one in agents(tmp_path) if one != carrier]
        first.kill()
    with serving():
        wait_until(lambda: b"daemon" in Path(f"/proc/{pid}/cmdline").read_bytes())  # b"" for a moment, in execve(2)
        wait_until(lambda: '"state": "ready"' in cp("nodes", "--json").stdout, 40)
        (tmp_path / "go").touch()
        assert cp("wait", number).returncode == 3
        found = job(number)
        assert (found["attempt"], found["losses"]) == (1, 0) and found["usage"]["cpu_s"] > 0  # type: ignore[index]
        ok("down")


def test_an_agent_obeys_the_latest_controller_alone(pool: Path, tmp_path: Path) -> None:
    def hello(link: socket.socket, epoch: int) -> dict[str, object]:
        link.sendall(frames.message("hello", protocol=frames.PROTOCOL, pool="p" * 16, worker="local", epoch=epoch))
        reader = frames.Reader()
        while True:
            for _, found in reader.feed(link.recv(1 << 16)):
                return dict(found)

    first, second, third = (links.open_link(address.Pool(str(pool), "p" * 16), "local", address.LOCAL) for _ in range(3))
    assert hello(first, 7)["is"] == "hello"
    assert hello(second, 8)["is"] == "hello"
    first.settimeout(10 * SLOW)
    assert b"".join(iter(lambda: first.recv(1 << 16), b""))[:0] == b"", "the older one was let go"
    assert hello(third, 7) == {"is": "fenced", "epoch": 8, "protocol": 1}


def test_map_is_a_filter(pool: Path) -> None:
    numbers = "".join(f"{n}\n" for n in range(200))
    assert ok("map", "-k", *PLAIN, "--cpus", "0.1", "--", "echo", input=numbers) == numbers
    assert sorted(ok("map", *PLAIN, "--cpus", "0.1", "--", "echo", input=numbers).split()) == sorted(numbers.split())
    assert (
        ok("map", "-k", "-0", "-n", "2", "--tag", *PLAIN, "--", "printf", "%s,%s\n", input="a b\0c\0d\0")
        == "a b c\ta b,c\nd\td,\n"
    )
    assert (
        ok("map", "-k", *PLAIN, "--", "sh", "-c", "echo {} {.} {/} {//} {/.} {#}", input="d/f.txt\n")
        == "d/f.txt d/f f.txt d f 1\n"
    )
    failed = cp("map", *PLAIN, "--cpus", "0.1", "--", "sh", "-c", "exit {}", input="0\n1\n2\n0\n")
    assert failed.returncode == 2, "as many as have failed"
    assert ok("map", "--dry-run", *PLAIN, "--", "rm", "{}", input="a b\n") == "rm 'a b'\n"
    assert ok("map", *PLAIN, "--", "cat", input="") == ""


def test_results_of_a_map_do_not_wait_for_the_next_argument(controller: object) -> None:
    with subprocess.Popen(
        [BIN / "cpool", "map", *PLAIN, "echo", "{}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as mapping:
        assert mapping.stdin and mapping.stdout
        for word in ("one", "two"):
            mapping.stdin.write(f"{word}\n")
            mapping.stdin.flush()
            assert mapping.stdout.readline() == f"{word}\n"
        mapping.stdin.close()
        assert mapping.wait(20 * SLOW) == 0


def test_a_map_halts_while_it_waits_for_arguments(controller: object) -> None:
    with subprocess.Popen([BIN / "cpool", "map", *PLAIN, "--halt", "1", "false"], stdin=subprocess.PIPE) as mapping:
        assert mapping.stdin
        mapping.stdin.write(b"x\n")
        mapping.stdin.flush()
        assert mapping.wait(20 * SLOW) == 1


@given(st.binary(max_size=60), st.lists(st.integers(1, 9), max_size=20), st.integers(1, 3))
def test_arguments_are_the_lines_of_the_input_however_they_come(data: bytes, sizes: list[int], size: int) -> None:
    from pool.arguments import Arguments

    class Pieces(io.BytesIO):
        def read1(self, most: int = -1) -> bytes:
            return self.read(sizes.pop() if sizes else most)

    lines = [os.fsdecode(line) for line in (data.removesuffix(b"\n").split(b"\n") if data else [])]
    wanted = [lines[at : at + size] for at in range(0, len(lines), size)]
    assert list(Arguments(Pieces(data), b"\n", size)) == wanted


def test_a_job_after_very_many_is_looked_at_once_and_named_in_short(pool: Path) -> None:
    from pool.turns import Turns

    known = state.State(str(pool))
    after = [known.submit(specs.check({"command": ["true"]})) for _ in range(300)]
    waiting = known.job(known.submit(specs.check({"command": ["true"], "after": after})))
    turns = Turns(known, {job.id: job for job in known.open_jobs()})
    assert turns.waits(waiting, {}) and turns.failed_before(waiting) == 0
    assert turns.why_not(waiting).endswith(f"{after[9]} and 290 others")
    for number in after[:150]:
        job = turns._open.pop(number)  # type: ignore[attr-defined]
        known.change(job, state=state.FINISHED, code=0)
        turns.forget(job)
    assert turns.waits(waiting, {}) and turns._reached[waiting.id] == 150
    failed = turns._open.pop(after[200])  # type: ignore[attr-defined]
    known.change(failed, state=state.FINISHED, code=1)
    turns.forget(failed)
    assert turns.failed_before(waiting) == after[200]
    known.commit()
    known.close()


def test_map_takes_arguments_from_its_command_line_and_keeps_results(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("x\ny\n")
    assert ok("map", "-k", *PLAIN, "echo", "{2}{1}", ":::", "a", "b", "::::", "list") == "xa\nya\nxb\nyb\n"
    assert ok("map", "-k", "-n", "2", *PLAIN, "--", "echo", ":::", "a", "b", "c") == "a b\nc\n"
    done = cp("map", *PLAIN, "--eta", "--results", "kept", "--", "sh", "-c", "echo {}; echo err >&2", ":::", "a/b", "..", "c")
    assert done.returncode == 0 and re.search(r"ETA: 0s Left: 0 AVG: [0-9.]+s\n", done.stderr), done.stderr
    found = {str(one.relative_to(tmp_path / "kept")): one.read_text() for one in (tmp_path / "kept").rglob("std*")}
    assert found == {f"1/{name}/{what}": text for name, out in ((r"a\zb", "a/b\n"), (r"\__", "..\n"), ("c", "c\n")) for what, text in (("stdout", out), ("stderr", "err\n"))}  # fmt: skip
    assert cp("map", *PLAIN, "-n", "2", "true", ":::", "a", ":::", "b").returncode == 2
    assert cp("map", *PLAIN, ":::", "a").returncode == 2 and cp("map", *PLAIN, "true", "::::", "absent").returncode == 4


def test_files_go_to_the_jobs_of_a_map_and_come_back(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "clean.sh").write_text("tr a-z A-Z <$1 >$2")
    (tmp_path / "d").mkdir()
    for name in ("x", "y"):
        (tmp_path / "d" / f"{name}.csv").write_text(name * 3)
    words = ("--in", "clean.sh", "--in", "{}", "--out", "{.}.out", "--", "sh", "clean.sh", "{}", "{.}.out")
    ok("map", *PLAIN, *words, input="d/x.csv\nd/y.csv\n")
    assert [(tmp_path / "d" / f"{name}.out").read_text() for name in ("x", "y")] == ["XXX", "YYY"]
    absent = cp("map", *PLAIN, "--out", "none", "--", "true", input="1\n")
    assert absent.returncode == 3 and "has left no 'none'" in absent.stderr


def test_the_manual_gives_each_verb_the_options_that_it_has() -> None:
    from cli import cpool

    text = (Path(__file__).parent.parent / "man" / "cpool.1").read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n.SH ")}
    for verb in ("submit", "map"):
        said = re.findall(r"^\.B (-.*)$", sections["JOB OPTIONS"] + sections[f"OPTIONS OF {verb.upper()}"], re.M)
        told = {word for line in said for word in re.findall(r"(?<![\w-])--?[\w-]+", line)}
        options = {word for one in cpool.main.commands[verb].params for word in one.opts if word.startswith("-")}
        assert told == options, verb


def test_a_map_halts_also_when_all_arguments_were_taken(pool: Path, tmp_path: Path) -> None:
    done = cp(
        "map", *PLAIN, "--cpus", "1", "--halt", "1", "--joblog", "log", "--", "sh", "-c", "echo >>ran; false", input="1\n" * 40
    )
    many = len((tmp_path / "ran").read_text())
    assert 1 <= many < 20 and 1 <= done.returncode <= many
    assert len((tmp_path / "log").read_text().splitlines()) <= 1 + many, "what has not begun is in no job log"


@pytest.mark.parametrize("how", ["signal", "pipe", "kill", "controller"])
def test_what_a_map_has_not_begun_when_it_ends_does_not_run(pool: Path, tmp_path: Path, how: str) -> None:
    command = [BIN / "cpool", "map", *PLAIN, "--cpus", "1", "--", "sh", "-c", "echo >>ran; sleep 0.2; echo"]
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serving()) if how in ("kill", "controller") else None
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
            assert one.stdin and one.stdout and one.stderr
            one.stdin.write(b"1\n" * 60)
            one.stdin.close()
            os.read(one.stdout.fileno(), 1)
            if how == "pipe":
                one.stdout.close()
            elif how == "controller":
                assert served
                served.kill()
            else:
                one.send_signal(signal.SIGTERM if how == "signal" else signal.SIGKILL)
            assert one.wait(20) == {"signal": 143, "pipe": 141, "kill": -9, "controller": 7}[how]
            said = one.stderr.read().decode()
        if how in ("signal", "pipe"):
            assert "until cpool cancel" in said
        if how == "kill":
            wait_until(lambda: "queued" not in ok("jobs"))
    with serving():
        time.sleep(2)
        states = [json.loads(line)["state"] for line in ok("jobs", "-a", "--json").splitlines()]
        assert states.count("cancelled") > 30 and len((tmp_path / "ran").read_text()) < 30
        ok("down")


def test_the_programs_run_that_were_named_and_no_builtins_of_a_shell(pool: Path) -> None:
    assert ok("map", *PLAIN, "echo", input="C:\\new\\table\n") == "C:\\new\\table\n"
    assert cp("map", *PLAIN, "--joblog", "log", "exit", input="3\n").returncode == 1
    assert (pool.parent / "log").read_text().splitlines()[1].split("\t")[6] == "127", "there is no program of that name"
    odd = subprocess.run(["/bin/kill", "-l", "9"], capture_output=True, text=True, check=True).stdout
    assert ok("map", *PLAIN, "kill", "-l", input="9\n") == odd


def test_map_goes_on_where_its_log_ends(pool: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    once = ("map", *PLAIN, "--joblog", log)
    first = cp(*once, "--halt", "1", "--", "sh", "-c", f"echo {{}} >> {tmp_path}/ran; test {{}} != 3", input="1\n2\n3\n")
    assert first.returncode == 1
    rows = log.read_text().splitlines()
    assert rows[0].split("\t")[:4] == ["Seq", "Host", "Starttime", "JobRuntime"] and len(rows) == 4
    assert ok(*once, "--resume", "--", "echo", input="1\n2\n3\n4\n") == "4\n"
    assert ok(*once, "--resume-failed", "-k", "--", "echo", input="1\n2\n3\n4\n5\n") == "3\n5\n"
    assert cp("map", *PLAIN, "--resume", "--", "true", input="1\n").returncode == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("submit", "--", "true"), 2, "one of --image IMAGE and --no-container"),
        (("submit", *PLAIN, "--cpus", "-1", "--", "true"), 2, "--cpus"),
        (("submit", *PLAIN, "--array", "5-3", "--", "true"), 2, "is not N-M"),
        (("submit", *PLAIN, "--tiemout", "5", "--", "true"), 2, "--timeout"),
        (("submit", *PLAIN, "-e", "A.B=c", "--", "true"), 2, "'A.B' is not the name of a variable"),
        (("submit", *PLAIN, "-x", "--", "true"), 2, "no such option '-x'"),
        (("map", "-v", "/in:/in", *PLAIN, "true", ":::", "a"), 2, "no such option '-v'"),
        (("exec", "--root", "1", "true"), 2, "no such option '--root'"),
        (("submit", *PLAIN, "--in", "a", "--in", "b:a", "--", "true"), 2, "two files of a job are called 'a'"),
        (("job", "99"), 4, "no job 99"),
        (("host", "rm", "none"), 4, "no host"),
        (("host", "add", "x/y"), 2, "not a name"),
        (("host", "add", "x"), 2, "where is"),
        (("node", "drain", "none"), 4, "no worker"),
        (("top", "--once"), 7, "no controller runs"),
        (("init",), 6, "there is a pool"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    pool: Path, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    done = cp(*words)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_state_of_another_version_or_a_damaged_one_is_refused(pool: Path) -> None:
    path = pool / "state.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + (99).to_bytes(4, "big") + whole[64:])
    done = cp("jobs")
    assert done.returncode == 5 and "has version 99" in done.stderr, done.stderr
    path.write_bytes(b"no database" * 1000)
    assert cp("jobs").returncode == 5
    (pool / "pool.toml").write_text("[pool]\nstore = 's'\nodd = 1\n")
    done = cp("serve")
    assert done.returncode == 5 and "pool.toml:3: [pool] has no 'odd'" in done.stderr


@pytest.mark.needs("root")
def test_what_a_full_disk_keeps_from_starting_is_not_begun_and_begins_when_there_is_room(pool: Path, tmp_path: Path) -> None:
    """Whichever file of a job it is for which there is no room."""
    place = pool / "agents"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        with serving_with("from pool import workers; workers._ASIDE_MAX_S = 0.2"):
            assert cp("wait", ok("submit", *PLAIN, "--", "true").strip()).returncode == 0
            wait_until(lambda: not os.listdir(next(place.glob("*/jobs"))))
            status = os.statvfs(place)
            used, refused = status.f_files - status.f_ffree, 0
            for more in range(7):
                subprocess.run(["mount", "-o", f"remount,nr_inodes={used + more}", place], check=True)
                number = ok("submit", *PLAIN, "--", "sh", "-c", f"echo $CPOOL_JOB >>{tmp_path}/ran; exit 3").strip()
                wait_until(lambda number=number: job(number)["state"] == "finished" or int(str(job(number)["attempt"])) > 1)
                if job(number)["state"] == "finished":
                    assert job(number)["code"] == 3
                    continue
                refused += 1
                assert job(number)["reason"] == "worker local could not start it: No space left on device"
                assert "cannot start jobs: No space left" in ok("nodes")
                ok("cancel", number)
                assert cp("wait", number).returncode == 143 and not (tmp_path / "ran").exists()
                wait_until(lambda: not os.listdir(next(place.glob("*/jobs"))))
            assert refused >= 4
            subprocess.run(["mount", "-o", f"remount,nr_inodes={used}", place], check=True)
            number = ok("submit", *PLAIN, "--", "sh", "-c", "exit 4").strip()
            wait_until(lambda: int(str(job(number)["attempt"])) > 1)
            subprocess.run(["mount", "-o", "remount,nr_inodes=10000", place], check=True)
            assert cp("wait", number).returncode == 4
            ok("down")
    finally:
        wait_until(lambda: not agents(tmp_path), 20)
        subprocess.run(["umount", "-l", place], check=True)


# Other machines.


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ports of two sshd on loopback, each with a host key and a HOME of its own; the caller's key opens them."""
    os.makedirs("/run/sshd", exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    subprocess.run([*keygen, "-f", tmp_path / "key"], check=True)
    ports, running = [], []
    for number in range(2):
        place = tmp_path / f"server{number}"
        place.mkdir(mode=0o700)
        subprocess.run([*keygen, "-f", place / "host"], check=True)
        ports.append(free_port())
        (place / "config").write_text(
            f"Port {ports[-1]}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {tmp_path}/key.pub\nStrictModes no\n"
            f"PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nSetEnv HOME={place} "
            f"CAFS_CACHE={place}/cache CAFS_RUN={place}/run CAFS_STATE={place}/state CAFS_STORE={place}/none\n"
        )
        running.append(subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place / "config"], stderr=subprocess.DEVNULL))
    for port in ports:
        wait_until(lambda port=port: not socket.socket().connect_ex(("127.0.0.1", port)))
    yield ports
    for one in running:
        one.terminate()
        one.wait()


@pytest.mark.needs("root", "sshd", "ssh-keygen")
def test_jobs_go_to_machines_that_are_reached_by_ssh(servers: list[int], pool: Path, tmp_path: Path) -> None:
    for number, port in enumerate(servers):
        shown = cp("host", "add", f"w{number}", f"root@127.0.0.1:{port}", "--identity", tmp_path / "key", "--yes")
        public = (tmp_path / f"server{number}" / "host.pub").read_text()
        digest = subprocess.run(
            ["ssh-keygen", "-lf", "-"], input=public, capture_output=True, text=True, check=True
        ).stdout.split()[1]
        assert shown.returncode == 0 and digest in shown.stderr, shown.stderr
    assert ok("host", "ls", "-q").split() == ["w0", "w1"]
    meet = "until test -f at.w0 && test -f at.w1; do sleep 0.05; done"
    with serving():
        wait_until(lambda: cp("nodes", "--json").stdout.count('"state": "ready"') == 2, 40)
        said = ok(
            "map",
            *PLAIN,
            "--cpus",
            len(os.sched_getaffinity(0)),  # each has a worker for itself, so that the next goes to the other
            "--workdir",
            "/",
            "--",
            "sh",
            "-c",
            f"cd {tmp_path}; touch at.$CPOOL_WORKER; {meet}; echo $CPOOL_WORKER $HOME",
            input="1\n" * 8,
        )
        assert set(said.splitlines()) == {f"w{n} {tmp_path}/server{n}" for n in range(2)}
        number = ok("submit", *PLAIN, "--workdir", "/", "-e", "A=b", "--exclude", "w1", "--", "sleep", "60").strip()
        wait_until(lambda: job(number)["state"] == "running")
        beside = cp("exec", "-i", number, "--", "sh", "-c", "cat; echo $A $CPOOL_WORKER; echo err >&2; exit 4", input="in\n")
        assert (beside.returncode, beside.stdout, beside.stderr) == (4, "in\nb w0\n", "err\n")
        main, other = os.openpty()
        with subprocess.Popen([BIN / "cpool", "exec", "-it", number, "tty"], stdin=other, stdout=other) as child:
            assert child.wait(30 * SLOW) == 0
        assert b"/dev/pts/" in os.read(main, 4096)
        ok("cancel", number, "--grace", "0")
        ok("node", "drain", "w0")
        said = ok("map", *PLAIN, "--workdir", "/", "--", "sh", "-c", "echo $CPOOL_WORKER", input="1\n" * 3)
        assert set(said.split()) == {"w1"}
        ok("host", "rm", "w1")
        assert ok("host", "ls", "-q").split() == ["w0"]
        wait_until(lambda: not list((tmp_path / "server1" / ".cache" / "cafs-agent").iterdir()))
        ok("down")
    wait_until(lambda: not agents(tmp_path))


@pytest.mark.needs("root", "sshd", "ssh-keygen")
def test_what_a_login_shell_says_is_not_what_a_command_says(servers: list[int], pool: Path, tmp_path: Path) -> None:
    from pool import ssh

    (tmp_path / "server0" / ".bashrc").write_text("echo you have mail; echo there is news >&2\n")
    address = f"root@127.0.0.1:{servers[0]}"
    ok("host", "add", "w0", address, "--identity", tmp_path / "key", "--yes")
    with ssh.connected(str(pool), "w0", f"{address}?{tmp_path}/key") as there:
        assert there.run("cat; echo oh >&2; exit 3", b"in\n") == (3, "in\n", "oh\n")
    with serving():
        number = ok("submit", *PLAIN, "--workdir", "/", "--", "sleep", "60").strip()
        wait_until(lambda: job(number)["state"] == "running")
        beside = cp("exec", "-i", number, "--", "sh", "-c", "cat; echo err >&2", input="in\n")
        assert (beside.stdout, beside.stderr) == ("in\n", "err\n")
        ok("down", "--grace", "0")


@pytest.mark.needs("root", "sshd", "ssh-keygen")
def test_another_host_key_and_no_host_key_are_refused(servers: list[int], pool: Path, tmp_path: Path) -> None:
    address = f"root@127.0.0.1:{servers[0]}"
    refused = cp("host", "add", "w0", address, "--identity", tmp_path / "key", stdin=subprocess.DEVNULL)
    assert refused.returncode == 1 and "was not accepted" in refused.stderr and ok("host", "ls").count("\n") == 1
    ok("host", "add", "w0", address, "--identity", tmp_path / "key", "--yes")
    other = (tmp_path / "server1" / "host.pub").read_text().split()
    (pool / "known_hosts").write_text(f"w0 {other[0]} {other[1]}\n")
    with subprocess.Popen([BIN / "cpool", "serve"]) as controller:
        wait_until(lambda: "host key of 'w0' has changed" in cp("nodes").stdout)
        (pool / "known_hosts").write_text("")
        wait_until(lambda: "no host key of 'w0' is known" in cp("nodes").stdout)
        controller.terminate()
    assert not list((tmp_path / "server0").glob(".cache")), "nothing was done there"


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_a_job_runs_in_an_image(image: Path, controller: object) -> None:
    number = ok(
        "submit",
        "--image",
        "b:1",
        "-e",
        "A=1",
        "--memory",
        "64M",
        "--",
        "sh",
        "-c",
        "echo $A $CPOOL_JOB; ls /bin/busybox; exit 4",
    ).strip()
    assert cp("wait", number).returncode == 4
    assert cp("logs", number).stdout == f"1 {number}\n/bin/busybox\n"
    assert cp("submit", "--image", "absent:1", "--", "true").returncode == 4


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_variables_of_a_job_in_an_image_are_its_containers_and_not_of_the_programs_that_start_it(
    image: Path, controller: object, tmp_path: Path
) -> None:
    """Else a tenant who may run images alone runs a program of theirs as the owner of the pool."""
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'entered')!r}, 'w')")
    words = ("--image", "b:1", "-e", f"PYTHONPATH={tmp_path}", "-e", "LINES=a\nb")
    number = ok("submit", *words, "--", "sh", "-c", 'echo "$PYTHONPATH $LINES"').strip()
    assert cp("wait", number).returncode == 0
    assert cp("logs", number).stdout == f"{tmp_path} a\nb\n"
    assert not (tmp_path / "entered").exists()


@pytest.mark.needs("root", "fuse", "runc", "busybox", "sshd", "ssh-keygen")
def test_a_worker_that_has_nothing_but_ssh_and_python_runs_images_of_a_store_that_is_read_over_ssh(
    image: Path, servers: list[int], pool: Path, tmp_path: Path
) -> None:
    """What runs them is brought for the first such job; what they read is fetched when they read it."""
    make_rootfs(tmp_path / "tree")
    (tmp_path / "tree" / "unread").write_bytes(os.urandom(3_000_000))
    subprocess.run([BIN / "cafs-index", "create", "-q", tmp_path / "tree", "-t", "far:1"], check=True)
    ok("host", "add", "w0", f"root@127.0.0.1:{servers[0]}", "--identity", tmp_path / "key", "--yes")
    place = tmp_path / "server0"
    with serving():
        assert '"images": "no crun"' in ok("nodes", "--json")
        number = ok(
            "submit", "--image", "far:1", "--", "sh", "-c", "echo $CPOOL_WORKER; sha256sum /bin/busybox; exit 4"
        ).strip()
        assert cp("wait", number, timeout=90).returncode == 4, cp("logs", number).stderr
        digest = hashlib.sha256((tmp_path / "tree" / "bin" / "busybox").read_bytes()).hexdigest()
        assert ok("logs", number) == f"w0\n{digest}  /bin/busybox\n"
        assert (place / ".cache" / "cafs-toolkit" / "current" / "bin" / "cafs-run").exists() and not (place / "none").exists()
        sizes = [one.stat().st_size for one in (place / "cache" / "data").rglob("*") if one.is_file()]
        assert (tmp_path / "tree" / "bin" / "busybox").stat().st_size in sizes and 3_000_000 not in sizes
        assert ok("host", "setup", "-q", "w0") == ""
        numbers = [ok("submit", "--image", "far:1", "--cpus", "0.5", "--", "true").strip() for _ in range(4)]
        assert cp("wait", *numbers, timeout=60).returncode == 0
        ok("down")
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if f"{tmp_path}/" in line:
            subprocess.run(["umount", "-l", line.split(" ")[4]], check=False)


# Parts.


def test_what_an_agent_says_that_does_not_begin_is_said() -> None:
    with pytest.raises(RemoteError, match="the agent has not begun: ImportError: no module named zlib"):
        address.skip_greeting(lambda _: b"", lambda _: True, errors=lambda: b"Traceback\nImportError: no module named zlib\n")


@given(
    st.lists(st.one_of(st.dictionaries(st.text(), st.integers()), st.binary(max_size=100)), max_size=8),
    st.lists(st.integers(1, 9), max_size=50),
)
def test_frames_come_back_however_they_are_cut(sent: list[object], cuts: list[int]) -> None:
    data = b"".join(
        frames.answer(n, n + 9, one) if isinstance(one, bytes) else frames.message("x", value=one) for n, one in enumerate(sent)
    )
    reader, found = frames.Reader(), []
    for size in [*cuts, len(data) + 1]:
        piece, data = data[:size], data[size:]
        found += list(reader.feed(piece))
    wanted = [(2, (n, n + 9, one)) if isinstance(one, bytes) else (1, {"is": "x", "value": one}) for n, one in enumerate(sent)]
    assert found == wanted


@given(st.binary(min_size=5, max_size=40))
def test_bytes_that_are_no_frame_are_an_error_and_nothing_else(data: bytes) -> None:
    try:
        list(frames.Reader().feed(data))
    except frames.FrameError:
        pass


def machine(name: str, cpus: float, gpus: int = 0, **more: object) -> Worker:
    return Worker(name, cpus, 64 << 30, gpus, cpus, 64 << 30, gpus, **more)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 2)), max_size=6),
    st.lists(st.tuples(st.sampled_from([0.5, 1, 2, 7, 16]), st.integers(0, 40), st.integers(0, 2)), max_size=60),
)
def test_nothing_is_given_that_is_not_there(workers: list[tuple[int, int]], needs: list[tuple[float, int, int]]) -> None:
    placement = Placement([machine(str(n), cpus, gpus) for n, (cpus, gpus) in enumerate(workers)])
    for cpus, memory, gpus in needs:
        need = Need(cpus, memory << 30, gpus)
        could = [one.name for one in placement.workers if one.fits(need) and not one.is_kept]
        found = placement.choose(need)
        assert (found is not None) == bool(could), "what fits somewhere is placed"
    assert all(one.cpus > -1e-6 and one.memory >= 0 and one.gpus >= 0 for one in placement.workers)


def test_jobs_fill_what_is_nearly_full_and_keep_off_gpus() -> None:
    small, large, gpu = machine("small", 2), machine("large", 16), machine("gpu", 4, 4)
    placement = Placement([large, gpu, small])
    names = [found.name for _ in range(3) if (found := placement.choose(Need(1.0)))]
    assert names == ["small", "small", "large"]
    assert placement.choose(Need(1.0, gpus=1)) is gpu
    plain = machine("plain", 8)
    assert Placement([*(machine(f"g{n}", 4, 1) for n in range(100)), plain]).choose(Need(1.0)) is plain


def test_small_jobs_pass_a_large_one_for_a_time_only() -> None:
    def turn(waited_s: float) -> list[str | None]:
        one = machine("w", 4)
        one.take(Need(2.0))
        placement = Placement([one])
        chosen = [placement.choose(Need(4.0), waited_s), placement.choose(Need(1.0), 0)]
        return [found.name if found else None for found in chosen]

    assert turn(1) == [None, "w"] and turn(100) == [None, None]
    assert why_not(Need(1.0), [machine("w", 4, reason="is lost")]) == "no worker is ready: w is lost"
    assert why_not(Need(9.0), [machine("w", 4)]) == "no worker fits: needs 9 CPUs, the largest has 4"


def test_a_job_log_of_another_run_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("head\n1\tw\t0\t0\t0\t0\t0\t0\ttrue\n2\tw\t0\t0\t0\t0\t1\t0\tfalse\n3\tw\t0\n")
    assert mapping.already_done(str(tmp_path / "log"), failed_too=True) == {1, 2}
    assert mapping.already_done(str(tmp_path / "log"), failed_too=False) == {1}
    assert mapping.already_done(str(tmp_path / "none"), failed_too=True) == set()


def test_what_no_agent_should_say_ends_its_connection_and_nothing_else(pool: Path) -> None:
    from pool.controller import Controller

    good = {
        "cpus": 1,
        "memory": 1,
        "free_memory": 1,
        "free_disk": 1,
        "load": 0.1,
        "gpus": 0,
        "running": 0,
        "images": "",
        "arch": "x",
    }
    end = {"is": "done", "id": 1, "attempt": 1, "code": 0, "wall_s": 1, "cpu_s": 1, "memory": 1, "out": "", "err": ""}
    said: list[dict[str, object]] = [
        {**end, name: value} for name in ("id", "attempt", "code") for value in (math.inf, 1 << 70, -9, "x", None, 1.5)
    ]
    said += [
        {**end, "out": "%%%"},
        {"is": "hello", "jobs": [{"id": math.inf, "attempt": 1, "ended": True}]},
        {"is": "hello", "jobs": 7},
    ]
    said += [
        {"is": "report", **good, name: value}
        for name in ("cpus", "free_memory")
        for value in (math.inf, -1, 10**400, "x", None)
    ]
    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        for one in said:
            remote = held.remotes["local"]
            ours, theirs = socket.socketpair()
            remote.connected(ours)
            held.selector.register(ours, selectors.EVENT_READ, lambda events, remote=remote: held.wires._hear(remote, events))
            number = held.state.submit(specs.check({"command": ["true"]}))
            held.state.change(held.state.job(number), state=state.FINISHED, worker="local", attempt=1)
            theirs.sendall(frames.message(str(one.pop("is")), **one))
            held.turn(1)
            assert remote.link is None, one
            theirs.close()
        held.state.close()


def test_outputs_that_another_worker_sends_are_refused(pool: Path) -> None:
    from pool.controller import Controller

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        held.state.put_host("other", "x@127.0.0.1:1")
        held.state.put_host("local", "")
        held.look_at_hosts()
        number = held.state.submit(specs.check({"command": ["true"]}))
        held.state.change(held.state.job(number), state=state.FINISHED, worker="local", attempt=1, code=0)
        end = {
            "is": "done",
            "id": number,
            "attempt": 1,
            "code": 0,
            "wall_s": 1,
            "cpu_s": 1,
            "memory": 1,
            "out": "Zm9yZ2Vk",
            "err": "",
        }
        held._heed(held.remotes["other"], dict(end))
        assert held.state.output(number) is None
        held._heed(held.remotes["local"], {**end, "out": "dHJ1ZQ=="})
        assert held.state.output(number) == (b"true", b"")
        with pytest.raises(ValueError, match="not asked"):
            held.outputs.answered(held.remotes["other"], 1, 0, b"")
        held.state.commit()
        held.state.close()


def test_a_host_that_is_removed_or_moved_takes_no_controller_with_it(pool: Path) -> None:
    cp("submit", *PLAIN, "--no-requeue", "--", "true")
    cp("submit", *PLAIN, "--", "true")
    with state.locked(str(pool)):
        held = state.State(str(pool))
        for number in (1, 2):
            held.change(held.job(number), state=state.RUNNING, worker="gone", attempt=1)
        held.commit()
        held.close()
    ok("tick")
    assert (job(1)["state"], job(1)["code"], job(1)["reason"]) == ("finished", -1, "its worker is no host of the pool any more")
    wait_until(lambda: ok("tick") == "" and job(2)["state"] == "finished")
    assert cp("submit", *PLAIN, "--after", "99", "--", "true").returncode == 4, "also without a controller"


def test_the_queue_is_put_in_order_once_a_turn_however_many_leave_it_or_come_back(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pool.controller import Controller
    from pool.tenants import Tenants

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        for number in range(300):
            one = held.state.job(held.state.submit(specs.check({"command": ["true"], "cpus": 1})))
            held.add(one)
            if number < 100:
                held.state.change(one, state=state.RUNNING, worker="local", attempt=1)
                held.remotes["local"].took(one)
        held.turn(0)
        sorted_so_often, in_order = [0], Tenants.in_order

        def counted(*given: object) -> list[state.Job]:
            sorted_so_often[0] += 1
            return in_order(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(Tenants, "in_order", counted)
        for one in list(held.jobs.values())[100:200]:
            held.cancel(one, 0)
        for one in list(held.jobs.values())[:100]:
            held.lose(one, "lost")
        held.turn(0)
        assert sorted_so_often[0] <= 2 and [one.id for one in held.waiting.jobs] == [*range(1, 101), *range(201, 301)]
        held.state.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_map_that_is_told_to_end_at_any_moment_ends_and_shows_no_traceback(pool: Path, number: int) -> None:
    command = [BIN / "cpool", "map", *PLAIN, "--cpus", "0.1", "--", "sh", "-c", "echo {}; sleep 1"]
    for moment in range(5):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
            assert one.stdin and one.stdout and one.stderr
            one.stdin.write(b"".join(b"%d\n" % at for at in range(90)))
            one.stdin.close()
            wait_until(lambda: (pool / "lock").exists())
            os.read(one.stdout.fileno(), 1) if moment else None
            time.sleep(0.07 * moment)
            one.send_signal(number)
            assert one.wait(20 * SLOW) == 128 + number and b"Traceback" not in one.stderr.read()


def test_a_controller_that_is_being_started_is_waited_for(pool: Path) -> None:
    for _ in range(4):
        with subprocess.Popen([BIN / "cpool", "serve"], stderr=subprocess.PIPE, text=True) as serve:
            number = ok("submit", *PLAIN, "--", "true").strip()
            assert cp("wait", number).returncode == 0 and serve.poll() is None
            ok("down")
            assert serve.wait(20 * SLOW) == 0
    with state.locked(str(pool)), subprocess.Popen([BIN / "cpool", "serve"]) as serve:
        with pytest.raises(subprocess.TimeoutExpired):
            serve.wait(2)  # a command may have the lock for a moment
        serve.terminate()


def test_a_worker_that_cannot_run_images_or_fails_at_once_leaves_jobs_to_others(pool: Path) -> None:
    from pool.controller import Controller

    report = dict.fromkeys(("free_memory", "free_disk", "load", "gpus", "running", "memory"), 1 << 40)
    end = {"is": "done", "attempt": 1, "wall_s": 0.1, "cpu_s": 0, "memory": 0, "out_size": 0, "err_size": 0, "left_out": {}}
    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        for name in ("bad", "good"):
            held.state.put_host(name, "x@127.0.0.1:1")
        held.look_at_hosts()
        bad, good = (held.remotes[name] for name in ("bad", "good"))
        for remote in (bad, good):
            remote.has_greeted = True
            remote.reported({**report, "cpus": 64, "images": "", "arch": "x"})

        def ended(image: str, code: int, **more: object) -> state.Job:
            job = held.state.job(held.state.submit(specs.check({"command": ["x"], "image": image})))
            held.add(job)
            held.state.change(job, state=state.RUNNING, worker="bad", attempt=1)
            bad.took(job)
            held._heed(bad, {**end, "id": job.id, "code": code, "out": "", "err": "", **more})
            return job

        again = ended("f" * 64, 8, unable="cannot mount without root")
        assert (again.state, bad.free().images, bad.shown()["images"]) == (state.QUEUED, False, "cannot mount without root")
        assert bad.shown()["reason"] == "cannot run images: cannot mount without root"
        assert held.waiting.place().keys() == {"good"}
        assert ended("f" * 64, 8).state == state.FINISHED, "a command may say 8 too"
        well = held.state.job(held.state.submit(specs.check({"command": ["true"]})))
        held.state.change(well, code=0)
        ended("", 1)
        good.has_ended(well, 1.0)  # which is the evidence against the other
        while not bad.is_aside:
            assert ended("", 1).state == state.FINISHED and bad.failed_in_a_row <= 5
        assert bad.shown()["state"] == "failing" and "have failed at once" in bad.shown()["reason"]
        good.failed_in_a_row, bad._aside_until = 5, 0.0
        ended("", 1)
        assert not bad.is_aside, "where all fail it is the jobs"
        held.state.close()


def test_what_crun_cannot_do_is_told_from_what_its_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "p.w" / "jobs" / "1.1"
    place.mkdir(parents=True)
    one = processes.Job(
        str(place), {"id": 1, "attempt": 1, "image": "f" * 64, "cpus": 1, "memory": 1 << 30, "cwd": "", "env": {}}
    )
    one.asked |= {"command": ["true"]}
    for err, code, wanted in (
        ("crun: cannot mount\ncrun: hint: x\n", 8, "cannot mount"),
        ("crun: cannot mount\n", 7, ""),
        ("mine\ncrun: cannot mount\n", 8, ""),
        ("", 8, ""),
    ):
        (place / "err").write_text(err)
        (place / "status").write_text(f"{code}\n")
        one.finish()
        assert one.inability() == wanted, err
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not {"--cpus", "--memory"} & set(one._command()), "limits need root"


def test_two_maps_at_once_share_a_controller(pool: Path, tmp_path: Path) -> None:
    command = [BIN / "cpool", "map", "-k", *PLAIN, "--cpus", "0.1", "--", "sh", "-c", "sleep 0.0{}; echo {}"]
    text = "".join(f"{n}\n" for n in range(10, 60)).encode()
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for one in running:
        assert one.stdin
        one.stdin.write(text)
        one.stdin.close()
        one.stdin = None
    assert [one.communicate(timeout=60 * SLOW)[0] for one in running] == [text] * 3 and not any(
        one.returncode for one in running
    )


def test_a_zombies_late_result_is_refused(pool: Path) -> None:
    """Of the attempt before, whose worker was thought lost."""
    from pool.controller import Controller

    with state.locked(str(pool)):
        held = Controller(str(pool), Settings())
        remote = held.remotes["local"]
        number = held.state.submit(
            {
                "command": ["true"],
                "image": "",
                "cpus": 1,
                "memory": 0,
                "gpus": 0,
                "retries": 0,
                "env": {},
                "cwd": "",
                "timeout_s": 0,
            }
        )
        one = held.state.job(number)
        held.jobs[number] = one
        held.state.change(one, state=state.RUNNING, worker="local", attempt=2)
        remote.jobs[number] = one
        end = {
            "is": "done",
            "id": number,
            "code": 9,
            "wall_s": 1,
            "cpu_s": 1,
            "memory": 1,
            "out": base64.b64encode(b"old").decode(),
            "err": "",
        }
        held._heed(remote, {**end, "attempt": 1})
        assert held.state.job(number).state == state.RUNNING and held.state.output(number) is None
        held._heed(remote, {**end, "attempt": 2, "code": 0})
        held._heed(remote, {**end, "attempt": 2, "code": 5})
        assert (held.state.job(number).state, held.state.job(number).code) == (state.FINISHED, 0)
        held.state.commit()
        held.state.close()


# Machines.


def simulated(policy: scaling.Policy, arrivals: list[simulation.Arrival]) -> dict[str, float | int]:
    return simulation.Simulation(policy).run(arrivals).shown()


def poisson(many: int, rate: float, seed: int = 1) -> list[simulation.Arrival]:
    rng = random.Random(seed)
    times = list(itertools.accumulate(rng.expovariate(rate) for _ in range(many)))
    return [simulation.Arrival(time_s, rng.lognormvariate(2.3, 1), Need(1.0)) for time_s in times]


KIND = scaling.Kind("m", 16.0, price=1.0)


def test_more_spare_capacity_never_makes_jobs_wait_longer() -> None:
    trace = poisson(5000, 2.0)
    found = [simulated(scaling.Policy((KIND,), machines=100, least_cpus=spare), trace) for spare in (0, 8, 16, 32, 64)]
    waits = [one["p99_wait_s"] for one in found]
    assert waits == sorted(waits, reverse=True) and waits[0] > 1.5 * waits[-1]
    costs = [one["cost"] for one in found]
    assert costs == sorted(costs)


def test_a_burst_begins_no_more_than_it_needs_and_nothing_stays_when_it_is_over() -> None:
    burst = [simulation.Arrival(n / 1000, 300.0, Need(1.0)) for n in range(200)]
    policy = scaling.Policy((KIND,), machines=100)
    found = simulated(policy, burst)
    assert found["launches"] == 13 and found["launches_unused"] == 0, "200 jobs of one processor, 16 a machine"
    assert found["p99_wait_s"] <= policy.launch_s + simulation.TICK_S
    paid_s = 300 + policy.launch_s + policy.idle_s + 16 * simulation.TICK_S
    assert found["cost"] <= 13 * paid_s / 3600, "each was given back soon after its last job"
    assert simulated(policy, [])["launches"] == 0


def test_caps_are_kept_and_jobs_too_large_are_said() -> None:
    burst = [simulation.Arrival(0.0, 10.0, Need(1.0)) for _ in range(500)]
    assert simulated(scaling.Policy((KIND,), machines=3), burst)["most_machines"] == 3
    assert simulated(scaling.Policy((KIND,), machines=99, price=2.5), burst)["most_machines"] == 2
    assert simulated(scaling.Policy((KIND,)), [simulation.Arrival(0.0, 1.0, Need(17.0))])["rejected"] == 1
    assert simulated(scaling.Policy((KIND,), machines=0), burst)["rejected"] == 500, "and it ends"


@given(
    st.lists(st.tuples(st.floats(0, 16), st.booleans()), max_size=8),
    st.lists(st.sampled_from([Need(1.0), Need(4.0), Need(16.0), Need(2.0, gpus=1)]), max_size=30),
    st.floats(0, 40),
)
def test_what_is_begun_is_needed_and_what_is_ended_is_not(
    there: list[tuple[float, bool]], waiting: list[Need], spare: float
) -> None:
    policy = scaling.Policy((KIND, scaling.Kind("g", 8.0, gpus=2, price=3.0)), machines=12, price=20.0)
    machines = []
    for number, (used, is_idle) in enumerate(there):
        one = scaling.Machine(number, KIND, 0.0, 0.0 if is_idle else math.inf)
        one.worker.cpus -= 0 if is_idle else used
        machines.append(one)
    begin, end = scaling.decide(1000.0, policy, machines, waiting, spare)
    assert not (begin and end) and len(machines) + len(begin) <= max(12, len(machines))
    assert not begin or sum(one.kind.price for one in machines) + sum(kind.price for kind in begin) <= 20.0
    assert all(one.idle_s == 0.0 for one in end)


def test_the_same_trace_policy_and_seed_give_the_same_result(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:17:{n // 10:02}.{n % 10}000000,{1 + n % 4}\n" for n in range(500))
    (tmp_path / "trace").write_text("TIMESTAMP,cpus\n" + rows)
    (tmp_path / "toml").write_text(
        '[[machines]]\nname = "m"\ncpus = 8\nprice = 0.4\n[scaling]\nquantile = 0.99\nmachines = 50\n'
    )
    words = ("simulate", "--trace", tmp_path / "trace", "--config", tmp_path / "toml", "--json")
    first = ok(*words)
    assert first == ok(*words) and json.loads(first)["jobs"] == 500 and json.loads(first)["cost"] > 0
    assert first != ok(*words, "--seed", "2")
    (tmp_path / "bad").write_text("t\n1\n0.5\n")
    refused = cp("simulate", "--trace", tmp_path / "bad", "--config", tmp_path / "toml")
    assert refused.returncode == 5 and f"{tmp_path}/bad:3: it is earlier" in refused.stderr
    assert cp("simulate", "--trace", tmp_path / "none", "--config", tmp_path / "toml").returncode == 4
    assert cp(*words, "--duration", "odd:1").returncode == 2
    (tmp_path / "toml").write_text('[[machines]]\nname = "m"\ncpus = "8"\n')
    assert ":3: cpus is not a number" in cp(*words).stderr


def test_a_plain_job_has_the_umask_of_the_account(pool: Path) -> None:
    before = os.umask(0o027)
    try:
        assert ok("map", *PLAIN, "--", "sh", "-c", "umask; echo $CPOOL_UMASK", input="x\n") == "0027\n\n"
    finally:
        os.umask(before)
