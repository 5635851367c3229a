"""The router's decisions, one by one: what it says to hosts and to the controller, with neither of them there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pool import calls
from pool.callers import Caller
from pool.hostlinks import HostLink
from pool.routed import Instance, Routed
from pool.router import Router


class Controller:
    """Notes what it is asked.  answer: to submits."""

    is_open = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuses = ""
        self._jobs = 0

    def ask(self, do: str, then: Any, **fields: Any) -> None:
        self.asked.append((do, fields))
        if do == "submit":
            self._jobs += 1
            then({"error": self.refuses} if self.refuses else {"ids": [self._jobs]})


class Link:
    """A host that notes what it is told."""

    def __init__(self, worker: str) -> None:
        self.worker, self.has_greeted, self.has_ever_greeted = worker, True, True
        self.wire: object = self
        self.used = time.monotonic()
        self.instances: dict[int, Instance] = {}
        self.known: dict[bytes, tuple[str, int, str]] = {}
        self.said: list[tuple[int, bytes, int]] = []

    def say(self, frame: bytes) -> None:
        _, kind, _, _, call, a, _ = calls.HEAD.unpack_from(frame)
        self.said.append((kind, call, a))

    def close(self) -> None:
        self.has_greeted = False

    def given(self) -> list[int]:
        """The instances that got calls, in order."""
        return [a for kind, _, a in self.said if kind == calls.CALL]


class World:
    def __init__(self, directory: Path) -> None:
        self.router = Router(str(directory))
        self.controller = self.router.instances.controller = Controller()  # type: ignore[assignment]
        self.caller = Caller(0, "")
        self.answers: list[tuple[int, bytes]] = []
        self.caller.wire = SimpleNamespace(say=self._hear, is_open=True)  # type: ignore[assignment]

    def _hear(self, frame: bytes) -> None:
        _, _kind, flags, _, call, _, _ = calls.HEAD.unpack_from(frame)
        self.answers.append((flags & calls.ERROR, call))

    def function(self, identity: str = "one", version: int = 1, **fields: Any) -> Routed:
        fn = {
            "id": identity,
            "concurrency": 1,
            "min": 0,
            "max": 10,
            "buffer": 0,
            "idle_s": 60,
            "wait_s": 0.5,
            "timeout_s": 300,
            "start_s": 60,
        }
        row = {"version": version, "state": "current", "spec": {"cpus": 1, "fn": {**fn, **fields}}}
        self.router.instances._set_function("", "f", [row])
        found = self.router.instances.functions["", "f"]
        self.caller.opened[found.number] = found
        return found

    def instance(self, link: Link, number: int, job: int = 0, busy: int = 0) -> Instance:
        fn = self.router.instances.functions["", "f"]
        one = self.router.instances._adopt(job or 100 + number, fn, fn.version, is_first=False)
        one.is_placed = True
        self.router.links[link.worker] = link  # type: ignore[assignment]
        self.router.instances._ready(link, one, number, busy)  # type: ignore[arg-type]
        return one

    def call(self, flags: int = 0, call: bytes = b"") -> bytes:
        call = call or os.urandom(16)
        number = next(iter(self.caller.opened))
        self.router.callers._heed(self.caller, calls.CALL, flags, call, number, 0, b"1")
        return call


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_instance_that_was_used_last_gets_the_call_and_one_without_a_greeting_none(world: World) -> None:
    world.function()
    near, far = Link("near"), Link("far")
    world.instance(near, 1)
    world.instance(far, 2)
    first = world.call()
    assert near.given() + far.given() == [1], "the first that was there"
    world.router.answered(near, 0, first, 0, b"1")  # type: ignore[arg-type]
    near.has_greeted = False
    second = world.call()
    assert far.given() == [2] and near.given() == [1], "not over a connection that has not said what it knows"
    third = world.call()
    assert len(world.router.instances.functions["", "f"].queue) == 1 and world.answers == [(0, first)]
    world.router.answered(far, 0, second, 0, b"1")  # type: ignore[arg-type]
    assert far.said[-1] == (calls.CALL, third, 2), "the one that waited is next"


def test_starts_that_are_refused_fail_no_call_that_waits(world: World) -> None:
    fn = world.function()
    world.instance(Link("w"), 1)
    fn.measured.service_s = 100.0
    world.controller.refuses = "quota: a has 5 of 5 jobs"
    for _ in range(50):
        world.call()
    world.router.instances.mind(fn, world.router.loop.now)
    assert len(fn.queue) == 49 and world.answers == [] and fn.problem.startswith("quota")
    assert not fn.is_hopeless


def test_instances_that_do_not_start_fail_what_waits_only_if_there_is_no_other(world: World) -> None:
    fn = world.function()
    one = world.instance(Link("w"), 1)
    world.call()
    waiting = world.call()
    for _ in range(3):
        fn.failed("it ended", 0.0)
        world.router.instances._give_up_queue(fn)
    assert world.answers == []
    world.router.instances.gone(one)
    world.router.instances._give_up_queue(fn)
    assert world.answers == [(calls.ERROR, waiting)]


def test_an_instance_that_was_busy_before_this_router_is_free_afterwards(world: World) -> None:
    world.function()
    link, before, nobody = Link("w"), os.urandom(16), os.urandom(16)
    link.known = {before: ("running", 1, "one"), nobody: ("running", 2, "one")}
    for number in (1, 2):
        world.instance(link, number, busy=1)
        assert link.instances[number].busy == 1
    world.call(calls.LAST, before)
    assert link.said[-1][:2] == (calls.ASK, before) and link.given() == [], "it is not done again"
    world.router.answered(link, 0, before, 0, b"1")  # type: ignore[arg-type]
    world.router.answered(link, 0, nobody, 0, b"1")  # type: ignore[arg-type]
    assert world.answers == [(0, before)] and [link.instances[number].load for number in (1, 2)] == [0, 0]
    world.call(calls.LAST, nobody)
    assert world.answers[-1] == (0, nobody), "what nobody had asked for as yet was kept"


def test_a_call_of_before_waits_for_a_host_that_was_not_heard_and_is_not_done_again(world: World) -> None:
    world.function()
    near, far = Link("near"), Link("far")
    world.instance(near, 1)
    world.router.links["far"] = far  # type: ignore[assignment]
    far.has_ever_greeted = False
    again, new = world.call(calls.LAST), world.call()
    assert near.given() == [1] and near.said[-1][1] == new, "a new one need not wait"
    world.router.callers.mind_held(world.router.loop.now + 1)
    assert world.answers == [] and len(world.router.callers._held) == 1
    world.router.callers.mind_held(world.router.loop.now + 31)
    assert world.answers == [(calls.ERROR, again)] and near.given() == [1]


def test_what_is_deployed_under_a_name_of_before_is_another_function(world: World) -> None:
    fn = world.function("one")
    link = Link("w")
    old = world.instance(link, 1)
    world.function("two")
    assert fn.ready == [] and old.is_leaving and link.said[-1][0] == calls.CONTROL
    world.call()
    assert link.given() == [] and len(fn.queue) == 1
    world.router.instances._ready(link, old, 1, 0)  # type: ignore[arg-type]
    assert fn.ready == [], "not even if it says so again"


def test_when_a_worker_is_lost_what_may_be_done_twice_goes_to_another(world: World) -> None:
    fn = world.function(concurrency=5)
    near, far = Link("near"), Link("far")
    ones = [world.instance(near, number) for number in range(1, 5)]
    world.instance(far, 9)
    fn.ready.sort(key=lambda one: one.number, reverse=True)
    twice, once = world.call(calls.IDEMPOTENT), world.call()
    assert near.given() == [1, 1] and not far.given()
    lost = HostLink.__new__(HostLink)
    lost._router, lost.instances, lost.name, lost.known = world.router, {one.number: one for one in ones}, "x", {}
    lost._give_up()
    assert far.said == [(calls.CALL, twice, 9)] and world.answers == [(calls.ERROR, once)]


def test_a_large_answer_that_is_not_there_any_more_is_an_error_for_all_who_wait(world: World) -> None:
    world.function()
    link = Link("w")
    world.instance(link, 1)
    call = world.call()
    world.router.answered(link, calls.REFERENCE, call, 0, b'{"$ref": "x", "size": 9000000}')  # type: ignore[arg-type]
    for piece in (0, 1, 0):
        world.router.callers._heed(world.caller, calls.WANT, 0, call, piece, 0, b"")
    assert [one for one in link.said if one[0] == calls.WANT] == [(calls.WANT, call, 0), (calls.WANT, call, 1)], "each once"
    world.router.answered(link, calls.ERROR, call, 0, b"{}")  # type: ignore[arg-type]
    assert world.answers[1:] == [(calls.ERROR, call)] * 3 and world.caller.wants == 0 and not world.router.answers.wants
    world.router.callers._heed(world.caller, calls.WANT, 0, os.urandom(16), 0, 0, b"")
    assert world.answers[-1][0] == calls.ERROR, "of a call that nobody knows, too"


def test_a_connection_stays_while_something_of_it_may_be_asked_for(world: World) -> None:
    world.function()
    before, large = os.urandom(16), Link("large")
    world.instance(large, 1)
    call = world.call()
    world.router.answered(large, calls.REFERENCE, call, 0, b'{"$ref": "x", "size": 9000000}')  # type: ignore[arg-type]
    taken, idle, lost = Link("taken"), Link("idle"), Link("lost")
    taken.known = {before: ("running", 7, "one")}  # by an instance that is no more
    lost.wire = None
    world.router.links |= {"taken": taken, "idle": idle, "lost": lost}  # type: ignore[dict-item]
    world.call(calls.LAST, before)
    world.router.instances.jobs.clear()
    now = time.monotonic()
    world.router._mind_links(now)
    assert set(world.router.links) == {"large", "taken", "idle"}, "a container may come to one that is idle"
    world.router._mind_links(now + calls.KEPT_S)
    assert set(world.router.links) == {"large", "taken"} and not idle.has_greeted
    world.router.answered(taken, 0, before, 0, b"1")  # type: ignore[arg-type]
    world.router.callers._heed(world.caller, calls.FORGET, 0, call, 0, 0, b"")
    world.router._mind_links(now + calls.KEPT_S + 1)
    assert set(world.router.links) == {"large", "taken"}
    world.router._mind_links(now + 2 * calls.KEPT_S + 1)
    assert not world.router.links


def test_a_tenant_gets_nothing_of_another_s(world: World) -> None:
    world.function()
    link = Link("w")
    world.instance(link, 1)
    call = world.call()
    stranger, heard = Caller(1234, "a"), []
    stranger.wire = SimpleNamespace(say=heard.append, is_open=True)  # type: ignore[assignment]
    for kind in (calls.CANCEL, calls.PIECE, calls.MORE, calls.WANT, calls.FORGET, calls.ASK):
        world.router.callers._heed(stranger, kind, 0, call, 1, 0, b"")
    world.router.callers._heed(stranger, calls.CALL, 0, call, 1, 0, b"")
    assert [kind for kind, _, _ in link.said] == [calls.CALL], "the host hears nothing of it"
    world.router.answered(link, 0, call, 0, b'"secret"')  # type: ignore[arg-type]
    world.router.callers._heed(stranger, calls.ASK, 0, call, 1, 0, b"")
    assert not any(b"secret" in frame for frame in heard) and len(heard) == 4


def test_what_a_host_has_kept_of_an_instance_that_is_gone_is_for_its_tenant_alone(world: World) -> None:
    world.function()
    link, call = Link("w"), os.urandom(16)
    link.known = {call: ("done", 99, "theirs")}
    world.router.links["w"] = link  # type: ignore[assignment]
    for tenant, identity in (("a", "theirs"), ("b", "other")):
        row = {"version": 1, "state": "current", "spec": world.router.instances.functions["", "f"].specs[1]}
        row["spec"] = {**row["spec"], "fn": {**row["spec"]["fn"], "id": identity}}
        world.router.instances._set_function(tenant, "f", [row])
    heard: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for uid, tenant in enumerate(heard):
        caller = Caller(1000 + uid, tenant)

        def hear(frame: bytes, tenant: str = tenant) -> None:
            heard[tenant].append((calls.HEAD.unpack_from(frame)[1], calls.HEAD.unpack_from(frame)[2] & calls.ERROR))

        caller.wire = SimpleNamespace(say=hear, is_open=True)  # type: ignore[assignment]
        fn = world.router.instances.functions[tenant, "f"]
        caller.opened[fn.number] = fn
        world.router.callers._heed(caller, calls.CALL, 0, call, fn.number, 0, b"1")
        if tenant == "a":
            assert link.said == [(calls.ASK, call, 0)], "it is theirs"
            world.router.calls.clear()
    assert heard == {"a": [], "b": [(calls.ANSWER, calls.ERROR)]} and len(link.said) == 1


def test_who_waits_for_what_only_a_host_knows_is_told_when_that_is_lost(world: World) -> None:
    world.function()
    link, call = Link("w"), os.urandom(16)
    link.known = {call: ("running", 9, "one")}
    world.router.links["w"] = link  # type: ignore[assignment]
    world.router.callers._heed(world.caller, calls.ASK, 0, call, 1, 0, b"")
    world.router._mind_links(time.monotonic() + 2 * calls.KEPT_S)
    assert "w" in world.router.links and world.answers == []
    world.router.greeted(link)  # type: ignore[arg-type]
    assert link.said == [(calls.ASK, call, 0)] * 2, "over another connection it is asked again"
    world.router.lost_link(link)  # type: ignore[arg-type]
    assert world.answers == [(calls.ERROR, call)] and not world.router.callers.askers


def test_a_call_that_outlives_what_is_kept_frees_its_instance(world: World) -> None:
    world.function()
    link, before = Link("w"), os.urandom(16)
    link.known = {before: ("running", 1, "one"), os.urandom(16): ("done", 1, "one")}
    one = world.instance(link, 1, busy=1)
    real = HostLink.__new__(HostLink)
    real.wire, real.name, real.known, real._greeted_at = SimpleNamespace(), "x", link.known, 0.0  # type: ignore[assignment]
    real.mind()
    assert list(real.known) == [before]
    link.known = real.known
    call = world.call()
    world.router.answered(link, 0, before, 0, b"1")  # type: ignore[arg-type]
    assert one.busy == 0 and link.given() == [1] and call in one.calls


def test_who_has_opened_a_function_calls_what_is_deployed_under_its_name_later(world: World) -> None:
    world.function()
    world.router.instances._set_function("", "f", [])
    assert world.answers == [] and world.call() and len(world.answers) == 1, "there is none"
    world.function("two")
    fn = world.router.instances.functions["", "f"]
    world.caller.opened = {1: world.caller.opened.get(1) or fn}
    world.call()
    assert len(fn.queue) == 1


def test_a_spawned_call_that_a_host_knows_is_accepted_at_once(world: World) -> None:
    world.function()
    link, call, kinds = Link("w"), os.urandom(16), []
    link.known = {call: ("running", 9, "one")}
    world.router.links["w"] = link  # type: ignore[assignment]
    world.caller.wire = SimpleNamespace(say=lambda frame: kinds.append(calls.HEAD.unpack_from(frame)[1]), is_open=True)  # type: ignore[assignment]
    world.call(calls.SPAWN, call)
    world.router.answered(link, 0, call, 0, b"1")  # type: ignore[arg-type]
    assert kinds == [calls.BEGUN]


def test_calls_that_are_held_have_an_end_and_may_be_taken_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool.held.QUEUE_MAX", 2)
    world.function()
    link = Link("w")
    link.has_ever_greeted = False
    world.router.links["w"] = link  # type: ignore[assignment]
    held = [world.call(calls.LAST) for _ in range(3)]
    assert world.answers == [(calls.ERROR, held[2])]
    world.router.callers._heed(world.caller, calls.CANCEL, 0, held[0], 0, 0, b"")
    link.has_ever_greeted = True
    world.router.callers.mind_held(time.monotonic())
    assert [call.id for call in world.router.instances.functions["", "f"].queue] == [held[1]]


def test_an_answer_that_went_before_its_time_is_not_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool.answers._DONE_MANY", 1)
    world.function()
    link = Link("w")
    world.instance(link, 1)
    for call in (first := world.call(), world.call()):
        world.router.answered(link, 0, call, 0, b"1")  # type: ignore[arg-type]
    world.call(calls.LAST, first)
    assert world.answers[-1] == (calls.ERROR, first) and len(link.given()) == 2
