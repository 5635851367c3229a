"""What a cloud may do to a pool, by a clock that is not real: nothing is launched twice, forgotten, or decided from silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafs.errors import RemoteError
from pool import cloud, clouds, fleet, market, state, workers
from pool.cloud import Instance, NoCapacityError, Order, RefusedError
from pool.controller import Controller
from pool.settings import Settings

SPEC = {
    "command": ["true"],
    "image": "",
    "env": {},
    "cwd": "/",
    "cpus": 2,
    "memory": 0,
    "gpus": 0,
    "timeout_s": 0,
    "retries": 0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.skew_s = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000 + self.now + self.skew_s


class Sky:
    """A cloud in memory.  fault: called with the name of each call and what it is about; may raise, also after it was done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.all: dict[str, Instance] = {}
        self.launches: list[str] = []
        self.fault: Callable[[str, object], Exception | None] = lambda call, about: None
        self.lost: Callable[[str], bool] = lambda call: False
        self.hidden: set[str] = set()
        self.state = cloud.RUNNING

    def _begin(self, call: str, about: object = None) -> None:
        error = self.fault(call, about)
        if error:
            raise error

    def _end(self, call: str) -> None:
        if self.lost(call):
            raise RemoteError("the answer was lost")

    def launch(self, order: Order) -> Instance:
        self._begin("launch", order)
        self.launches.append(order.name)
        if order.name not in self.all:
            number = len(self.all) + 1
            self.all[order.name] = Instance(
                f"i-{number}", order.name, self.state, f"10.0.0.{number}", order.zone, self.clock.time()
            )
        self._end("launch")
        return self.all[order.name]

    def instances(self) -> list[Instance]:
        self._begin("instances")
        return [one for one in self.all.values() if one.name not in self.hidden]

    def look(self, instance: Instance) -> Instance | None:
        self._begin("look")
        return next((one for one in self.all.values() if one.id == instance.id and one.name not in self.hidden), None)

    def end(self, instances: list[Instance]) -> None:
        self._begin("end")
        for one in instances:
            for name, known in self.all.items():
                if known.id == one.id:
                    self.all[name] = replace(known, state=cloud.ENDED)
        self._end("end")

    def living(self) -> list[str]:
        return [one.name for one in self.all.values() if one.state != cloud.ENDED]


class World:
    """A controller whose agents are ours, and that sees our clock."""

    def __init__(self, directory: Path, clock: Clock, sky: Sky, **more: object) -> None:
        self.directory, self.clock, self.sky, self.more = directory, clock, sky, more
        self.comes_up: Callable[[str], bool] = lambda name: True
        self.notice = False
        self.begin()

    def begin(self) -> None:
        scaling = {"launch_s": 10.0, "idle_s": 60.0, "machines": 4.0}
        self.settings = Settings(
            machines=({"name": "big", "cpus": 4, "price": 1.0}, {"name": "small", "cpus": 2, "price": 0.1}),
            scaling={**scaling, **self.more},  # type: ignore[dict-item]
            cloud={"provider": "ec2", "zones": ["a", "b"], "user": "u", "region": "r", "image": "i"},
        )
        self.controller = Controller(str(self.directory), self.settings)
        assert self.controller.fleet
        self.fleet: fleet.Fleet = self.controller.fleet

    def again(self) -> None:
        """Killed, and another is begun: what was not committed is lost."""
        self.controller.state.close()
        self.begin()

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        end = self.clock.now + seconds
        while self.clock.now < end and not until():
            self.clock.now += 1
            self.agents()
            self.controller.turn(0)
        return until()

    def agents(self) -> None:
        for name, remote in self.controller.remotes.items():
            if self.comes_up(name) and name in self.sky.living():
                remote.has_greeted = True
                report = dict.fromkeys(("free_memory", "free_disk", "load", "gpus", "running"), 0)
                cpus = ({row["name"]: row["kind"] for row in self.fleet.machines.values()}.get(name) == "big" and 4) or 2
                remote.reported({**report, "cpus": cpus, "memory": 1 << 33, "images": "", "arch": "x", "notice": self.notice})

    def submit(self, **more: object) -> state.Job:
        number = self.controller.state.submit({**SPEC, "requeue": True, **more})
        job = self.controller.state.job(number)
        self.controller.add(job)
        return job

    def finish(self, job: state.Job) -> None:
        remote = self.controller.remotes[job.worker]
        self.controller._heed(
            remote,
            {
                "is": "done",
                "id": job.id,
                "attempt": job.attempt,
                "code": 0,
                "wall_s": 1,
                "cpu_s": 1,
                "memory": 1,
                "out_size": 0,
                "err_size": 0,
                "out": "",
                "err": "",
            },
        )

    def rows(self) -> list[dict[str, object]]:
        return self.controller.state.machines(all_of_them=True)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    clock = Clock()
    sky = Sky(clock)
    yield from _world(tmp_path, monkeypatch, clock, sky)


