"""How many instances a function has: the law itself, and a trace through it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.autoscaling import Bounds, Seen, back_off_s, floor, to_start, window_s
from pool.callsimulation import CallSimulation, with_machines
from pool.placement import Need
from pool.scaling import Kind, Policy
from pool.simulation import Arrival
from tests.pooling import cp

seen = st.builds(
    Seen,
    queued=st.integers(0, 10_000),
    running=st.integers(0, 500),
    ready=st.integers(0, 50),
    starting=st.integers(0, 50),
    service_s=st.floats(0.0001, 1000),
    start_s=st.floats(0.01, 100),
)
bounds = st.builds(
    Bounds,
    concurrency=st.integers(1, 50),
    least=st.integers(0, 3),
    most=st.integers(3, 60),
    buffer=st.integers(0, 5),
    wait_s=st.floats(0, 10),
)


@given(seen, bounds)
def test_never_more_than_the_maximum_never_less_than_is_to_be_kept_and_one_where_there_is_none(one: Seen, of: Bounds) -> None:
    added, there = to_start(one, of), one.ready + one.starting
    assert 0 <= added <= max(of.most - there, 0)
    assert added + there >= min(floor(one, of), of.most, there + 10)
    if one.queued and not there:
        assert added >= 1
    if not one.queued and not of.least and not of.buffer:
        assert added == 0


@given(seen, bounds)
def test_what_is_starting_already_is_not_started_again(one: Seen, of: Bounds) -> None:
    """Whatever the law adds, it adds no more once that is on its way."""
    added = to_start(one, of)
    after = Seen(one.queued, one.running, one.ready, one.starting + added, one.service_s, one.start_s)
    ramped = added >= max(10, one.ready + one.starting)
    assert to_start(after, of) == 0 or ramped


def test_calls_that_will_be_done_before_an_instance_is_ready_start_none() -> None:
    assert to_start(Seen(queued=50, ready=1, service_s=0.01, start_s=1), Bounds()) == 0
    assert to_start(Seen(queued=5, ready=1, service_s=10, start_s=1), Bounds()) == 5, "long ones: one each"
    assert to_start(Seen(queued=500, ready=1, service_s=10, start_s=1), Bounds(most=100)) == 10, "but not all in one moment"
    assert to_start(Seen(queued=8, starting=2, service_s=10, start_s=1), Bounds(concurrency=4)) == 0
    assert to_start(Seen(running=1, ready=1), Bounds(buffer=2)) == 2 and to_start(Seen(ready=0), Bounds(buffer=2)) == 0
    assert to_start(Seen(), Bounds(least=2)) == 2


def test_an_instance_is_kept_as_long_as_the_function_s_own_gaps_say() -> None:
    assert window_s([1.0] * 9, Bounds(idle_s=60)) == 60, "too little is known"
    assert window_s([1.0] * 99, Bounds(idle_s=60)) == 2, "no less than 2 s"
    assert window_s([5.0] * 90 + [40.0] * 10, Bounds(idle_s=60)) == 40
    assert window_s([500.0] * 20, Bounds(idle_s=60)) == 60, "no more than the user says"
    assert window_s([500.0] * 20, Bounds(idle_s=1)) == 1
    assert [back_off_s(number) for number in (0, 1, 2, 3, 20)] == [0, 1, 2, 4, 60]


def poisson(spans: list[tuple[float, float]], service_s: float, seed: int = 1) -> Iterator[Arrival]:
    """(calls a second, until when)."""
    rng, now = random.Random(seed), 0.0
    for rate, until in spans:
        while (now := now + rng.expovariate(rate)) < until:
            yield Arrival(now, service_s, Need(1))
        now = until


@pytest.mark.parametrize("service_s", [0.01, 0.2, 3.0])
@pytest.mark.parametrize("start_s", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_burst_of_ten_times_as_much_starts_no_more_than_it_uses(service_s: float, start_s: float, concurrency: int) -> None:
    burst = poisson([(5, 60), (50, 120), (5, 300)], service_s)
    found = CallSimulation(Bounds(most=1000, concurrency=concurrency), start_s).run(burst)
    assert found.most <= 1.2 * found.used and found.unused <= 1 + 0.1 * found.started
    assert len(found.lives) == found.started and len(found.waits_s) > 3000, "all have ended, all were served"
    waits = sorted(found.waits_s)
    assert waits[int(len(waits) * 0.99)] <= 0.5 + 2 * start_s + 2 * service_s, "and nobody has waited for ever"


def test_no_calls_cost_no_instances_and_no_machines() -> None:
    found = CallSimulation(Bounds(idle_s=10), 0.5).run(poisson([(1, 60)], 0.1))
    last = max(end for _, end in found.lives)
    assert 60 <= last <= 75, "10 s after the last call there is none"
    policy = Policy((Kind("m", 2, price=1.0),), launch_s=40, idle_s=60)
    shown = with_machines(found, policy, Need(1))
    assert 1 <= shown["machines_launches"] <= 2
    assert 0 < shown["machines_cost"] <= shown["machines_launches"] * (last + 2 * 40 + 60) / 3600, "machines have ended, too"
    assert CallSimulation(Bounds(), 0.5).run([]).shown()["instance_s"] == 0


def test_simulate_takes_a_trace_of_calls(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time,duration_s\n" + "".join(f"{number / 10},0.3\n" for number in range(300)))
    words = ("simulate", "--functions", "--trace", tmp_path / "t.csv", "-q", "--json")
    first = cp(*words, env={"CAFS_POOL": str(tmp_path), "PATH": "/bin"})
    assert first.returncode == 0 and '"calls": 300' in first.stdout and '"machines_cost"' in first.stdout, first.stderr
    assert cp(*words, env={"CAFS_POOL": str(tmp_path), "PATH": "/bin"}).stdout == first.stdout, "the same again"
    assert cp(*words, "--sweep").returncode == 2
