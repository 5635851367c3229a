"""Other users of a pool: what they may, how much they get, and whose turn it is."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs.errors import UnsupportedError
from pool import state, workers
from pool.controller import Controller
from pool.placement import Need, Placement, Worker
from pool.settings import Settings
from pool.tenants import Tenants, Usage
from pool.workers import Remote
from tests.conftest import wait_until
from tests.pooling import PLAIN, agents, cp, job, ok, serving, serving_with
from tests.waiting import SLOW

SPEC = {"memory": 0, "gpus": 0}
TOML = '[tenants.a]\nusers = ["1234"]\ncpus = 0.7\njobs = 3\n[tenants.b]\nusers = ["nobody"]\nshare = 2\n'


def a_job(number: int, tenant: str = "", cpus: float = 1.0, priority: int = 0) -> SimpleNamespace:
    return SimpleNamespace(id=number, priority=priority, spec={**SPEC, "cpus": cpus, "tenant": tenant})


def order(tenants: Tenants, jobs: list[SimpleNamespace], usage: dict[str, Usage] | None = None) -> list[int]:
    return [one.id for one in tenants.in_order(jobs, usage or {})]  # type: ignore[arg-type]


def test_tenants_take_turns_by_their_shares_whoever_was_first() -> None:
    tenants = Tenants({"a": {"users": ["1"]}, "b": {"users": ["2"], "share": 2.0}})
    jobs = [a_job(n, "a") for n in range(1, 7)] + [a_job(n, "b") for n in range(7, 13)]
    found = order(tenants, jobs)
    assert [sum(number > 6 for number in found[:at]) for at in (3, 6, 9)] == [2, 4, 6], "two of b for one of a"
    behind = order(tenants, jobs, {"b": Usage(cpus=4)})
    assert behind[:2] == [1, 2], "b has two of each processor of its share running"
    assert order(tenants, [a_job(1, "a"), a_job(2, "a", priority=5), a_job(3, "b")])[0] in (2, 3)
    assert order(tenants, [a_job(1), a_job(2, priority=1)]) == [2, 1], "one tenant alone: by priority, then number"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 9), st.integers(-3, 3)), max_size=30))
def test_every_job_has_its_turn_and_those_of_one_tenant_keep_their_order(asked: list[tuple[str, float, int]]) -> None:
    jobs = [a_job(number, *one) for number, one in enumerate(asked)]
    found = order(Tenants({"a": {"users": ["1"], "share": 3.0}, "b": {"users": ["2"]}}), jobs)
    assert sorted(found) == list(range(len(jobs)))
    for name in "abc":
        mine = [number for number in found if asked[number][0] == name]
        assert mine == sorted(mine, key=lambda number: (-asked[number][2], number))


def test_a_quota_is_of_what_runs() -> None:
    tenants = Tenants({"a": {"users": ["1"], "cpus": 4, "gpus": 1}})
    assert tenants.over(a_job(1, "a", 2), {"a": Usage(cpus=2)}) == ""  # type: ignore[arg-type]
    assert tenants.over(a_job(1, "a", 2), {"a": Usage(cpus=3)}) == "quota: a has 3 of 4 cpus"  # type: ignore[arg-type]
    assert tenants.over(a_job(1, "", 99), {"a": Usage(cpus=4)}) == ""  # type: ignore[arg-type]


def test_a_job_goes_where_its_image_is_unless_there_is_no_room() -> None:
    def worker(name: str, cpus: float, *has: str, load: float = 0.0) -> Worker:
        return Worker(name, cpus, 0, 0, 8, 0, 0, has=frozenset(has), load=load)

    placement = Placement([worker("full", 1, "x"), worker("fits-best", 2), worker("has-it", 8, "x")])
    chosen = [placement.choose(Need(2, image="x")) for _ in range(5)]
    assert [one.name if one else "" for one in chosen[:4]] == ["has-it"] * 4 and chosen[4] and chosen[4].name == "fits-best"
    busy = Placement([worker("busy", 4, load=1.0), worker("idle", 4)])
    assert busy.choose(Need(1)).name == "idle"  # type: ignore[union-attr]


@pytest.fixture
def shared_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not below pytest's own directory, which every run of it closes to others again."""
    with tempfile.TemporaryDirectory(prefix="cafs-pool-") as place:
        os.chmod(place, 0o711)
        found = Path(place) / "pool"
        monkeypatch.setenv("CAFS_POOL", str(found))
        ok("init")
        (found / "pool.toml").write_text(TOML)
        with serving():
            yield found
            ok("down", "--grace", "0")
        wait_until(lambda: not agents(Path(place)))


def ask(uid: int, pool_place: Path, **fields: object) -> dict[str, object]:
    """What the controller answers to another user, on its socket."""
    code = (
        "import json, os, socket, sys\nuid = int(sys.argv[1])\nos.setgroups([]); os.setgid(uid); os.setuid(uid)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[2])\n"
        "try: s.sendall(sys.argv[3].encode() + b'\\n'); print(s.makefile().readline() or '{}')\nexcept OSError: print('{}')"
    )
    words = ["python3", "-c", code, str(uid), str(pool_place / "socket"), json.dumps({"tag": 1, **fields})]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.needs("root")