def _world(place: Path, patch: pytest.MonkeyPatch, clock: Clock, sky: Sky, **more: object) -> Iterator[World]:
    from pool import controller as module
    from pool import turns, waiting

    for one in (fleet, market, workers, module, turns, waiting, state):
        patch.setattr(one, "time", clock)
    patch.setattr(clouds, "connect", lambda *_: sky)
    patch.setattr(fleet.threading, "Thread", _Now)
    patch.setattr(module.Wires, "open", lambda *_: None)
    patch.setattr(module.Leases, "mind", lambda *_: None)
    (place / "pool").mkdir()
    state.create(str(place / "pool"))
    yield World(place / "pool", clock, sky, **more)


class _Now:
    """A thread that runs when it is started."""

    def __init__(self, target: Callable[[], None], daemon: bool) -> None:
        self._target = target

    def start(self) -> None:
        self._target()


def test_machines_are_begun_for_what_waits_and_ended_when_it_is_done(world: World) -> None:
    jobs = [world.submit() for _ in range(3)]
    assert world.run(20, lambda: all(job.state == state.STARTING for job in jobs))
    assert len(world.sky.all) == 3 and {row["kind"] for row in world.rows()} == {"small"}, "the cheapest for what each holds"
    for job in jobs:
        world.finish(job)
    world.run(50)
    assert len(world.sky.living()) == 3, "they stay for idle_s"
    world.run(60)
    assert world.sky.living() == [] and all(row["state"] == "ended" for row in world.rows())


def test_an_answer_that_is_lost_launches_nothing_twice(world: World) -> None:
    tries = itertools.count()
    world.sky.lost = lambda call: call == "launch" and next(tries) < 3
    world.sky.hidden = {"all"}
    job = world.submit()
    assert world.run(60, lambda: job.state == state.STARTING)
    assert len(world.sky.all) == 1 and set(world.sky.launches) == {world.rows()[0]["name"]}


def test_where_there_is_no_capacity_another_zone_and_another_kind_are_tried_and_the_first_again_later(world: World) -> None:
    asked: list[tuple[str, str]] = []

    def fault(call: str, about: object) -> Exception | None:
        if isinstance(about, Order):
            asked.append((about.type, about.zone))
            return NoCapacityError("none left") if about.type == "small" else None
        return None

    world.sky.fault = fault
    job = world.submit()
    assert world.run(30, lambda: job.state == state.STARTING)
    assert sorted(asked[:2]) == [("small", "a"), ("small", "b")] and asked[2][0] == "big" and len(asked) == 3
    second = world.submit(cpus=3)
    third = world.submit()
    world.run(30)
    assert ("small", "a") not in asked[3:] and second.state == third.state == state.STARTING
    asked.clear()
    world.run(600)
    world.submit(), world.submit(), world.submit()
    world.run(10)
    assert asked[0][0] == "small", "after ten minutes"


def test_a_cloud_that_does_not_answer_changes_nothing(world: World) -> None:
    job = world.submit()
    assert world.run(20, lambda: job.state == state.STARTING)
    world.sky.fault = lambda call, about: RemoteError("throttled")
    world.finish(job)
    world.submit(cpus=4)
    world.run(300)
    assert len(world.sky.all) == 1 and len(world.sky.living()) == 1, "neither launched nor ended"
    world.sky.fault = lambda call, about: None
    world.run(80)
    assert len(world.sky.all) == 2 and len(world.sky.living()) == 1


