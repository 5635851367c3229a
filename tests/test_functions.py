"""Functions: handlers, calls, what they answer, what they cost, and what becomes of versions; real containers throughout."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cafs.errors import CafsError
from pool import calls, sockets
from pool.calling import Function
from pool.session import CallError, Pending, Session
from tests.conftest import BIN, SLOW
from tests.functioning import NEEDS, answer, call, deploy, functions_at, instances, outs, remove_all, shown, wait
from tests.pooling import cp, ok, processes

pytestmark = pytest.mark.needs(*NEEDS)
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """Not below pytest's own directory, through which the users of a container with users of its own do not come."""
    with tempfile.TemporaryDirectory(prefix="cafs-fn-") as place, pytest.MonkeyPatch.context() as patch:
        os.chmod(place, 0o711)
        with functions_at(Path(place), patch) as found:
            yield found


@pytest.fixture(autouse=True)
def alone(base: Path) -> Iterator[None]:
    """No function of the test before holds a place."""
    yield
    remove_all()


# jsonl:


def test_a_program_of_lines_answers_calls_and_maps_them_in_order() -> None:
    assert deploy("upper", "jsonl:/bin/upper") == "upper@1"
    assert call("upper", {"a": "x y"}).stdout == '{"A":"X Y"}\n', "one line of compact JSON"
    lines = [json.dumps(f"line {number}") for number in range(300)]
    done = cp("fn", "map", "upper", input="\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "".join(f"{line.upper()}\n" for line in lines)), done.stderr
    assert shown("upper")["calls"] == 301 and shown("upper")["errors"] == 0


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_program_that_breaks_the_protocol_fails_that_call_and_no_other(concurrency: int) -> None:
    deploy("odd", "jsonl:/bin/odd", "--concurrency", concurrency, "--max", 1)
    words = ["a", "half", "b", "two", "c", "nojson", "d", "die", "e", "flood", "f", "long", "g"]
    for word in words:
        done = call("odd", word)
        if word in ("half", "two", "nojson", "die", "long"):
            assert done.returncode == 1, (word, done)
        else:
            assert done.stdout == ('"ok"\n' if word == "flood" else f'"{word}"\n'), (word, done.stderr)
    assert "ended in the call, exit code 4" in call("odd", "die").stderr
    done = cp("fn", "map", "odd", "--parallel", "8", input="".join(f'"{word}"\n' for word in words * 3))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3 and "of 39 calls have failed" in done.stderr
    for word, one in zip(words * 3, found, strict=True):
        is_bad = word in ("half", "two", "nojson", "die", "long")
        assert one["error"]["kind"] in ("died", "protocol") if is_bad else one == ("ok" if word == "flood" else word), (
            word,
            one,
        )


def test_a_late_line_answers_no_other_call() -> None:
    """The program answers after 3 s whatever becomes of the call."""
    deploy("slow", "jsonl:/bin/slow", "--max", 1)
    assert call("slow", 1, "--timeout", 0.5).returncode == 124
    began = time.monotonic()
    assert answer("slow", 2) == "late" and time.monotonic() - began > 2.5, "the next call has its own answer"


def test_programs_of_one_container_serve_several_calls_at_once() -> None:
    """Each waits for the two others: one after the other they would wait for ever."""
    deploy("meet", "jsonl:/bin/meet", "--concurrency", 3, "--max", 1)
    assert cp("fn", "map", "meet", input="1\n2\n3\n").stdout == '"met"\n' * 3


def test_a_large_value_is_a_file_for_a_program_and_its_answer_may_be_one() -> None:
    deploy("size", "jsonl:/bin/size")
    assert answer("size", "x" * 2_000_000) == 2_000_002
    deploy("large", "jsonl:/bin/large")
    assert answer("large", 1) == "y" * 3_000_000
    deploy("evil", "jsonl:/bin/evil")
    done = call("evil", 1)
    assert done.returncode == 1 and "cannot be taken" in done.stderr and "root:" not in done.stdout


# python:


def test_a_handler_is_given_values_and_a_context_and_what_it_prints_is_logged_by_call() -> None:
    deploy("echo", "python:h:echo")
    for value in (None, True, 1.5, "ä\n\u2028", [1, {"a": []}], {"$x": 1}):
        assert answer("echo", value) == value
    deploy("say", "python:h:say")
    said = answer("say", "hello", "--timeout", 30)
    assert isinstance(said, dict) and 20 < said["left_s"] <= 30
    other = answer("say", "other")
    wait(lambda: "it says other" in ok("fn", "logs", "say"))
    assert sorted(ok("fn", "logs", "say", "--call", said["id"]).splitlines()) == ["an error hello", "it says hello"]
    rows = [json.loads(line) for line in ok("fn", "logs", "say", "--json").splitlines()]
    assert {(row["call"], row["text"]) for row in rows} >= {("", "setup"), (other["id"], "it says other")}  # type: ignore[index]


def test_an_exception_is_data_with_its_traceback_and_the_exit_code_says_which_kind_of_failure() -> None:
    deploy("bad", "python:h:bad")
    done = call("bad", 5)
    assert (done.returncode, done.stdout) == (1, "")
    assert "raise Odd" in done.stderr and "shim.py" not in done.stderr and "\ncpool: Odd: no 5\n" in done.stderr
    with Function("bad") as bad, pytest.raises(CallError) as caught:
        bad.call(6)
    assert (caught.value.kind, caught.value.type, caught.value.message) == ("raised", "Odd", "no 6")
    assert call("none", 1).returncode == 4 and "no function 'none'" in call("none", 1).stderr
    for value, more in (
        ("{", ()),
        ('{"$bytes": 5}', ()),
        ('{"$bytes": "a"}', ()),
        ("1", ("--timeout", "nan")),
        ("1", ("--timeout", "inf")),
    ):
        done = cp("fn", "call", "bad", *more, input=value)
        assert done.returncode == 2 and "internal" not in done.stderr, done.stderr
    assert cp("fn", "call", "bad", "--timeout", "1e9", "--key", os.fsdecode(b"\xff"), input="5").returncode == 1
    deploy("odd", "python:h:odd")
    for value in ("nan", "set", "exit", "deep", "interrupt"):
        assert call("odd", value).returncode == 1, value
    assert "KeyboardInterrupt" in call("odd", "interrupt").stderr, "raised, not died"
    for value in ("fork", "flood"):
        assert answer("odd", value) == value


def test_a_line_that_is_no_value_is_an_error_in_its_place_and_answers_do_not_wait_for_input() -> None:
    deploy("echo", "python:h:echo")
    done = cp("fn", "map", "echo", input='1\nbad\n3\n{"$bytes": 1}\n5')
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3 and [lines[at] for at in (0, 2, 4)] == [1, 3, 5] and len(lines) == 5
    assert "line 2 is no JSON" in lines[1]["error"]["message"] and "2 of 5" in done.stderr
    words = [BIN / "cpool", "fn", "map", "echo"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        for line in (b"1\n", b"2\n"):
            child.stdin.write(line)
            child.stdin.flush()
            assert child.stdout.readline() == line, "before there is a next one"
        child.stdin.write(b'"' + b"x" * 3_000_000 + b'"')  # without a newline
        child.stdin.close()
        assert len(child.stdout.read()) == 3_000_003 and child.wait(30 * SLOW) == 0


def test_what_a_spawned_call_may_not_give_is_said() -> None:
    deploy("pieces", "python:h:pieces")
    done = cp("fn", "result", "--wait", ok("fn", "spawn", "pieces", input="3").strip())
    assert done.returncode == 1 and "no bytes" in done.stderr


def test_a_handler_that_dies_fails_that_call_alone() -> None:
    deploy("die", "python:h:die")
    for _ in range(2):
        done = call("die", 1)
        assert done.returncode == 1 and "process has ended in the call" in done.stderr


def test_a_call_that_takes_too_long_ends_and_its_instance_serves_the_next() -> None:
    deploy("nap", "python:h:nap", "--max", 1, "--timeout", 1)
    assert call("nap", 30).returncode == 124
    (before,) = instances("nap")
    assert answer("nap", 0) == "slept"
    (after,) = instances("nap")
    assert before["id"] == after["id"], "the handler was interrupted, its instance goes on"
    deploy("threads", "python:h:nap", "--max", 1, "--concurrency", 2)
    done = cp("fn", "map", "threads", "--timeout", 1, input="0.1\n20\n0.2\n")
    assert [json.loads(line) if "err" not in line else "error" for line in done.stdout.splitlines()] == [
        "slept",
        "error",
        "slept",
    ]
    deploy("stubborn", "python:h:stubborn", "--max", 1)
    assert call("stubborn", 1, "--timeout", 1).returncode == 124
    wait(lambda: not instances("stubborn"), 25)  # 10 s later it is killed


@pytest.mark.parametrize("handler", ["together", "alltogether"])
def test_concurrency_is_of_threads_or_of_tasks(handler: str) -> None:
    deploy("many", f"python:h:{handler}", "--concurrency", 4, "--max", 1)
    done = cp("fn", "map", "many", input="4\n" * 8)
    assert max(map(int, done.stdout.split())) == 4 and len(instances("many")) == 1


@pytest.mark.parametrize("handler", ["several", "aseveral"])
def test_a_generator_gives_several_values_as_they_are_taken(handler: str) -> None:
    deploy("gen", f"python:h:{handler}")
    assert answer("gen", 100) == list(range(100)) and answer("gen", 0) == []
    with Function("gen") as gen:
        items = gen.stream(10**9)
        assert [next(items) for _ in range(1000)] == list(range(1000))  # type: ignore[call-overload]
        items.close()  # type: ignore[attr-defined]
        assert list(gen.stream(3)) == [0, 1, 2], "the one that was left is cancelled"


def test_large_values_and_bytes_go_both_ways() -> None:
    deploy("size", "python:h:size")
    deploy("make", "python:h:make")
    with Function("size") as size, Function("make") as make:
        assert size.call(b"\0\xff") == ["bytes", 2]
        assert size.call(b"x" * 20_000_001) == ["bytes", 20_000_001]
        assert size.call(["y" * 3_000_000]) == ["list", 1]
        assert make.call(1 << 20) == b"x" * (1 << 20)
        assert make.call(5_000_001) == b"x" * 5_000_001
        assert make.call(-3_000_000) == "y" * 3_000_000
        assert [len(one) for one in make.map([2_000_000] * 5)] == [2_000_000] * 5


def test_secrets_are_for_the_handler_and_its_image_may_bring_no_python() -> None:
    ok("secret", "set", "KEY", input="s3cret")
    deploy("secret", "python:h:secret", "--secret", "KEY")
    assert answer("secret", 1) == "s3cret"
    done = cp("fn", "deploy", "no", "--image", "b:1", "--handler", "python:h:echo")
    assert done.returncode == 1 and "cannot deploy 'no'" in done.stderr and "python3" in done.stderr, done.stderr


# Clients.


def test_python_calls_maps_and_awaits() -> None:
    deploy("echo", "python:h:echo", "--max", 2)
    deploy("bad", "python:h:bad")
    done: list[int] = []
    with Function("echo") as echo, Function("bad") as bad:
        assert list(echo.map(range(500), parallel=50, progress=done.append)) == list(range(500)) and done[-1] == 500
        assert sorted(echo.map(range(50), ordered=False)) == list(range(50))
        errors = list(bad.map([1, 2], return_errors=True))
        assert [one.message for one in errors] == ["no 1", "no 2"]
        with pytest.raises(CallError, match="no 1"):
            list(bad.map([1, 2]))
        assert echo.call("still") == "still"

        async def main() -> None:
            assert await asyncio.gather(*(echo.acall(number) for number in range(100))) == list(range(100))
            assert [one async for one in echo.amap(range(30), parallel=5)] == list(range(30))
            with pytest.raises(CallError, match="no 3"):
                await bad.acall(3)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(Function("nap").acall(30), 1)

        deploy("nap", "python:h:nap", "--max", 1)
        asyncio.run(main())
        assert answer("nap", 0) == "slept", "what was given up is cancelled"
        threads = [threading.Thread(target=lambda: done.append(echo.call(1))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done[-8:] == [1] * 8


def test_the_same_key_is_the_same_call() -> None:
    deploy("dice", "python:h:dice")
    first = answer("dice", 1, "--key", "k")
    assert answer("dice", 2, "--key", "k") == first and answer("dice", 1, "--key", "other") != first
    with Function("dice") as dice:
        assert dice.call(3, key="k") == first


def test_a_call_is_spawned_and_its_answer_fetched_later(base: Path) -> None:
    deploy("gate", "python:h:gate", "--max", 1)
    deploy("gen", "python:h:several")
    number = ok("fn", "spawn", "gate", input="1").strip()
    early = cp("fn", "result", number)
    assert early.returncode == 6 and "the call is" in early.stderr
    (outs(base, "gate")[0] / "go").touch()
    assert ok("fn", "result", "--wait", number) == ok("fn", "result", number) == '"through"\n'
    assert ok("fn", "result", "--wait", ok("fn", "spawn", "gen", input="3").strip()) == "[0,1,2]\n"
    assert cp("fn", "result", "0" * 32).returncode == 4 and cp("fn", "result", "x").returncode == 4


def test_a_map_is_resumed_where_it_was(tmp_path: Path) -> None:
    deploy("odd", "jsonl:/bin/odd")
    words = ["a", "die", "b", "c"]
    given = "".join(f'"{word}"\n' for word in words)
    journal = tmp_path / "journal"
    first = cp("fn", "map", "odd", "--journal", journal, input=given)
    assert first.returncode == 3 and len(first.stdout.splitlines()) == 4
    second = cp("fn", "map", "odd", "--journal", journal, "--resume", input=given.replace("die", "d"))
    assert (second.returncode, second.stdout) == (0, '"d"\n')


# Life.


def test_an_idle_function_has_no_instance_and_the_next_call_starts_one() -> None:
    deploy("echo", "python:h:echo", "--idle", 4 * SLOW)  # longer than two commands of ours take
    assert answer("echo", 1) == 1 and len(instances("echo")) == 1
    wait(lambda: not instances("echo"), 14)
    assert answer("echo", 2) == 2
    wait(lambda: "teardown" in ok("fn", "logs", "echo"), 14)
    assert shown("echo")["cold_share"] == 0.5
    deploy("kept", "python:h:echo", "--idle", 0.5, "--min", 1)
    assert answer("kept", 1) == 1
    (one,) = instances("kept")
    time.sleep(2)  # four times as long as it may be idle
    assert [found["id"] for found in instances("kept")] == [one["id"]]


def test_another_version_gets_the_calls_when_it_is_ready_and_the_one_before_can_come_back() -> None:
    deploy("v", "python:h:version", "-e", "VERSION=1")
    deploy("nap", "python:h:nap", "--max", 1)
    running: list[object] = []
    thread = threading.Thread(target=lambda: running.append(answer("nap", 3)))
    thread.start()
    wait(lambda: shown("nap")["running"] == 1)
    assert deploy("nap", "python:h:echo") == "nap@2"
    assert answer("nap", 7) == 7, "the new one, at once"
    thread.join()
    assert running == ["slept"], "what runs may end"
    assert deploy("v", "python:h:version", "-e", "VERSION=2") == "v@2" and answer("v", 0) == "2"
    done = cp("fn", "deploy", "v", "--image", "p:1", "--handler", "python:h:none", "--cpus", "0.4", "-e", "PYTHONPATH=/code")
    assert done.returncode == 1 and "AttributeError" in done.stderr and answer("v", 0) == "2", "a bad one changes nothing"
    assert ok("fn", "rollback", "v") == "v@1\n" and answer("v", 0) == "1"
    assert ok("fn", "rollback", "v") == "v@2\n" and answer("v", 0) == "2"
    ok("fn", "rm", "v")
    assert call("v", 0).returncode == 4 and cp("fn", "rm", "v").returncode == 4
    wait(lambda: not instances("v"))


def test_code_is_added_to_an_image(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("def handle(v):\n    return ['mine', v]\n")
    ok("fn", "deploy", "c", "--image", "p:1", "--code", tmp_path / "src", "--handler", "python:mine:handle", "--cpus", "0.4")
    assert answer("c", 1) == ["mine", 1]
    words = ("submit", "--image", "b:1", "--code", f"{tmp_path}/src:/there", "--cpus", "0.3", "--")
    number = ok(*words, "sh", "-c", "pwd; cat mine.py").strip()
    assert cp("wait", number).returncode == 0 and ok("logs", number).splitlines()[:2] == ["/there", "def handle(v):"]
    bad = cp("submit", "--image", "b:1", "--code", tmp_path / "none", "--", "true")
    assert bad.returncode == 1 and "is no directory" in bad.stderr


def test_an_instance_that_does_nothing_gives_its_place_to_one_that_waits_for_it() -> None:
    deploy("a", "python:h:echo", "--cpus", os.cpu_count() or 1)
    assert answer("a", 1) == 1
    began = time.monotonic()
    deploy("b", "python:h:echo", "--cpus", os.cpu_count() or 1)
    assert answer("b", 2) == 2 and time.monotonic() - began < 30 * SLOW and not instances("a")
    number = ok("submit", "--no-container", "--cpus", os.cpu_count() or 1, "--", "true").strip()
    assert cp("wait", number, timeout=20).returncode == 0 and not instances("b"), "a plain job need not wait for it either"


def test_instances_that_end_before_they_are_ready_are_not_started_for_ever() -> None:
    deploy("x", "python:h:none", "--no-try")
    assert not instances("x"), "nothing is started before it is called"
    done = call("x", 1)
    assert done.returncode == 1 and "instances end before they are ready" in done.stderr and "AttributeError" in done.stderr
    tried = ok("jobs", "-a", "--json").count("\n")
    assert call("x", 1).returncode == 1 and ok("jobs", "-a", "--json").count("\n") == tried, "it is said, and nothing is tried"
    assert "AttributeError" in str(shown("x")["problem"])


def test_ten_thousand_calls_wait_and_one_more_is_refused(base: Path) -> None:
    """The first one ends when enough are refused."""
    deploy("gate", "python:h:gate", "--max", 1)
    with Function("gate") as gate:
        assert gate.call(0) == "through"
        (out,) = outs(base, "gate")
        kinds, answers = [], 0
        for one in gate.map([1] + [0] * 10_100, parallel=10_101, return_errors=True, ordered=False):
            kinds += [one.kind] if isinstance(one, CallError) else []
            answers += one == "through"
            if len(kinds) == 80:
                (out / "go").touch()
    assert set(kinds) == {"full"} and 80 <= len(kinds) <= 101 and answers == 10_101 - len(kinds)
    assert len(instances("gate")) == 1


def test_who_never_reads_costs_nobody_else_anything() -> None:
    deploy("make", "python:h:make", "--max", 1)
    lazy = sockets.connect(os.environ["CAFS_POOL"] + "/router")
    session = Session()
    session.ask("open", name="make", tenant="")
    lazy.sendall(session.out)
    reader = calls.Reader()
    (reply,) = list(reader.feed(lazy.recv(4096)))
    session.out = bytearray()
    for _ in range(200):
        session.begin(calls.said(reply[5])["number"], 1 << 20)
    lazy.sendall(session.out)
    wait(lambda: int(str(shown("make")["calls"])) >= 200, 30)
    assert answer("make", -3) == "yyy"
    lazy.close()


def test_what_the_first_instance_reads_is_the_image_s_profile_then(base: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("import json\ndef handle(v):\n    return v\n")
    (tmp_path / "src" / "unread").write_bytes(os.urandom(100_000))
    ok("fn", "deploy", "c", "--image", "p:1", "--code", tmp_path / "src", "--handler", "python:mine:handle", "--cpus", "0.4")
    image = str(shown("c")["image"])
    (made,) = (base / "store").glob(f"profiles/{image}/default")
    assert 1000 < made.stat().st_size < 30_000_000
    assert answer("c", 1) == 1


# What was wrong once.


def raw(name: str) -> tuple[socket.socket, Session, int]:
    """A connection to the router, and the number of a function there."""
    connection, session = sockets.connect(os.environ["CAFS_POOL"] + "/router"), Session()
    connection.settimeout(20 * SLOW)
    tag = session.ask("open", name=name, tenant="")
    connection.sendall(session.out)
    session.out = bytearray()
    while tag not in session.replies:
        session.feed(connection.recv(4096))
    return connection, session, int(session.replies[tag]["number"])


def test_values_of_any_shape_end_nothing_but_their_call() -> None:
    deploy("echo", "python:h:echo", "--max", 1)
    connection, session, number = raw("echo")
    for body, flags in (
        (b"[" * 100_000, calls.REFERENCE),
        (b'{"size": "x"}', calls.REFERENCE),
        (b"[" * 100_000, 0),
        (b"\xff", 0),
    ):
        call = os.urandom(16)
        session.pending[call] = Pending(b"", b"")
        connection.sendall(calls.frame(calls.CALL, call, body, flags=flags, a=number))
        while not session.pending[call].is_done:
            session.feed(connection.recv(1 << 16))
        with pytest.raises(CallError) as caught:
            session.take(call)
        assert caught.value.kind == "raised", (body[:20], caught.value)
    (one,) = instances("echo")
    deep = b'{"is":"open","name":"none","tag":' + b"[" * 950 + b"]" * 950 + b"}"
    connection.sendall(calls.frame(calls.CONTROL, body=deep))
    assert connection.recv(100) == b"", "who says that is no caller"
    assert answer("echo", 1) == 1 and instances("echo")[0]["id"] == one["id"], "the same host, the same instance"


def test_two_who_wait_for_one_large_answer_both_get_it_whole() -> None:
    deploy("make", "python:h:make", "--max", 1)
    found: list[bytes] = []

    def get() -> None:
        with Function("make") as make:
            found.append(make.call(7_000_000, key="one"))

    threads = [threading.Thread(target=get) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30 * SLOW)
    assert [one == b"x" * 7_000_000 for one in found] == [True] * 3


def test_a_first_instance_that_is_never_ready_fails_its_deploy() -> None:
    began = time.monotonic()
    words = ("fn", "deploy", "h", "--image", "p:1", "--handler", "python:h:echo", "--cpus", "0.3", "--start-timeout", "2")
    done = cp(*words, "-e", "PYTHONPATH=/code", "-e", "HANG=1")
    assert done.returncode == 1 and "not ready in time" in done.stderr and time.monotonic() - began < 20 * SLOW


def test_short_calls_are_no_more_at_once_than_is_said() -> None:
    """Only where one is served after the other are some sent ahead."""
    deploy("many", "python:h:later", "--concurrency", 2, "--max", 1)
    with Function("many") as many:
        assert max(many.map([0.001] * 300)) == 2


def test_a_long_line_of_any_letters_is_an_answer() -> None:
    deploy("letters", "jsonl:/bin/letters")
    assert answer("letters", 1) == "ж" * 400_000


def test_a_version_comes_back_while_its_instances_leave() -> None:
    deploy("v", "python:h:version", "-e", "VERSION=1", "-e", "SLOW_END=1")
    deploy("v", "python:h:version", "-e", "VERSION=2")
    ok("fn", "rollback", "v")
    assert answer("v", 0) == "1", "by a new one: those of before are on their way out"


@pytest.mark.parametrize("more", [("--zygote",), ("--concurrency", 2)], ids=["zygote", "two at once"])
def test_a_handler_that_leaks_is_ended_at_its_memory_and_only_its_call_fails(more: tuple[object, ...]) -> None:
    deploy("leak", "python:h:leak", "--memory", "64M", "--max", 1, *more)
    said = [cp("fn", "call", "leak", input="25") for _ in range(5)]
    assert {one.returncode for one in said} == {0, 1}
    assert all(one.stdout or "has ended in the call: it had no memory left" in one.stderr for one in said), said
    following = [one.stdout for one in said].index("") + 1
    assert said[following].stdout == "1\n", "the next is served by another"


# Zygotes.


def test_further_instances_are_forks_with_a_tmp_and_limits_of_their_own(base: Path) -> None:
    """Eight calls at once, so that there are several instances; each says where it is."""
    deploy("own", "python:h:own", "--zygote", "--max", 3, "--memory", "100M", "--cpus", "0.3")
    (first,) = instances("own")
    with Function("own") as own:
        found = list(own.map([0.5] * 12))
    by_pid = {one["pid"]: one for one in found}
    assert len(by_pid) >= 2 and len({one["tmp"] for one in by_pid.values()}) == len(by_pid), "a /tmp each"
    assert len({one["drawn"] for one in by_pid.values()}) == len(by_pid), "random numbers of its own each"
    assert {one["loaded"] for one in found} == {found[0]["loaded"]}, "loaded once"
    assert all(one["can_mount"] is False and one["begun"] == 1 for one in found)
    assert {one["job"] for one in found} >= {str(first["id"])} and len({one["job"] for one in found}) == len(by_pid)
    agent = next((base / "pool" / "agents").glob("*.local")).name
    for job in instances("own"):  # one may have come too late for a call
        if job["id"] != first["id"]:
            places = [Path("/sys/fs/cgroup", top, "cafs-jobs", agent, f"{job['id']}.1") for top in ("memory", "")]
            (place,) = filter(Path.exists, places)
            wait(lambda place=place: len((place / "cgroup.procs").read_text().split()) == 1)
            (limit,) = filter(Path.exists, (place / name for name in ("memory.limit_in_bytes", "memory.max")))
            assert int(limit.read_text()) == 100 << 20
            ok("cancel", job["id"], "--grace", "0")
            wait(lambda place=place: not place.exists())
    assert answer("own", 0)["job"] == str(first["id"]), "the others have ended, the first serves on"  # type: ignore[index]


def test_a_zygote_with_threads_is_not_forked_and_none_has_gpus() -> None:
    deploy("t", "python:h:threaded", "--zygote", "--max", 2, "-e", "THREAD=1", "--cpus", "0.3")
    with Function("t") as function:
        assert len(set(function.map([0.6] * 6))) == 2, "each in a container of its own"
    done = cp("fn", "deploy", "g", "--image", "p:1", "--handler", "python:h:echo", "--zygote", "--gpus", 1)
    assert done.returncode == 2 and "cannot be forked" in done.stderr
    assert cp("fn", "deploy", "g", "--image", "b:1", "--handler", "jsonl:/bin/upper", "--zygote").returncode == 2


@pytest.mark.parametrize("more", [("split",), ("split", "--concurrency", 4), ("asplit",)])
def test_a_process_that_a_handler_forks_answers_nothing_and_ends(more: tuple[object, ...]) -> None:
    deploy("split", f"python:h:{more[0]}", "--max", 1, *more[1:])
    for _ in range(3):
        assert [answer("split", value) for value in ("back", "raise", "exit")] == [0, 1, 3]
    assert len(instances("split")) == 1, "the same one still serves"
    deploy("ended", "python:h:ended", "--max", 1)
    assert answer("ended", 0) == -15, "a child of a handler ends by SIGTERM"


def test_a_process_that_was_forked_calls_over_a_connection_of_its_own() -> None:
    deploy("echo", "python:h:echo", "--max", 1)
    with Function("echo") as echo:
        assert echo.call(0) == 0
        items = echo.map(range(5), parallel=2)
        assert next(items) == 0
        reads, writes = os.pipe()
        children = []
        for number in range(4):
            children.append(os.fork())
            if not children[-1]:
                try:
                    signal.alarm(int(20 * SLOW))  # without a connection of its own it would wait for ever
                    found = [echo.call(number), asyncio.run(echo.acall(number))]
                    with pytest.raises(CafsError):
                        list(items)  # what has not come yet is its parent's
                    items.close()
                    os.write(writes, json.dumps(found).encode() + b"\n")
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        os.close(writes)
        with open(reads) as file:
            assert sorted(json.loads(line) for line in file) == [[number, number] for number in range(4)]
        assert list(items) == [1, 2, 3, 4], "no child has taken or cancelled its parent's calls"


def test_an_instance_whose_connection_ends_is_ended() -> None:
    deploy("hide", "python:h:hide", "--max", 1)
    for _ in range(3):
        assert "has ended in the call" in call("hide", 1).stderr
    wait(lambda: not instances("hide"))
    assert not processes(lambda words: b"h:hide" in words and words[0] == b"python3"), "no container is left"


def test_a_program_that_writes_before_it_is_asked_is_not_started_for_ever() -> None:
    done = cp("fn", "deploy", "greet", "--image", "b:1", "--handler", "jsonl:/bin/greet")
    assert done.returncode == 1 and "its program wrote 'hello' before it was asked" in done.stderr
    deploy("late", "jsonl:/bin/late-greet", "--max", 1)
    wait(lambda: not instances("late"), 60)
    assert "wrote 'hello' before" in str(shown("late")["problem"])


def test_the_time_limit_of_a_function_begins_with_the_call() -> None:
    deploy("nap", "python:h:nap", "--max", 1, "--timeout", 2 * SLOW)
    assert cp("fn", "map", "nap", input=f"{0.7 * SLOW}\n" * 6).stdout == '"slept"\n' * 6


@pytest.mark.needs(*NEEDS, "jq", "git")
def test_the_example_of_a_workflow_deploys_maps_and_goes_back_only_from_what_it_deployed(tmp_path: Path) -> None:
    """Its steps, as a runner takes them."""
    steps = yaml.safe_load((EXAMPLES / "functions.yml").read_text())["jobs"]["deploy"]["steps"]
    deploying, mapping, rolling_back = [step["run"] for step in steps if "run" in step]
    (tmp_path / "src").mkdir()
    code = tmp_path / "src" / "thumbnail.py"
    code.write_text("def handle(value):\n    return [value['path'], 1]\n")
    for name in ("a b.jpg", "c.jpg"):
        (tmp_path / name).touch()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    subprocess.run([BIN / "cafs-store", "tag", "p:1", "thumbnails:1"], check=True)

    def step(text: str) -> int:
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
        return subprocess.run(words, cwd=tmp_path, env=environment, check=False).returncode

    assert step(deploying) == 0 and step(mapping) == 0
    assert (tmp_path / "answers.jsonl").read_text() == '["a b.jpg",1]\n["c.jpg",1]\n'
    code.write_text("def handle(value):\n    raise ValueError\n")
    assert step(deploying) == 0 and step(mapping) == 3 and step(rolling_back) == 0
    assert step(mapping) == 0, "the version before is back"
    code.write_text("no python\n")
    assert step(deploying) == 1 and step(mapping) == 0, "nothing has changed"
    assert "steps.deploy.outcome == 'success'" in (EXAMPLES / "functions.yml").read_text()


def test_the_example_of_a_crontab_runs_as_cron_runs_it(base: Path, tmp_path: Path) -> None:
    lines = [line for line in (EXAMPLES / "functions.cron").read_text().splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    assert given["PATH"].startswith("/opt/cafs/bin:")
    environment = {"SHELL": "/bin/sh", "HOME": "/", "PATH": given["PATH"].replace("/opt/cafs/bin", str(BIN))}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("CAFS_")}
    (tmp_path / "customers.jsonl").write_text("1\n2\n")
    for name in ("collect", "report", "rebuild"):
        deploy(name, "python:h:echo")
    for line in lines[len(given) :]:
        command = line.split(None, 5)[5].replace("\\%", "%")
        command = re.sub("/var/log|/srv|/var/lib/report", str(tmp_path), command)
        done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), line
    assert (tmp_path / "collect.jsonl").read_text() == '{"since":"5m"}\n' and (tmp_path / "rebuild").read_text() == "{}\n"
