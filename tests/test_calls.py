"""Frames, values, specs: what carries calls, piece by piece, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs.errors import CafsError, UsageError
from cafs.removing import remove_tree
from pool import calls, functions, hosting, instance, loop, report, values
from pool.execution import Execution
from pool.hosted import Instance
from pool.routed import Call, Routed
from pool.session import CallError, Session, id_of
from pool.settings import Settings
from pool.spawned import Spawned
from pool.state import State, create
from pool.tokens import Token, tenant_of
from tests.waiting import SLOW

frames = st.tuples(
    st.integers(1, 12), st.integers(0, 255), st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1), st.binary(max_size=200),
)  # fmt: skip


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 70), max_size=60))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    given_frames: list[tuple[int, int, bytes, int, int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(calls.frame(kind, call, body, flags=flags, a=a, b=b) for kind, flags, call, a, b, body in given_frames)
    reader, found = calls.Reader(), []
    for size in [*cuts, len(data) + 1]:
        found += list(reader.feed(data[:size])) if data[:size] else []
        data = data[size:]
    assert found == given_frames


@given(st.binary(min_size=32, max_size=100))
def test_what_is_no_frame_is_refused_before_it_takes_memory(data: bytes) -> None:
    size, kind = calls.HEAD.unpack_from(data)[:2]
    try:
        found = list(calls.Reader().feed(data))
    except ValueError:
        return
    assert size <= calls.SIZE_MAX or not 1 <= kind <= 12 or not found
    for wrong in (calls.HEAD.pack(calls.SIZE_MAX + 1, 1, 0, 0, bytes(16), 0, 0), calls.HEAD.pack(0, 13, 0, 0, bytes(16), 0, 0)):
        with pytest.raises(ValueError, match="no frame begins so"):
            list(calls.Reader().feed(wrong))


@given(st.integers(0, 3 * calls.PIECE_SIZE + 5), st.randoms())
def test_a_value_comes_in_pieces_in_whatever_order(size: int, rng: object) -> None:
    import tempfile

    data = os.urandom(size)
    with tempfile.TemporaryDirectory() as place:
        pull = values.Pull(place, "x", json.dumps({"size": size}).encode(), 0)
        wanted = list(pull.first())
        while wanted:
            piece = wanted.pop(rng.randrange(len(wanted)))  # type: ignore[attr-defined]
            following = pull.take(piece, data[piece * calls.PIECE_SIZE : (piece + 1) * calls.PIECE_SIZE])
            wanted += [] if following is None else [following]
        assert pull.is_whole and (Path(place) / "x").read_bytes() == data
        pull.remove()
        assert not os.listdir(place)


def test_a_piece_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    pull = values.Pull(str(tmp_path), "x", b'{"size": 300000}', 0)
    for piece, data in ((0, b"short"), (1, b"x" * calls.PIECE_SIZE), (2, b""), (1 << 31, b"x")):
        with pytest.raises(ValueError, match="not asked for"):
            pull.take(piece, data)
    pull.take(0, b"x" * calls.PIECE_SIZE)
    with pytest.raises(ValueError, match="not asked for"):
        pull.take(0, b"x" * calls.PIECE_SIZE)
    for body in (b"{}", b'{"size": -1}', b'{"size": 1e30}', b'{"size": true}', b"[]", b'{"size": 99999999999999}'):
        with pytest.raises((ValueError, LookupError, TypeError)):
            values.Pull(str(tmp_path), "y", body, 0)


def test_an_answer_in_a_file_is_a_file_of_the_instance_and_nothing_else(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    (tmp_path / "secret").write_text("secret")
    (out / "link").symlink_to(tmp_path / "secret")
    (out / "dir").mkdir()
    os.mkfifo(out / "pipe")
    for name in ("link", "dir", "pipe", "none", "../secret", "", "a/b", "/etc/passwd", "."):
        with pytest.raises((ValueError, OSError)):
            values.Kept(str(out), str(kept), "x", json.dumps({"$ref": f"/run/cpool/out/{name}"}).encode())
    for body in (b"1", b"{}", b'{"$ref": 1}', b'{"$ref": "/run/cpool/in/x"}'):
        with pytest.raises((ValueError, LookupError, TypeError)):
            values.Kept(str(out), str(kept), "x", body)
    (out / "good").write_bytes(b"x" * 300_000)
    one = values.Kept(str(out), str(kept), "y", b'{"$ref": "/run/cpool/out/good"}')
    pieces = [next(iter(calls.Reader().feed(one.piece(bytes(16), number)))) for number in range(2)]
    assert b"".join(piece[5] for piece in pieces) == b"x" * 300_000 and [bool(piece[1] & calls.LAST) for piece in pieces] == [
        False,
        True,
    ]
    one.remove()
    assert (tmp_path / "secret").read_text() == "secret"


def test_what_a_router_says_that_is_not_of_its_protocol_is_an_error_of_ours() -> None:
    session = Session()
    call = session.begin(1, "x" * 2_000_000)
    for frame in (
        calls.frame(calls.ANSWER, call, b"[]", flags=calls.ERROR),
        calls.frame(calls.ANSWER, call, b'{"size": -4}', flags=calls.REFERENCE),
        calls.control("state", call="zz"),
        b"\xff" * 40,
    ):
        other = Session()
        other.pending = dict(session.pending)
        with pytest.raises(CafsError):
            other.feed(frame)
    session.feed(calls.frame(calls.ANSWER, call, b"1" * 5000))  # more digits than Python reads
    with pytest.raises(CallError, match="no JSON"):
        session.take(call)
    with pytest.raises(CafsError, match="no JSON"):
        session.begin(1, {1, 2})
    assert id_of("", "f", "k") != id_of("f", "", "k") and len(id_of("", "f", "k")) == 16


def test_numbers_of_many_functions_come_in_pieces_and_none_is_lost() -> None:
    session = Session()
    tag = session.ask("stats")
    pieces = [calls.control("stats", tag=tag, functions=[{"name": str(at)}], more=at < 2) for at in range(3)]
    session.feed(b"".join(pieces))
    assert [one["name"] for one in session.replies[tag]["functions"]] == ["0", "1", "2"] and not session.replies[tag]["more"]


def test_a_host_has_one_time_at_which_it_looks_after_its_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it becomes busy: each of several would go on for ever."""
    monkeypatch.setattr(hosting, "_TICK_S", 0.001)
    (tmp_path / "calls").mkdir()
    host = hosting.Host(str(tmp_path))
    host._tick()
    for _ in range(30):
        host._tick_within(hosting._TICK_S)
        host._loop.turn(0.002)
    deadline = time.monotonic() + 2 * hosting._IDLE_TICK_S * SLOW
    while len(host._loop._times) > 1:
        assert time.monotonic() < deadline, host._loop._times
        host._loop.turn(0.1)


