"""Other users of a pool: what they may, how much they get, and whose turn it is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.placement import Need, Placement, Worker
from pool.tenants import Tenants, Usage
from tests.conftest import wait_until
from tests.test_pool import PLAIN, cp, job, ok, pool, serving  # noqa: F401  (fixtures)

SPEC = {"memory": 0, "gpus": 0}
TOML = '[tenants.a]\nusers = ["1234"]\ncpus = 1\njobs = 3\n[tenants.b]\nusers = ["nobody"]\nshare = 2\n'


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
def shared_pool(pool: Path, tmp_path: Path) -> Iterator[Path]:  # noqa: F811
    (pool / "pool.toml").write_text(TOML)
    for above in [tmp_path, *tmp_path.parents][:3]:
        above.chmod(above.stat().st_mode | 0o111)
    with serving():
        yield pool
        ok("down", "--grace", "0")


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


def test_a_quota_is_kept_and_is_the_reason_that_is_said(shared_pool: Path, tmp_path: Path) -> None:
    run = (
        "submit",
        *PLAIN,
        "--tenant",
        "a",
        "--cpus",
        "0.6",
        "--",
        "sh",
        "-c",
        f"until test -f {tmp_path}/go; do sleep 0.05; done; echo $CPOOL_TENANT",
    )
    first, second = (ok(*run).strip() for _ in range(2))
    other = ok("submit", *PLAIN, "--cpus", "0.6", "--", "true").strip()
    assert cp("wait", other).returncode == 0, "others go past it"
    wait_until(lambda: job(first)["state"] == "running")
    assert job(second)["waits"] == "quota: a has 0.6 of 1 cpus"
    (tmp_path / "go").touch()
    assert cp("wait", first, second).returncode == 0 and ok("logs", second) == "a\n"
    assert cp("submit", *PLAIN, "--tenant", "zz", "--", "true").returncode == 4


def test_strange_tenants_in_pool_toml_are_refused_with_their_line(pool: Path) -> None:  # noqa: F811
    for text, message in (
        ('[tenants.x]\nusers = ["no-such-user"]\n', "pool.toml:1: there is no user 'no-such-user'"),
        ("[tenants.x]\ncpus = 1\n", "pool.toml:1: a tenant has a plain name, and users"),
        ('[tenants.x]\nusers = ["0"]\nodd = 1\n', "pool.toml:3: [tenants] has no 'odd'"),
    ):
        (pool / "pool.toml").write_text(text)
        done = cp("tick")
        assert done.returncode == 5 and message in done.stderr, done.stderr