def test_others_see_and_end_their_own_jobs_alone(shared_pool: Path) -> None:
    image = "f" * 64
    mine = ok("submit", *PLAIN, "--hold", "--", "true").strip()
    spec = {"command": ["true"], "image": image}
    submitted = ask(1234, shared_pool, do="submit", jobs=[{"spec": spec, "key": "k", "hold": True}])
    (number,) = submitted["ids"]  # type: ignore[misc]
    assert ask(1234, shared_pool, do="submit", jobs=[{"spec": spec, "key": "k", "hold": True}])["ids"] == [number]
    shown = job(number)
    assert shown["spec"]["tenant"] == "a" and shown["key"] == "a/k"  # type: ignore[index]
    listed = ask(1234, shared_pool, do="jobs", all=True, limit=9)["jobs"]
    assert [one["id"] for one in listed] == [number]  # type: ignore[attr-defined]
    for do, more in (("job", {"id": mine}), ("cancel", {"ids": [mine], "grace_s": 0}), ("read", {"id": mine, "stream": "out", "offset": 0}), ("wait", {"ids": [mine]}), ("release", {"ids": [mine], "hold": False})):  # fmt: skip
        refused = ask(1234, shared_pool, do=do, **more)
        assert refused["code"] == 4 and "no job" in str(refused["error"]), (do, refused)
    for do, more in (("end", {"jobs": True, "grace_s": 0}), ("hosts", {"what": "remove", "name": "x"}), ("metrics", {}), ("cloud", {"what": "ls"})):  # fmt: skip
        assert ask(1234, shared_pool, do=do, **more)["code"] == 8, do
    assert ask(1234, shared_pool, do="submit", jobs=[{"spec": {"command": ["id"]}}])["code"] == 8, "no plain commands"
    assert ask(1234, shared_pool, do="submit", jobs=[{"spec": {**spec, "tenant": "b"}}])["code"] == 8
    assert ask(999, shared_pool, do="jobs", all=True, limit=9) == {}, "a stranger is not heard"
    assert ask(65534, shared_pool, do="about")["tenant"] == "b"
    over = ask(1234, shared_pool, do="submit", jobs=[{"spec": spec}] * 3)
    assert over["code"] == 6 and over["error"] == "quota: a has 1 of 3 jobs"
    assert ask(1234, shared_pool, do="cancel", ids=[number], grace_s=0) == {"done": True, "tag": 1}
    assert job(number)["state"] == "cancelled" and job(mine)["state"] == "held"
    assert {name: oct((shared_pool / name).stat().st_mode & 0o777) for name in ("state.db", "pool.toml")} == {
        "state.db": "0o600",
        "pool.toml": "0o600",
    }


def test_what_only_the_owner_may_is_said_to_others(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UnsupportedError, match="only the owner of the pool"):
        state.State(str(pool))


def test_a_quota_is_kept_and_is_the_reason_that_is_said(shared_pool: Path, tmp_path: Path) -> None:
    run = (
        "submit",
        *PLAIN,
        "--tenant",
        "a",
        "--cpus",
        "0.4",
        "--",
        "sh",
        "-c",
        f"until test -f {tmp_path}/go; do sleep 0.05; done; echo $CPOOL_TENANT",
    )
    first, second = (ok(*run).strip() for _ in range(2))
    other = ok("submit", *PLAIN, "--cpus", "0.4", "--", "true").strip()
    assert cp("wait", other).returncode == 0, "others go past it"
    wait_until(lambda: job(first)["state"] == "running")
    assert job(second)["waits"] == "quota: a has 0.4 of 0.7 cpus"
    (tmp_path / "go").touch()
    assert cp("wait", first, second).returncode == 0 and ok("logs", second) == "a\n"
    assert cp("submit", *PLAIN, "--tenant", "zz", "--", "true").returncode == 4


def test_strange_tenants_in_pool_toml_are_refused_with_their_line(pool: Path) -> None:
    for text, message in (
        ('[tenants.x]\nusers = ["no-such-user"]\n', "pool.toml:1: there is no user 'no-such-user'"),
        ("[tenants.x]\ncpus = 1\n", "pool.toml:1: a tenant has a plain name, and users"),
        ('[tenants.x]\nusers = ["0"]\nodd = 1\n', "pool.toml:3: [tenants] has no 'odd'"),
    ):
        (pool / "pool.toml").write_text(text)
        done = cp("tick")
        assert done.returncode == 5 and message in done.stderr, done.stderr


# What a worker can take.


def remote(**report: object) -> Remote:
    found = Remote("w", "x", is_draining=False)
    found.has_greeted = True
    given = {"cpus": 4, "memory": 16 << 30, "free_memory": 15 << 30, "free_disk": 50 << 30, "load": 0, "gpus": 0, "running": 0}
    found.reported({**given, "images": "", "arch": "x", **report})
    return found