def test_what_a_handler_left_goes_however_deep_it_is_and_nothing_else(tmp_path: Path) -> None:
    """Deeper than Python recurses, and than a path may be long."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "out").mkdir()
    at = os.open(tmp_path / "out", os.O_RDONLY)
    for number in range(3000):
        os.mkdir(f"removed.{number % 3}", dir_fd=at)
        os.symlink(tmp_path / "kept", "link", dir_fd=at)
        further = os.open(f"removed.{number % 3}", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = further
    os.close(at)
    remove_tree(str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept" / "file").read_text() == "kept"
    remove_tree(str(tmp_path / "absent"))
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(str(tmp_path / "link"))
    assert (tmp_path / "kept" / "file").exists()


def test_a_directory_in_place_of_an_answer_stays_with_its_instance(tmp_path: Path) -> None:
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match="no file"):
        values.Kept(str(tmp_path / "out"), str(tmp_path / "kept"), "y", b'{"$ref": "/run/cpool/out/x"}')
    assert list((tmp_path / "kept").iterdir()) == []


def test_connections_that_say_nothing_keep_nobody_away_and_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "calls").mkdir()
    host = hosting.Host(str(tmp_path))
    silent = []
    for _ in range(hosting._STRANGERS_MAX + 1):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(tmp_path / "calls" / "in" / "socket"))
        one.sendall(calls.frame(calls.CONTROL, calls.NOBODY, b"x" * 200_000)[:-1])
        silent.append(one)
        host._loop.turn(0.1)
    wires = list(host._strangers)
    assert len(wires) == hosting._STRANGERS_MAX and silent[0].recv(1) == b"", "the one that was silent longest has gone"
    for one in silent:
        one.close()
    while host._strangers:
        host._loop.turn(0.1)
    assert all(not wire._reader._held for wire in wires)


class Unheard:
    """A connection to nobody."""

    def say(self, frame: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


def test_an_instance_that_no_router_knows_yet_is_not_idle(tmp_path: Path) -> None:
    """The call for which it was begun is on its way: with a short --idle it ended before, and another machine was launched."""
    (tmp_path / "calls").mkdir()
    host = hosting.Host(str(tmp_path))
    about = {"concurrency": 1, "timeout_s": 9, "idle_s": 0.5, "id": "x"}
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            one = Instance(1, Unheard(), "1.1", about, str(tmp_path), process.pid, "", str(tmp_path / "outcome"))  # type: ignore[arg-type]
            one.is_ready = True
            host._mind(one, one.used + 60)
            assert not one.is_leaving
            host._router = Unheard()  # type: ignore[assignment]
            host._say_ready(one)
            host._mind(one, one.used + 0.4)
            assert not one.is_leaving
            host._mind(one, one.used + 0.6)
            assert one.is_leaving
        finally:
            process.kill()


def test_what_was_sent_ahead_takes_no_time_before_it_is_begun(tmp_path: Path) -> None:
    at, said = loop.Loop(), []
    doing = Execution(str(tmp_path), at, said.append)
    about = {"concurrency": 1, "timeout_s": 3, "idle_s": 1, "id": "x"}
    outcome = str(tmp_path / "outcome")
    one = Instance(1, Unheard(), "1.1", about, str(tmp_path), os.getpid(), "", outcome)  # type: ignore[arg-type]
    one.may_be_ahead = True
    ids = [os.urandom(16) for _ in range(3)]
    for call, ms in zip(ids, (0, 0, 2000), strict=True):
        doing.begin(call, one, 0, ms, b"1")
    doing.give_up_late(one, at.now + 2.5)
    assert [call.id for call in one.calls.values() if call.done] == [ids[2]], (
        "that one was to be there in 2 s, whatever happens"
    )
    doing.give_up_late(one, at.now + 3.5)
    assert [call.id for call in one.calls.values() if not call.done] == [ids[1]]
    one.close()


def test_a_call_that_fails_in_several_pieces_has_ended_once() -> None:
    session = Session()
    call = session.begin(1, 1)
    session.feed(calls.frame(calls.ANSWER, call, b'{"size": 9000000, "$ref": "x"}', flags=calls.REFERENCE))
    assert session.feed(calls.failed(call, "unknown", "gone") * 3) == [call]
    assert id_of("", "f", os.fsdecode(b"\xff")) != id_of("", "f", "x")


GOOD = {"name": "f", "handler": "python:a.b:c"}


@given(st.dictionaries(st.sampled_from([*GOOD, "concurrency", "max", "min", "idle_s", "timeout_s", "zygote", "x"]), st.one_of(st.none(), st.integers(-5, 10**6), st.floats(), st.text(max_size=5), st.booleans())))  # fmt: skip
def test_a_function_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    try:
        found = functions.check({**GOOD, **wrong})
    except UsageError:
        return
    assert 1 <= found["concurrency"] <= 1000 and found["min"] <= found["max"] <= 1000
    assert 0 < found["idle_s"] <= 86400 and instance.is_handler(found["handler"])


def test_handlers_are_of_two_kinds() -> None:
    for good in ("python:a:b", "python:a.b.c:d", "jsonl:cat", "jsonl:/bin/sh -c 'x y'"):
        assert instance.is_handler(good), good
    for bad in (
        "",
        "python:a",
        "python:a:b:c",
        "python:a-b:c",
        "python::c",
        "jsonl:",
        "jsonl:'",
        "bash:x",
        "jsonl:a\0",
        None,
        1,
    ):
        assert not instance.is_handler(bad), bad


def test_an_instance_sees_the_gpus_that_it_was_given_and_no_others() -> None:
    asked = {"fn": {"handler": "python:a:b", "concurrency": 1}, "image": "i"}
    words = instance.words("/x/p.w/jobs/1.1", {**asked, "gpu_ids": [2, 5]}, ["crun", "--gpus", "device=2,5"])
    assert "CUDA_VISIBLE_DEVICES=0,1" in words and "device=2,5" in words
    assert "CUDA_VISIBLE_DEVICES=" in instance.words("/x/p.w/jobs/1.1", asked, ["crun"])


def test_what_a_container_is_to_enter_is_open_whatever_the_umask_of_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance.hostprocess, "ensure", lambda _: None)
    before = os.umask(0o077)
    try:
        instance.prepare(str(tmp_path), {"id": 1, "attempt": 1, "fn": {}})
    finally:
        os.umask(before)
    (place,) = (one for one in tmp_path.iterdir() if one.is_dir())
    modes = {one.name: one.stat().st_mode & 0o777 for one in (place, *place.iterdir()) if one.is_dir()}
    assert modes == {place.name: 0o755, "in": 0o755, "host": 0o755, "out": 0o777}


def test_what_instances_cost_is_their_part_of_their_machine(tmp_path: Path) -> None:
    create(str(tmp_path))
    state = State(str(tmp_path))
    fn = {"name": "f", "version": 1}
    spec = {"command": ["x"], "image": "i", "cpus": 2, "fn": fn, "memory": 0, "gpus": 0}
    machine = {"name": "m", "kind": "big", "zone": "z", "price": 1.6, "state": "ready", "intended_s": 0.0}
    state.put_machine(machine)
    for tenant, worker in (("", "m"), ("a", "m"), ("", "other")):
        job = state.job(state.submit({**spec, **({"tenant": tenant} if tenant else {})}))
        state.change(job, state="finished", worker=worker, code=0, started_s=1000.0, finished_s=4600.0)
    state.submit({"command": ["plain"], "image": "", "cpus": 1})
    settings = Settings(machines=({"name": "big", "cpus": 8},))
    rows = report.functions(state, settings, 0.0, 9999.0)
    assert [(row["tenant"], row["name"], row["started"], row["hours"], row["cost"]) for row in rows] == [
        ("", "f", 2, 2.0, pytest.approx(0.4)),
        ("a", "f", 1, 1.0, pytest.approx(0.4)),
    ]
    page = report.as_html({**report.make(state, settings, 1, 9999.0), "functions": rows})
    assert "<h2>Functions</h2>" in page and "<td>f</td>" in page


def test_a_token_is_known_by_its_digest_alone() -> None:
    import hashlib

    known = [Token("a", "", hashlib.sha256(b"one").hexdigest()), Token("b", "t", hashlib.sha256(b"two").hexdigest())]
    assert [tenant_of(known, given_one) for given_one in ("one", "two", "", "three")] == ["", "t", None, None]


def test_answers_that_were_noted_outlive_a_full_disk(tmp_path: Path) -> None:
    noted = Spawned(str(tmp_path))
    ids = [bytes([number]) * 16 for number in range(5)]
    for one in ids[:4]:
        noted.answered(one, "a", "f", calls.SPAWN, b"x" * 4000)
    assert noted.commit() == ([], "")
    (pages,) = noted._db.execute("PRAGMA page_count").fetchone()
    noted._db.execute(f"PRAGMA max_page_count={pages}")
    noted.answered(ids[4], "a", "f", calls.SPAWN, b"x" * (1 << 20))
    for _ in range(400):  # more than may be kept, were each try counted
        assert "full" in noted.commit()[1]
    noted._db.execute("PRAGMA max_page_count=1000000")
    assert noted.commit() == ([], "") and all(noted.answer(one) for one in ids)


def test_a_damaged_file_of_calls_is_set_aside_whole(tmp_path: Path) -> None:
    noted = Spawned(str(tmp_path))
    for number in range(200):
        noted.answered(os.urandom(16), "a", "f", calls.SPAWN, bytes(4000) + b"%d" % number)
    noted.commit()
    noted._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(tmp_path / "calls.db", "r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 40960)
    again = Spawned(str(tmp_path))
    assert again.without_answer() == [] and (tmp_path / "calls.db.damaged").exists()
    again.answered(b"1" * 16, "a", "f", calls.SPAWN, b"new")
    assert again.commit() == ([], "") and Spawned(str(tmp_path)).answer(b"1" * 16) == ("a", b"new")


def test_what_cannot_be_noted_is_not_accepted(tmp_path: Path) -> None:
    noted, fn = Spawned(str(tmp_path)), Routed("a", "f", 1)
    small, large = (Call(bytes([size]) * 16, fn, calls.SPAWN, b"x" * (size << 16), 0, 0) for size in (0, 20))
    noted.note(small, 0, None)  # type: ignore[arg-type]
    assert noted.commit() == ([(small, None)], "")
    noted._db.execute("PRAGMA max_page_count=20")
    noted.note(large, 0, None)  # type: ignore[arg-type]
    assert "full" in noted.commit()[1] and [one.id for one in Spawned(str(tmp_path)).without_answer()] == [small.id]
    noted.answered(small.id, "a", "f", calls.SPAWN, b"frame")
    assert noted.commit() == ([], "") and noted.answer(small.id) == ("a", b"frame") and not noted.without_answer()