def test_an_empty_list_is_not_the_end_of_all_machines(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submit()
    assert world.run(20, lambda: job.state == state.STARTING)
    monkeypatch.setattr(world.sky, "instances", lambda: [])
    world.run(300)
    assert job.state == state.STARTING and job.losses == 0 and len(world.sky.all) == 1


def test_a_machine_that_the_cloud_has_ended_gives_its_jobs_back_at_once(world: World) -> None:
    job = world.submit()
    assert world.run(20, lambda: job.state == state.STARTING)
    (name,) = world.sky.living()
    world.sky.all[name] = replace(world.sky.all[name], state=cloud.ENDED)
    assert world.run(8, lambda: job.losses == 1), "not after half a minute of silence"
    assert world.run(20, lambda: job.state == state.STARTING) and job.attempt == 2 and job.worker != name
    (name,) = world.sky.living()
    world.sky.hidden.add(name)  # as if it had never been, long after it was launched
    world.run(70)
    assert job.losses == 2 and job.attempt == 3


def test_what_was_just_launched_may_not_be_shown_for_a_while(world: World) -> None:
    job = world.submit()
    assert world.run(5, lambda: bool(world.sky.all))
    world.sky.hidden = set(world.sky.all)
    world.run(40)
    assert len(world.sky.all) == 1 and world.rows()[0]["state"] == "booting"
    world.sky.hidden = set()
    assert world.run(20, lambda: job.state == state.STARTING) and len(world.sky.all) == 1


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
def test_a_clock_that_jumps_by_an_hour_loses_no_job_and_ends_no_machine_that_works(world: World, skew_s: float) -> None:
    """Of the wall, here or there: who lives is counted by when this controller heard, on a clock that does not jump."""
    job = world.submit()
    assert world.run(20, lambda: job.state == state.STARTING)
    world.clock.skew_s = skew_s
    world.run(200)
    assert (job.state, job.losses, len(world.sky.all)) == (state.STARTING, 0, 1)
    world.finish(job)
    world.clock.skew_s = 0
    world.run(200)
    assert world.sky.living() == []


def test_machines_with_our_mark_that_nobody_knows_end_when_they_are_old_enough(world: World) -> None:
    world.sky.all["stray"] = Instance("i-99", "stray", cloud.RUNNING, "10.0.0.99", "a", world.clock.time())
    world.run(100)
    assert world.sky.living() == ["stray"]
    world.run(40)
    assert world.sky.living() == []


def test_a_launch_whose_state_was_lost_is_found_and_ended(world: World) -> None:
    job = world.submit()
    world.run(20, lambda: job.state == state.STARTING)
    world.controller.state._do("DELETE FROM machines")
    world.controller.state.commit()
    world.again()
    world.run(200)
    first = next(iter(world.sky.all))
    assert first not in world.sky.living() and len(world.sky.living()) == 1, "and the job has another machine"


def test_after_ten_machines_that_do_not_come_up_no_more_are_launched_until_somebody_has_looked(world: World) -> None:
    world.comes_up = lambda name: False
    job = world.submit()
    world.run(10 * 340)
    assert len(world.sky.all) == 10 and world.sky.living() == []
    world.run(1000)
    world.again()
    world.run(1000)
    assert len(world.sky.all) == 10, "also after a restart"
    assert "cpool cloud resume" in world.fleet.why_not(workers.need_of(job.spec))
    world.comes_up = lambda name: True
    world.fleet.resume()
    assert world.run(30, lambda: world.controller.jobs[job.id].state == state.STARTING)


def test_a_machine_that_will_be_taken_away_gets_no_more_jobs_and_a_successor(world: World) -> None:
    first = world.submit()
    assert world.run(20, lambda: first.state == state.STARTING)
    world.notice = True
    world.run(3)
    world.notice = False
    name = first.worker
    world.controller.remotes[name].report["notice"] = True
    world.agents = lambda: None  # type: ignore[method-assign]
    world.finish(first)
    second = world.submit()
    world.controller.turn(0)
    world.run(10)
    assert second.worker != name and len(world.sky.all) == 2


def test_what_is_refused_for_good_is_said_and_not_asked_at_once_again(world: World) -> None:
    asked: list[object] = []

    def fault(call: str, about: object) -> Exception | None:
        asked.extend([about] * (call == "launch"))
        return RefusedError("UnauthorizedOperation") if call == "launch" else None

    world.sky.fault = fault
    job = world.submit()
    world.run(120)
    assert len(asked) == 4, "once for each kind and zone"
    assert "UnauthorizedOperation" in world.fleet.why_not(workers.need_of(job.spec))


@pytest.mark.parametrize(("more", "most"), [({"price": 0.25}, 2), ({"price_day": 0.35}, 3), ({"machines": 1.0}, 1)])
def test_caps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, float], most: int) -> None:
    clock = Clock()
    clock.now += 86400 - clock.time() % 86400
    (world,) = _world(tmp_path, monkeypatch, clock, Sky(clock), **more)
    for _ in range(10):
        world.submit()
    world.run(300)
    assert len(world.sky.all) == most