def placed(number: int, **more: object) -> state.Job:
    spec = {"cpus": 1, "memory": 0, "gpus": 0, "image": "", **more}
    return SimpleNamespace(id=number, spec=spec)  # type: ignore[return-value]


def test_what_is_measured_keeps_a_job_away_and_no_job_is_counted_twice() -> None:
    one = remote(free_memory=3 << 30, free_disk=10 << 30)
    assert one.free().fits(Need(1, 3 << 30)) and not one.free().fits(Need(1, 8 << 30)), "somebody else has the rest"
    assert one.free().fits(Need(disk=9 << 30)) and not one.free().fits(Need(disk=11 << 30))
    one.took(placed(1, memory=2 << 30, disk=6 << 30))
    assert not one.free().fits(Need(disk=5 << 30)) and not one.free().fits(Need(1, 3 << 30)), "it has not used it yet, and will"
    time.sleep(0.001)
    one.reported({**one.report, "free_memory": 1 << 30, "free_disk": 6 << 30})
    assert one.free().fits(Need(disk=5 << 30)) and one.free().fits(Need(1, 1 << 30)), "what it uses is in what was measured"
    whole = remote(free_memory=int(15.4 * (1 << 30)))
    assert whole.free().fits(Need(4, 16 << 30)), "what the system itself has keeps nobody from a whole machine"


def test_more_processors_are_given_away_than_there_are_if_that_is_wanted(pool: Path) -> None:
    assert remote().free(1.5).cpus == 6 and remote().free().cpus == 4
    (pool / "pool.toml").write_text("[pool]\novercommit = 4\n")
    with serving():
        half = len(os.sched_getaffinity(0)) / 2
        ok("submit", *PLAIN, "--cpus", half, "--array", "1-9", "--", "sleep", "1000")
        wait_until(lambda: [json.loads(line)["state"] for line in ok("jobs", "--json").splitlines()].count("running") == 8)
        assert job(9)["state"] == "queued", "eight halves are four times as much as there is"
        ok("down", "--grace", "0")


def test_workers_on_one_machine_share_it_if_that_is_said(tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    directory.mkdir()
    state.create(str(directory))
    for is_shared, wanted in ((True, 2), (False, 4)):
        held = Controller(str(directory), Settings(one_per_boot=is_shared))
        for name in ("w1", "w2"):
            held.remotes[name] = one = Remote(name, "x", is_draining=False)
            one.has_greeted, one.boot_id = True, "same"
            report = dict.fromkeys(("free_memory", "free_disk", "load", "gpus", "running", "memory"), 1 << 40)
            one.reported({**report, "cpus": 2, "images": "", "arch": "x"})
        held.remotes.pop("local", None)
        spec = {"command": ["true"], "image": "", "env": {}, "cwd": "", "timeout_s": 0, "cpus": 1, "memory": 0, "gpus": 0}
        jobs = [held.state.job(held.state.submit(spec)) for _ in range(5)]
        for one_job in jobs:
            held.add(one_job)
        for _ in range(4):
            held.waiting.may_place = True
            held.waiting.place()
        assert sum(one_job.state == state.STARTING for one_job in jobs) == wanted
        held.state.close()


def test_a_strict_job_is_done_again_only_when_it_has_ended_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one, clock = remote(), SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    easy, strict = placed(1), placed(2, strict=True)
    clock.now = one.heard + 31
    assert one.is_lost_for(easy) and not one.is_lost_for(strict)
    clock.now = one.heard + 31 + 60 + 15
    assert one.is_lost_for(strict)


def test_an_agent_that_hears_no_controller_ends_a_strict_job_and_no_other(
    pool: Path,
    tmp_path: Path,
) -> None:
    with serving_with(f"from pool import specs; specs.STRICT_S = {2.0 * SLOW}"):
        run = ("sh", "-c", f"echo $$ >{tmp_path}/$CPOOL_JOB; while :; do sleep 0.05; done")
        strict, easy = (ok("submit", *PLAIN, *flags, "--cpus", "0.1", "--", *run).strip() for flags in (("--strict",), ()))
        wait_until(lambda: all((tmp_path / one).exists() and (tmp_path / one).read_text() for one in (strict, easy)))
    places = [Path("/proc") / (tmp_path / one).read_text().strip() for one in (strict, easy)]
    assert all(place.exists() for place in places)
    wait_until(lambda: not places[0].exists(), 20)
    assert places[1].exists()
    with serving():
        ok("down", "--grace", "1")


def test_a_job_that_does_not_start_in_time_is_tried_elsewhere(tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    directory.mkdir()
    state.create(str(directory))
    held = Controller(str(directory), Settings())
    one = held.state.job(held.state.submit({"command": ["x"], "image": "", "cpus": 1, "memory": 0, "gpus": 0, "start_s": 0.01}))
    held.state.change(one, state=state.STARTING, worker="local", attempt=1)
    held.jobs[one.id] = one
    held.remotes["local"].took(one)
    held._mind_queue()
    time.sleep(0.02)
    held._look_at_queue = 0
    held._mind_queue()
    assert (one.state, one.losses, one.reason) == (state.QUEUED, 1, "did not start in time")
    held.state.close()