def test_what_was_spent_is_counted_also_while_no_controller_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.now += 86400 - clock.time() % 86400
    (world,) = _world(tmp_path, monkeypatch, clock, Sky(clock), price_day=0.55)
    jobs = [world.submit()]
    assert world.run(20, lambda: jobs[0].state == state.STARTING)
    clock.now += 4 * 3600
    world.again()
    for _ in range(5):
        world.submit()
    world.run(100)
    assert len(world.sky.all) == 1, "0.4 are spent; one more hour of two is over the cap of 0.55"
    assert abs(world.fleet.shown()["spent_today"] - 0.4) < 0.02
    clock.now += 20 * 3600
    world.run(100)
    assert len(world.sky.living()) >= 3, "another day"


def test_a_kind_without_a_price_is_not_launched_under_a_cap(world: World) -> None:
    world.fleet.market.kinds = {name: replace(kind, price=0.0) for name, kind in world.fleet.market.kinds.items()}
    world.fleet.market.policy = replace(world.fleet.market.policy, price=5.0)
    job = world.submit()
    world.run(60)
    assert world.sky.all == {} and "cap" in world.fleet.why_not(workers.need_of(job.spec))


def test_a_job_that_fits_on_no_machine_as_it_turns_out_is_not_launched_for_again_and_again(world: World) -> None:
    world.agents_cpus = 1  # type: ignore[attr-defined]
    real = world.agents

    def smaller() -> None:
        real()
        for remote in world.controller.remotes.values():
            remote.report["cpus"] = 1

    world.agents = smaller  # type: ignore[method-assign]
    job = world.submit()
    world.run(600)
    assert job.state == state.QUEUED and len(world.sky.all) == 2, "one of each kind"


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_controller_that_is_killed_at_each_durable_step_of_a_machines_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Launching, booting, in use, ending: no second machine, no lost job, nothing left."""
    steps, commit = 0, state.State.commit
    for step in itertools.count(1):
        clock, left = Clock(), step
        place = tmp_path / str(step)
        place.mkdir()
        (world,) = _world(place, monkeypatch, clock, Sky(clock))

        def counted(self: state.State) -> None:
            nonlocal left
            left -= self._is_open
            if left == 0 and when == "before":
                left = -1
                raise _Killed
            commit(self)
            if left == 0:
                left = -1
                raise _Killed

        monkeypatch.setattr(state.State, "commit", counted)
        number = world.submit().id
        is_killed = False
        for _ in range(200):
            try:
                world.run(1)
                job = world.controller.jobs.get(number)
                if job is None and not world.controller.state.has_job(number):
                    number = world.submit().id  # it was never durable, and nobody was told so
                if job and job.state == state.STARTING:
                    world.finish(job)
            except _Killed:
                is_killed = True
                world.again()
        monkeypatch.setattr(state.State, "commit", commit)
        assert world.controller.state.job(number).state == state.FINISHED, step
        assert len(world.sky.all) == 1 and world.sky.living() == [], (step, world.rows())
        assert [row["state"] for row in world.rows()] == ["ended"]
        world.controller.state.close()
        if not is_killed:
            break
        steps += 1
    assert steps >= 6
    print(f"killed {when} each of {steps} durable steps")


@settings(max_examples=40, deadline=None, database=None)
@given(st.data())
def test_whatever_the_cloud_does_no_machine_is_left_and_no_job_is_lost(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Faults at random for a while, then none."""
    clock = Clock()
    sky = Sky(clock)
    is_calm = False
    errors = [None, None, None, RemoteError("x"), NoCapacityError("x")]
    sky.fault = lambda call, about: None if is_calm else data.draw(st.sampled_from(errors if call == "launch" else errors[:4]))
    sky.lost = lambda call: not is_calm and data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        (world,) = _world(tmp_path_factory.mktemp("world"), patch, clock, sky)
        ids = [world.submit().id for _ in range(3)]
        for _ in range(4):
            world.run(10)
            if data.draw(st.booleans()):
                world.controller.state.commit()
                world.again()
        is_calm = True
        for _ in range(1500):
            world.run(1)
            assert len(sky.living()) <= 4, "the cap is of all that there are, also of those that nobody is sure of"
            for job in [one for one in world.controller.jobs.values() if one.state == state.STARTING]:
                world.finish(job)
        assert all(world.controller.state.job(one).state == state.FINISHED for one in ids)
        assert sky.living() == []
        world.controller.state.close()


# What a review has found.


def test_machines_that_the_cloud_ends_while_they_boot_count_as_not_come_up(world: World) -> None:
    world.comes_up = lambda name: False
    world.submit()
    for _ in range(400):
        world.run(1)
        for name in world.sky.living():
            world.sky.all[name] = replace(world.sky.all[name], state=cloud.ENDED)
    assert len(world.sky.all) == 10 and world.fleet.is_stopped()


def test_an_idle_machine_gives_its_place_under_a_cap_to_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    (world,) = _world(tmp_path, monkeypatch, clock, Sky(clock), machines=1.0)
    small = world.submit()
    assert world.run(20, lambda: small.state == state.STARTING)
    world.finish(small)
    large = world.submit(cpus=4)
    assert world.run(120, lambda: large.state == state.STARTING), world.rows()
    assert [row["kind"] for row in world.rows()] == ["small", "big"]


def test_a_machine_is_not_late_while_the_cloud_says_nothing_nor_before_this_controller_has_looked(world: World) -> None:
    world.comes_up = lambda name: False
    world.submit()
    assert world.run(10, lambda: bool(world.sky.all))
    world.sky.fault = lambda call, about: RemoteError("throttled") if call == "instances" else None
    world.run(900)
    assert [row["state"] for row in world.rows()] == ["booting"]
    world.again()
    world.sky.fault = lambda call, about: None
    world.run(100)
    assert [row["state"] for row in world.rows()] == ["booting"], "as far as this one knows it may be about to come up"
    world.run(300)
    assert world.rows()[0]["state"] in ("ending", "ended") and "did not come up" in str(world.rows()[0]["reason"])


def test_a_launch_that_is_answered_after_its_machine_was_given_up_harms_nobody(world: World) -> None:
    world.sky.fault = lambda call, about: RemoteError("no answer") if call == "launch" else None
    world.submit()
    assert world.run(10, lambda: bool(world.fleet.machines))
    (name,) = world.fleet.machines
    row = world.fleet.machines[name]
    world.controller.jobs.clear()
    world.controller.waiting.put_in_order()
    world.controller.turn(0)
    world.fleet._busy.add(name)  # the cloud takes its time
    world.fleet.end(name)
    world.run(700)
    assert row["state"] == "ending", "there may be one yet"
    world.fleet._busy.discard(name)
    assert world.run(10, lambda: row["state"] == "ended")
    world.fleet._launched(row, None, NoCapacityError("late"))
    late = world.sky.all[name] = Instance("i-77", name, cloud.RUNNING, "10.0.0.77", "a", world.clock.time())
    world.fleet._launched(row, late, None)
    world.run(5)
    assert world.sky.living() == [] and world.fleet.machines == {}


def test_what_a_machine_or_a_job_says_that_cannot_be_does_not_end_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    (world,) = _world(tmp_path, monkeypatch, clock, Sky(clock), quantile=0.9, least_cpus=1e12)
    real = world.agents

    def nothing() -> None:
        real()
        for remote in world.controller.remotes.values():
            remote.report["cpus"] = 0

    world.agents = nothing  # type: ignore[method-assign]
    world.submit(cpus=1e10)
    world.run(300)
    assert len(world.sky.living()) <= 4


def test_jobs_that_fit_nowhere_do_not_hide_those_behind_them(world: World) -> None:
    for _ in range(1100):
        world.submit(constraint=["nowhere"])
    job = world.submit()
    assert world.run(30, lambda: job.state == state.STARTING)
    assert len(world.sky.all) == 1


def test_a_machine_that_jobs_wait_for_stays_though_none_of_its_kind_can_be_launched(world: World) -> None:
    first = world.submit(image="f" * 64)
    real = world.agents

    def without_crun() -> None:
        real()
        for remote in world.controller.remotes.values():
            if remote.report:
                remote.report["images"] = "no crun"
                remote.setup_after = float("inf")

    world.agents = without_crun  # type: ignore[method-assign]
    assert world.run(20, lambda: any(row["state"] == "ready" for row in world.rows()))
    world.sky.fault = lambda call, about: NoCapacityError("none") if call == "launch" else None
    world.submit(cpus=4)
    world.run(300)
    assert len(world.sky.living()) == 1 and first.state == state.QUEUED, "what runs images is on its way there"


def test_a_stranger_that_cannot_be_ended_keeps_no_other_alive_and_is_said(world: World) -> None:
    for number in (1, 2):
        world.sky.all[f"s{number}"] = Instance(f"i-9{number}", f"s{number}", cloud.RUNNING, "", "a", world.clock.time())
    real = world.sky.end

    def end(instances: list[Instance]) -> None:
        if any(one.name == "s1" for one in instances):
            raise RefusedError("OperationNotPermitted")
        real(instances)

    world.sky.end = end  # type: ignore[method-assign]
    world.run(200)
    assert world.sky.living() == ["s1"] and "OperationNotPermitted" in world.fleet.problem


def test_a_machine_that_ended_while_nobody_looked_is_not_paid_for_until_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.now += 86400 - clock.time() % 86400
    (world,) = _world(tmp_path, monkeypatch, clock, Sky(clock))
    job = world.submit()
    assert world.run(20, lambda: job.state == state.STARTING)
    (name,) = world.sky.living()
    clock.now += 10 * 3600
    world.sky.all[name] = replace(world.sky.all[name], state=cloud.ENDED)
    world.again()
    world.run(20, lambda: bool(world.rows()[0]["ended_s"]))
    assert world.rows()[0]["ended_s"] - world.rows()[0]["launched_s"] < 700  # type: ignore[operator]


def test_a_setup_that_fails_is_tried_again_and_only_then_its_kind_given_up(world: World) -> None:
    world.submit(image="f" * 64)
    real = world.agents

    def without_crun() -> None:
        real()
        for remote in world.controller.remotes.values():
            if remote.report:
                remote.report["images"] = "no crun"

    world.agents = without_crun  # type: ignore[method-assign]
    tries: list[float] = []

    def set_up(remote: workers.Remote, *, for_s3: bool) -> None:
        tries.append(world.clock.now)
        remote.setup_after = world.clock.now + 120
        remote.setup_failures += 1

    world.controller.wires.set_up = set_up  # type: ignore[method-assign]
    world.run(200)
    assert len(tries) == 2 and len(world.sky.all) == 1 and world.fleet.market.kinds["small"].images
    world.run(400)
    assert not world.fleet.market.kinds["small"].images
    world.fleet.resume()
    assert world.fleet.market.kinds["small"].images
