"""Containers that outlive the command that made them: log, exit code, exec, attach, stop, restarts; and whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import BIN
from tests.crunning import leftovers
from tests.pooling import is_alive, kill_all, processes, read_proc
from tests.waiting import SLOW, until

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox")
LOOP = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done"


def cr(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "crun"), *map(str, words)]
    options["timeout"] = options.get("timeout", 60) * SLOW
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def ok(*words: object, **options: object) -> str:
    done = cr(*words, **options)
    assert done.returncode == 0, (words, done.stderr)
    return str(done.stdout)


def background(name: str, *words: object) -> str:
    identity = ok("run", "-d", "--name", name, "--network", "none", *words).strip()
    assert re.fullmatch("[0-9a-f]{64}", identity)
    return identity


def state(name: str) -> dict[str, object]:
    found = json.loads(ok("inspect", name))["State"]
    assert isinstance(found, dict)
    return found


def monitors(identity: str) -> list[int]:
    """Pids of monitor processes of a container; a child that is about to become another program is none."""
    found = processes(lambda words: b"runner.monitor" in words and identity.encode() in words)
    parents = {pid: int(read_proc(pid, "stat").rpartition(b")")[2].split()[1] or 0) for pid in found if is_alive(pid)}
    return [pid for pid, parent in parents.items() if parent not in parents]


def kill_monitor(identity: str) -> None:
    kill_all(monitors(identity))
    assert until(lambda: not monitors(identity))


def test_a_container_in_the_background_keeps_log_and_exit_code(image: Path) -> None:
    identity = background("web", "b:1", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert ok("wait", "web") == "7\n"
    done = cr("logs", "web")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert state("web")["ExitCode"] == 7 and state("web")["Status"] == "exited"
    assert ok("ps", "-q") == "" and ok("ps", "-aq", "--no-trunc") == identity + "\n"
    assert "Exited (7)" in ok("ps", "-a")
    assert ok("rm", identity[:6]) == identity[:6] + "\n"
    assert cr("inspect", "web").returncode == 4


def test_without_rm_a_foreground_container_keeps_its_layer_and_its_log(image: Path) -> None:
    done = cr("run", "--name", "kept", "--network", "none", "b:1", "sh", "-c", "echo said; echo x > /new; exit 4")
    assert (done.stdout, done.returncode) == ("said\n", 4)
    assert ok("logs", "kept") == "said\n" and state("kept")["ExitCode"] == 4
    assert ok("diff", "kept") == "A /new\n"
    assert (
        subprocess.run(["tar", "xO"], input=cr_bytes("cp", "kept:/new", "-"), capture_output=True, check=True).stdout == b"x\n"
    )
    ok("start", "kept")
    ok("wait", "kept")
    assert ok("logs", "kept") == "said\nsaid\n"
    ok("rm", "kept")


def cr_bytes(*words: str, **options: object) -> bytes:
    return subprocess.run([BIN / "crun", *words], stdout=subprocess.PIPE, check=True, timeout=60 * SLOW, **options).stdout  # type: ignore[call-overload,no-any-return]


def test_logged_bytes_come_back_unchanged_whatever_they_are(image: Path, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(400_000)
    (tmp_path / "data").write_bytes(data)
    background("bin", "-v", f"{tmp_path}:/in:ro", "b:1", "cat", "/in/data")
    ok("wait", "bin")
    assert cr_bytes("logs", "bin") == data
    ok("rm", "bin")


def test_logs_follow_tail_since_and_times(image: Path) -> None:
    background("log", "b:1", "sh", "-c", "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.1; done")
    assert ok("logs", "-f", "log") == "".join(f"line {n}\n" for n in range(1, 7))
    assert ok("logs", "--tail", "2", "log") == "line 5\nline 6\n" and ok("logs", "-n", "0", "log") == ""
    lines = ok("logs", "-t", "log").splitlines()
    stamps = [line.split(" ")[0] for line in lines]
    assert len(lines) == 6 and stamps == sorted(stamps) and lines[0].endswith(" line 1")
    since = ok("logs", "--since", stamps[3], "log").splitlines()
    wanted = [f"line {number}" for number, stamp in enumerate(stamps, 1) if stamp >= stamps[3]]
    assert since == wanted and "line 4" in since, "what was read at once has one time"
    assert cr("logs", "--since", "yesterday", "log").returncode == 2
    ok("rm", "log")


def test_a_log_is_rotated_and_keeps_the_newest(image: Path) -> None:
    background("rot", "--log-opt", "max-size=20k", "--log-opt", "max-file=3", "b:1", "sh", "-c", "seq 1 20000")
    ok("wait", "rot")
    numbers = ok("logs", "rot").split()
    assert numbers[-1] == "20000" and [int(n) for n in numbers[1:]] == list(range(int(numbers[1]), 20001))
    assert len(list((image / "state" / "containers").glob("*/log*"))) == 3
    ok("rm", "rot")


def test_exec_has_its_own_streams_environment_and_exit_code(image: Path) -> None:
    background("ex", "-e", "A=outer", "-w", "/tmp", "b:1", "sh", "-c", LOOP)
    assert ok("exec", "ex", "sh", "-c", "echo $A; pwd; id -u") == "outer\n/tmp\n0\n"
    done = cr(
        "exec", "-i", "-e", "A=inner", "-u", "joe", "-w", "/", "ex", "sh", "-c", "cat; echo $A $HOME; pwd; exit 9", input="in\n"
    )
    assert (done.stdout, done.returncode) == ("in\ninner /home/joe\n/\n", 9)
    assert cr("exec", "ex", "nothing").returncode == 127 and cr("exec", "ex", "/bin/data").returncode == 126
    assert cr("exec", "nobody", "true").returncode == 125
    assert ok("exec", "-t", "ex", "tty").startswith("/dev/pts/")
    ok("exec", "-d", "ex", "sh", "-c", "echo side > /side")
    assert until(lambda: cr("exec", "ex", "cat", "/side").stdout == "side\n")
    assert ok("stop", "ex") == "ex\n" and state("ex")["ExitCode"] == 3
    done = cr("exec", "ex", "true")
    assert done.returncode == 125 and "does not run" in done.stderr
    ok("rm", "ex")


def test_stop_sends_the_signal_waits_and_kills(image: Path) -> None:
    background(
        "soft", "--stop-signal", "USR1", "b:1", "sh", "-c", "trap 'exit 11' USR1; echo ready; while :; do sleep 0.05; done"
    )
    background("hard", "--stop-timeout", "1", "b:1", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    assert until(lambda: all(cr("logs", name).stdout == "ready\n" for name in ("soft", "hard")))
    ok("stop", "soft")
    assert state("soft")["ExitCode"] == 11
    began = time.monotonic()
    ok("stop", "hard")
    assert 0.9 < time.monotonic() - began < 9 * SLOW and state("hard")["ExitCode"] == 137
    assert cr("kill", "hard").returncode == 1
    done = cr("stop", "nobody", "soft")
    assert done.returncode == 4 and done.stdout == "soft\n" and "no container 'nobody'" in done.stderr
    ok("rm", "soft", "hard")


def test_kill_pause_and_wait(image: Path) -> None:
    background("one", "b:1", "sh", "-c", "trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done")
    assert until(lambda: cr("logs", "one").stdout == "ready\n")
    ok("kill", "-s", "HUP", "one")
    assert until(lambda: cr("logs", "one").stdout == "ready\nhup\n")
    ok("pause", "one")
    assert state("one")["Paused"] is True and "(Paused)" in ok("ps") and cr("exec", "one", "true").returncode == 125
    ok("unpause", "one")
    assert ok("exec", "one", "echo", "on") == "on\n"
    ok("pause", "one")
    with subprocess.Popen([BIN / "crun", "wait", "one"], stdout=subprocess.PIPE, text=True) as waiting:
        ok("kill", "one")  # also if it is paused
        assert waiting.communicate(timeout=20 * SLOW)[0] == "137\n"
    done = cr("rm", "one")
    assert done.returncode == 0


def test_rm_refuses_what_runs_unless_forced(image: Path) -> None:
    background("busy", "b:1", "sleep", "60")
    done = cr("rm", "busy")
    assert done.returncode == 6 and "rm -f" in done.stderr
    ok("rm", "-f", "busy", "nobody")
    assert ok("ps", "-aq") == ""


def test_restart_policies(image: Path) -> None:
    background("fail", "--restart", "on-failure:2", "b:1", "sh", "-c", "echo run; exit 5")
    background("fine", "--restart", "on-failure", "b:1", "true")
    background("always", "--restart", "always", "b:1", "sh", "-c", "echo run; sleep 0.2")
    assert ok("wait", "fail") == "5\n" and ok("logs", "fail") == "run\n" * 3
    assert json.loads(ok("inspect", "fail"))["RestartCount"] == 2
    assert ok("wait", "fine") == "0\n" and json.loads(ok("inspect", "fine"))["RestartCount"] == 0
    assert until(lambda: ok("logs", "always").count("run") >= 3)
    ok("stop", "always")
    count = ok("logs", "always")
    assert state("always")["Status"] == "exited"
    ok("restart", "always")
    assert until(lambda: ok("logs", "always") > count)
    ok("rm", "-f", "fail", "fine", "always")
    assert cr("run", "-d", "--rm", "--restart", "always", "b:1", "true").returncode == 125


def test_a_killed_monitor_costs_no_byte_and_not_the_exit_code(image: Path, tmp_path: Path) -> None:
    """Its successor carries on: what is written meanwhile waits in the pipes."""
    writes = "i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); sleep 0.01; done"
    identity = background(
        "mm", "-v", f"{tmp_path}:/go", "b:1", "sh", "-c", f"{writes}; until test -f /go/go; do sleep 0.02; done; exit 6"
    )
    for _ in range(8):
        time.sleep(0.3)  # the moment is what is tested
        kill_monitor(identity)
        ok("ps")
        assert until(lambda: len(monitors(identity)) == 1)
    (tmp_path / "go").touch()
    code = ok("wait", "mm")
    assert ok("logs", "mm").split() == [str(n) for n in range(300)]
    assert code == ("6\n" if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15) else code)
    ok("rm", "mm")


def test_what_nobody_saw_the_end_of_has_an_unknown_exit_code(image: Path, tmp_path: Path) -> None:
    wait = "until test -f /go/go; do sleep 0.02; done"
    identity = background("uu", "-v", f"{tmp_path}:/go", "b:1", "sh", "-c", f"{wait}; echo late; exit 6")
    kill_monitor(identity)
    (tmp_path / "go").touch()
    pid = int(json.loads((image / "state" / "containers" / identity / "state.json").read_text())["pid"])
    assert until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert "Exited (unknown)" in ok("ps", "-a") and ok("wait", "uu") == "unknown\n"
    assert ok("logs", "uu") == "late\n", "it is in the log what was written when nobody watched"
    ok("rm", "uu")


def holder_of(image: Path, identity: str) -> int:
    return int(json.loads((image / "state" / "containers" / identity / "state.json").read_text())["holder"]["pid"])


def test_a_terminal_outlives_a_killed_monitor_and_who_held_it_ends_with_the_container(image: Path) -> None:
    identity = background("tt", "-t", "b:1", "sh", "-c", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.02; done")
    holder = holder_of(image, identity)
    for _ in range(3):
        assert until(lambda: ok("logs", "tt").count("tick") > 3)
        kill_monitor(identity)
    before = ok("logs", "tt").count("tick")
    assert until(lambda: ok("logs", "tt").count("tick") > before + 5)
    assert state("tt")["Running"]
    ok("stop", "-t", "0", "tt")
    assert until(lambda: not os.path.exists(f"/proc/{holder}"))
    numbers = [int(line.split()[1]) for line in ok("logs", "tt").splitlines()]
    assert numbers == sorted(numbers) and len(numbers) > 10
    ok("rm", "tt")


def test_two_commands_that_find_a_dead_monitor_start_one_successor(image: Path) -> None:
    identity = background("two", "b:1", "sh", "-c", LOOP)
    for _ in range(3):
        kill_monitor(identity)
        commands = [subprocess.Popen([BIN / "crun", "ps", "-q"], stdout=subprocess.PIPE) for _ in range(6)]
        assert all(command.communicate(timeout=30 * SLOW)[0] == identity[:12].encode() + b"\n" for command in commands)
        assert until(lambda: len(monitors(identity)) == 1)
    ok("stop", "two")
    assert state("two")["ExitCode"] == 3
    ok("rm", "two")


def test_a_monitor_is_small(image: Path) -> None:
    identity = background("small", "b:1", "sleep", "60")
    assert until(lambda: len(monitors(identity)) == 1)
    (pid,) = monitors(identity)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    rss_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    assert rss_kb <= 15_000
    ok("rm", "-f", "small")


def test_a_command_killed_while_it_starts_a_container_leaves_all_or_nothing(image: Path) -> None:
    for delay_ms in range(0, 240, 12):
        child = subprocess.Popen(
            [BIN / "crun", "run", "-d", "--name", "early", "--network", "none", "b:1", "sleep", "0.4"], stdout=-3
        )
        time.sleep(delay_ms / 1000)  # the moment is what is tested
        child.kill()
        child.wait()
        assert until(lambda: "Up" not in ok("ps")), delay_ms
        found = ok("ps", "-aq").split()
        assert len(found) <= 1
        if found:
            ok("rm", "-f", *found)
    assert until(lambda: not [one for one in leftovers(image) if "/alive/" in one or "/containers/" in one or "cgroup" in one])


def test_attach_carries_input_output_and_the_exit_code(image: Path) -> None:
    background("cat", "-i", "b:1", "sh", "-c", "while read x; do echo got $x; done; echo end >&2; exit 6")
    done = cr("attach", "cat", input="one\ntwo\n")
    assert (done.stdout, done.stderr, done.returncode) == ("got one\ngot two\n", "end\n", 6)
    ok("rm", "cat")
    ok("create", "-i", "--name", "made", "--network", "none", "b:1", "cat")
    assert ok("start", "-ai", "made", input="through\n") == "through\n"
    ok("rm", "made")


def read_until(master: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 15 * SLOW
    while wanted not in seen:
        assert select.select([master], [], [], max(deadline - time.monotonic(), 0))[0], seen
        seen += os.read(master, 4096)
    return seen


@pytest.mark.parametrize("keys", [(None, b"\x10\x11"), ("ctrl-a,d", b"\x01d")])
def test_a_terminal_can_be_left_by_its_keys_and_attached_again(image: Path, keys: tuple[str | None, bytes]) -> None:
    background("tty", "-it", "b:1", "sh")
    for round_number in range(2):
        master, slave = pty.openpty()
        command = [BIN / "crun", "attach", *(["--detach-keys", keys[0]] if keys[0] else []), "tty"]
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as child:
            os.close(slave)
            os.write(master, b"echo a$((40+%d))z\n" % round_number)
            read_until(master, b"a%dz" % (40 + round_number))
            os.write(master, keys[1])
            assert child.wait(20 * SLOW) == 0
        os.close(master)
        assert state("tty")["Running"] is True
    ok("rm", "-f", "tty")


@pytest.mark.parametrize("flags", [(), ("--rm",)])
def test_a_foreground_terminal_that_is_left_goes_on_in_the_background(image: Path, flags: tuple[str, ...]) -> None:
    master, slave = pty.openpty()
    command = [BIN / "crun", "run", *flags, "-it", "--name", "left", "--network", "none", "b:1", "sh"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as child:
        os.close(slave)
        os.write(master, b"echo a$((40+2))z\n")
        read_until(master, b"a42z")
        os.write(master, b"\x10\x11")
        assert child.wait(20 * SLOW) == 0
    os.close(master)
    assert state("left")["Running"] is True
    assert ok("exec", "left", "echo", "on") == "on\n"
    identity = json.loads(ok("inspect", "left"))["Id"]
    assert until(lambda: len(monitors(identity)) == 1)
    master, slave = pty.openpty()
    with subprocess.Popen(
        [BIN / "crun", "attach", "left"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as child:
        os.close(slave)
        os.write(master, b"exit 5\n")
        assert child.wait(20 * SLOW) == 5
    os.close(master)
    if flags:
        assert until(lambda: ok("ps", "-aq") == "")
    else:
        assert ok("wait", "left") == "5\n" and "a42z" in ok("logs", "left")
        ok("rm", "left")


def test_a_terminal_gets_the_size_of_ours(image: Path) -> None:
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    background("size", "b:1", "sleep", "60")
    command = [BIN / "crun", "exec", "-it", "size", "sleep", "61"]

    def size() -> bytes:
        lines = [line.split() for line in ok("top", "size").splitlines() if line.endswith("sleep 61")]
        try:
            with open(f"/proc/{lines[0][0]}/fd/0", "rb", buffering=0) as terminal:
                return fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))[:4]
        except (OSError, IndexError):
            return b""

    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as child:
        assert until(lambda: size() == struct.pack("HH", 33, 77))
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 99, 0, 0))
        child.send_signal(signal.SIGWINCH)
        assert until(lambda: size() == struct.pack("HH", 44, 99))
        ok("rm", "-f", "size")
        child.wait(20 * SLOW)
    os.close(slave)
    os.close(master)


def test_names_are_unique_can_be_changed_and_found_by_prefix(image: Path) -> None:
    identity = ok("create", "--name", "first", "b:1", "true").strip()
    assert cr("create", "--name", "first", "b:1", "true").returncode == 125
    ok("rename", "first", "second")
    assert json.loads(ok("inspect", identity[:10]))["Name"] == "second" and cr("inspect", "first").returncode == 4
    given = json.loads(ok("inspect", ok("create", "b:1", "true").strip()))["Name"]
    assert re.fullmatch("[a-z]+_[a-z]+[0-9]*", given)
    assert ok("ps", "-a", "--filter", "name=second", "-q", "--no-trunc") == identity + "\n"
    ok("rm", "second", given)
    for words in (("ps", "--filter", "colour=red"), ("ps", "-n", "few"), ("volume",), ("network", "paint")):
        assert cr(*words).returncode == 2, "also where there is nothing to be listed"


def test_a_cidfile_is_written_once(image: Path, tmp_path: Path) -> None:
    identity = ok("create", "--cidfile", tmp_path / "cid", "b:1", "true").strip()
    assert (tmp_path / "cid").read_text() == identity
    done = cr("create", "--cidfile", tmp_path / "cid", "b:1", "true")
    assert done.returncode == 125 and "is there already" in done.stderr
    assert ok("ps", "-aq", "--no-trunc") == identity + "\n"
    ok("rm", identity)


def test_healthchecks_tell_well_from_unwell(image: Path) -> None:
    check = ["--health-cmd", "cat /fine", "--health-interval", "200ms", "--health-retries", "2"]
    background("ill", *check, "b:1", "sleep", "60")
    assert until(lambda: state("ill")["Health"]["Status"] == "unhealthy")  # type: ignore[index]
    assert "(unhealthy)" in ok("ps") and "can't open" in str(state("ill")["Health"])
    ok("exec", "ill", "touch", "/fine")
    assert until(lambda: state("ill")["Health"]["Status"] == "healthy")  # type: ignore[index]
    ok("rm", "-f", "ill")
    background(
        "slow", "--health-cmd", "sleep 9", "--health-interval", "100ms", "--health-timeout", "200ms", "b:1", "sleep", "60"
    )
    assert until(lambda: "took longer" in str(state("slow")))
    ok("rm", "-f", "slow")


def test_a_timeout_ends_a_container_in_both_places(image: Path) -> None:
    background("late", "--timeout", "1", "b:1", "sleep", "60")
    assert ok("wait", "late") == "137\n"
    assert cr("run", "--rm", "--network", "none", "--timeout", "1", "b:1", "sleep", "60").returncode == 137
    ok("rm", "late")


def test_memory_that_runs_out_is_told(image: Path) -> None:
    background("oom", "--memory", "16m", "b:1", "sh", "-c", "x=$(cat /dev/zero | tr '\\0' a)")
    assert ok("wait", "oom") == "137\n"
    assert state("oom")["OOMKilled"] is True
    usage = json.loads(ok("inspect", "oom"))["Usage"]
    assert usage["memory_limit"] == 16 << 20 and usage["cpu_ns"] > 0
    ok("rm", "oom")


def test_an_outcome_is_there_when_the_cgroups_have_gone(image: Path, tmp_path: Path) -> None:
    """Also of a container that is removed at its end, and of one whose crun is killed."""
    words = ("--rm", "--network", "none", "--outcome", tmp_path / "o", "--memory", "16m", "b:1", "sh", "-c")
    assert cr("run", *words, "x=$(cat /dev/zero | tr '\\0' a)").returncode == 137
    assert json.loads((tmp_path / "o").read_text())["oom_kills"] == 1
    assert cr("run", *words, "exit 3").returncode == 3
    assert json.loads((tmp_path / "o").read_text())["oom_kills"] == 0
    with subprocess.Popen([BIN / "crun", "run", *map(str, words), "sleep 60"]) as child:
        assert until(lambda: ok("ps", "-q")) and (tmp_path / "o").read_text() == "", "nothing yet"
        child.kill()
    assert until(lambda: (tmp_path / "o").read_text()) and json.loads((tmp_path / "o").read_text())["memory_limit"] == 16 << 20
    assert until(lambda: not leftovers(image))


def test_cp_goes_both_ways_as_files_and_as_tar(image: Path, tmp_path: Path) -> None:
    for name, words in (("up", ("run", "-d")), ("down", ("create",))):
        ok(*words, "--name", name, "--network", "none", "b:1", "sleep", "60")
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / "f").write_text("content")
        (tmp_path / "in" / "link").symlink_to("deep") if not (tmp_path / "in" / "link").is_symlink() else None
        ok("cp", tmp_path / "in", f"{name}:/tmp")
        ok("cp", tmp_path / "in" / "deep" / "f", f"{name}:/etc/other")
        ok("cp", f"{name}:/tmp/in", tmp_path / f"out-{name}")
        assert (tmp_path / f"out-{name}" / "deep" / "f").read_text() == "content"
        assert os.readlink(tmp_path / f"out-{name}" / "link") == "deep"
        ok("cp", f"{name}:/etc/other", tmp_path / f"file-{name}")
        assert (tmp_path / f"file-{name}").read_text() == "content"
        archive = cr_bytes("cp", f"{name}:/tmp/in", "-")
        listed = subprocess.run(["tar", "t"], input=archive, capture_output=True, check=True).stdout.split()
        assert sorted(listed) == [b"in/", b"in/deep/", b"in/deep/f", b"in/link"]
        subprocess.run([BIN / "crun", "cp", "-", f"{name}:/home"], input=archive, check=True, timeout=30 * SLOW)
        assert b"content" in cr_bytes("cp", f"{name}:/home/in/deep/f", "-")
        assert cr("cp", f"{name}:/nothing", tmp_path).returncode == 4
    assert cr("cp", "up:/a", "down:/b").returncode == 2
    ok("rm", "-f", "up", "down")


def test_cp_follows_no_link_out_of_the_container(image: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    (tmp_path / "victim").mkdir()
    background(
        "evil",
        "b:1",
        "sh",
        "-c",
        f"ln -s {tmp_path} /out; ln -s {tmp_path}/secret /file; ln -s / /tmp/root; echo ready; sleep 60",
    )
    assert until(lambda: cr("logs", "evil").stdout == "ready\n")
    assert cr("cp", "evil:/out/secret", tmp_path / "got").returncode == 4
    assert cr("cp", "-L", "evil:/file", tmp_path / "got").returncode == 4, "in it there is no such file"
    ok("cp", "evil:/file", tmp_path / "got")
    assert os.path.islink(tmp_path / "got")
    (tmp_path / "got").unlink()
    assert cr("cp", "/etc/hostname", "evil:/out/victim/x").returncode != 0
    assert list((tmp_path / "victim").iterdir()) == []
    tar = subprocess.run(
        ["tar", "c", "-C", tmp_path, "--transform", "s,^victim,out/victim/new,", "victim"], capture_output=True, check=True
    )
    subprocess.run([BIN / "crun", "cp", "-", "evil:/"], input=tar.stdout, check=False, timeout=30 * SLOW, capture_output=True)
    assert list((tmp_path / "victim").iterdir()) == [] and (tmp_path / "secret").read_text() == "of the host"
    ok("rm", "-f", "evil")


def test_cp_takes_nothing_away_that_is_mounted(image: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("of the host")
    (tmp_path / "new").write_text("new")
    ok("run", "-d", "--name", "c1", "-v", f"{tmp_path}/conf:/etc/conf", "b:1", "sleep", "1000")
    for name in ("/etc/conf", "/etc/hosts"):
        done = cr("cp", f"{tmp_path}/new", f"c1:{name}")
        assert done.returncode and "busy" in done.stderr, done
    assert ok("exec", "c1", "cat", "/etc/conf") == "of the host"
    ok("rm", "-f", "c1")


def test_exec_does_not_wait_for_what_was_left_in_the_background(image: Path) -> None:
    ok("run", "-d", "--name", "c1", "b:1", "sleep", "1000")
    done = cr("exec", "c1", "sh", "-c", "sleep 900 & head -c 300000 /dev/zero; echo; echo said", timeout=60 * SLOW)
    assert done.returncode == 0 and done.stdout.endswith("\nsaid\n") and len(done.stdout) == 300_000 + 6
    ok("rm", "-f", "c1")


def test_volumes_are_kept_seeded_shared_and_removed(image: Path) -> None:
    def run(*words: object) -> str:
        return ok("run", "--rm", "--network", "none", *words)

    run("-v", "data:/etc", "b:1", "sh", "-c", "echo more >> /etc/group")
    assert "more" in run("-v", "data:/x", "b:1", "cat", "/x/group") and "joe" in run("-v", "data:/x", "b:1", "cat", "/x/group")
    assert run("-v", "empty:/etc:nocopy", "b:1", "sh", "-c", "cd /etc; echo *").split() == ["hostname", "hosts", "resolv.conf"]
    assert ok("volume", "ls", "-q").split() == ["data", "empty"]
    ok("create", "--name", "user", "-v", "data:/x", "-v", "/anonymous", "b:1", "true")
    assert cr("volume", "rm", "data").returncode == 6 and len(ok("volume", "ls", "-q").split()) == 3
    ok("rm", "-v", "user")
    assert ok("volume", "ls", "-q").split() == ["data", "empty"]
    assert json.loads(ok("volume", "inspect", "data"))[0]["Mountpoint"].endswith("/volumes/data/_data")
    run("-v", "/gone", "b:1", "true")
    assert ok("volume", "rm", "data", "empty") == "data\nempty\n" and ok("volume", "ls", "-q") == ""


def test_events_tell_what_happened_in_order(image: Path) -> None:
    background("ev", "--rm", "b:1", "true")
    assert until(lambda: '"destroy"' in ok("events", "--filter", "container=ev")) and ok("ps", "-aq") == ""
    rows = [json.loads(line) for line in ok("events", "--filter", "container=ev").splitlines()]
    assert [row["event"] for row in rows] == ["create", "start", "die", "destroy"] and rows[2]["exit_code"] == 0


def test_stats_and_top_show_what_runs(image: Path) -> None:
    background("st", "--memory", "32m", "b:1", "sh", "-c", LOOP)
    row = json.loads(ok("stats", "--no-stream", "--format", "json", "st"))
    assert row["Name"] == "st" and row["memory_limit"] == 32 << 20
    assert "sh -c trap" in ok("top", "st")
    ok("rm", "-f", "st")


def test_a_monitor_loads_nothing_that_is_slow(image: Path) -> None:
    slow = ["click", "rich", "dataclasses", "inspect", "typing", "subprocess", "asyncio", "logging", "zstandard", "shutil"]
    code = f"import sys, runner.monitor; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "[]\n"


def test_many_containers_at_once_leave_nothing(image: Path) -> None:
    def run(number: int) -> None:
        codes.append(cr("run", "--rm", "--network", "none", "b:1", "sh", "-c", f"exit {number}").returncode)

    codes: list[int] = []
    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == list(range(16))


def test_cp_of_a_container_that_does_not_run_sees_its_volumes_and_binds(image: Path, tmp_path: Path) -> None:
    (tmp_path / "bound").mkdir()
    (tmp_path / "x").write_text("kept")
    words = ("-v", "keep:/data", "-v", "homes:/home", "-v", f"{tmp_path}/bound:/b", "-v", "keep:/ro:ro")
    ok("create", "--name", "cold", "--network", "none", *words, "b:1", "cat", "/data/x", "/b/x")
    ok("cp", tmp_path / "x", "cold:/data/")
    ok("cp", tmp_path / "x", "cold:/b")
    assert "Read-only" in cr("cp", tmp_path / "x", "cold:/ro/y").stderr
    assert (tmp_path / "bound" / "x").read_text() == "kept"
    assert ok("start", "-a", "cold") == "keptkept"
    ok("cp", "cold:/home", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["joe"], "also what the image has in a volume that was new"
    assert ok("diff", "cold") == ""
    ok("rm", "cold")
    ok("volume", "rm", "keep", "homes")


def test_what_was_killed_can_be_started_or_removed_at_once(image: Path) -> None:
    background("again", "b:1", "sleep", "60")
    for _ in range(3):
        ok("kill", "again")
        ok("start", "again")
        assert state("again")["Running"] is True
    ok("kill", "again")
    ok("rm", "again")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("volume", "ls", "-q", "extra"), "unexpected argument 'extra'"),
        (("volume", "ls", "-qf", "lable=x"), "did you mean label?"),
        (("volume", "ls", "-f", "dangling=maybe"), "cannot be 'maybe'"),
        (("volume", "prune", "keep"), "unexpected argument 'keep'"),
        (("volume", "create", "--force", "x"), "unknown flag"),
        (("volume", "inspect"), "VOLUME is missing"),
        (("network", "ls", "-f", "x"), "is not K=V"),
        (("network", "prune", "x"), "unexpected argument"),
        (("port", "a", "80", "81"), "unexpected argument '81'"),
        (("ps", "--format", "{{.Names}}"), "no templates"),
        (("stats", "--format", "{{.Name}}"), "no templates"),
        (("inspect", "-f", "{{.Id}}", "a"), "no templates"),
        (("ps", "-f", "status=runing"), "did you mean running?"),
        (("events", "--filter", "container"), "is not K=V"),
        (("create", "-d", "b:1", "true"), "unknown flag '-d'"),
        (("pull", "x"), "cafs-index create docker://"),
    ],
)
def test_nothing_is_accepted_and_ignored(image: Path, words: tuple[str, ...], said: str) -> None:
    done = cr(*words)
    assert done.returncode in (2, 125) and said in done.stderr and done.stdout == ""


def test_filters_choose_what_is_listed(image: Path) -> None:
    ok("volume", "create", "keep")
    ok("volume", "create", "--label", "x=1", "temporary")
    assert ok("volume", "ls", "-qf", "label=x") == "temporary\n"
    ok("create", "--name", "qq", "--label", "p", "--label", "q", "-v", "temporary:/v", "b:1", "true")
    ok("create", "--name", "qqb", "--label", "p", "b:1", "true")
    assert ok("volume", "ls", "-q", "-f", "dangling=true") == "keep\n"

    def names(*filters: str) -> list[str]:
        words = [word for text in filters for word in ("--filter", text)]
        return sorted(json.loads(line)["Names"] for line in ok("ps", "-a", "--format", "json", *words).splitlines())

    assert names("name=qq") == ["qq", "qqb"] and names("name=^/?qq$") == ["qq"]
    assert names("name=^qq$", "name=qqb") == ["qq", "qqb"], "values of one key are alternatives"
    assert names("label=p", "label=q") == ["qq"], "but labels"
    assert names("name=qq", "status=created", "volume=temporary") == ["qq"]
    events = ok("events", "-f", "container=qq", "-f", "container=qqb", "-f", "event=create").splitlines()
    assert [json.loads(line)["name"] for line in events] == ["qq", "qqb"]
    ok("rm", "qq", "qqb")
    ok("volume", "prune", "-a", "--filter", "label=x")
    assert ok("volume", "ls", "-q") == "keep\n"
    ok("volume", "rm", "keep")


def test_following_a_log_ends_in_time_and_the_first_look_shows_what_nobody_had_read(image: Path) -> None:
    identity = background("talk", "b:1", "sh", "-c", "while :; do echo x; sleep 0.05; done")
    assert until(lambda: ok("logs", "talk"))
    assert ok("logs", "-f", "--until", "1ms", "talk", timeout=20).startswith("x\n")
    assert ok("logs", "-f", "--until", str(int(time.time()) + 1), "talk", timeout=20).startswith("x\n")
    ok("rm", "-f", "talk")
    identity = background("unread", "b:1", "sh", "-c", f"sleep 0.5; seq 9999; sleep 90.{os.getpid()}")
    kill_monitor(identity)
    assert until(lambda: subprocess.run(["pgrep", "-f", f"sleep 90.{os.getpid()}"], capture_output=True, check=False).stdout)
    time.sleep(1)  # nobody can tell from outside what is in a pipe
    assert ok("logs", "unread").split()[-1:] == ["9999"]
    ok("rm", "-f", "unread")


def test_containers_are_stopped_at_once(image: Path, tmp_path: Path) -> None:
    """Each ends by itself, and only when all have been asked."""
    names = [f"slow{number}" for number in range(4)]
    for name in names:
        asked = " -a ".join(f"-e /m/{one}" for one in names)
        script = f"trap 'touch /m/{name}' TERM; touch /m/up-{name}; until test {asked}; do sleep 0.05; done; exit 5"
        background(name, "-v", f"{tmp_path}:/m", "b:1", "sh", "-c", script)
    assert until(lambda: len(list(tmp_path.glob("up-*"))) == 4)
    done = cr("stop", "-t", int(40 * SLOW), *names[:2], "nobody", *names[2:])
    assert done.returncode == 4 and done.stdout.split() == names
    assert [state(name)["ExitCode"] for name in names] == [5] * 4
    assert ok("rm", "-f", "nobody", *names).split() == names


def test_cp_keeps_what_a_file_is_or_says_what_it_has_lost(image: Path, tmp_path: Path) -> None:
    here = tmp_path / "in"
    (here / "d").mkdir(parents=True)
    (here / "real").write_text("content")
    (here / "link").symlink_to("real")
    (here / "d" / "a").write_text("one")
    os.link(here / "d" / "a", here / "d" / "b")
    shutil.copy("/bin/true", here / "d" / "su")
    (here / "d" / "su").chmod(0o4755)
    os.setxattr(here / "real", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.mknod(here / "d" / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    ok("create", "--name", "cc", "--network", "none", "b:1", "true")
    ok("cp", f"{here}/.", "cc:/w")
    ok("cp", "-L", here / "link", "cc:/w/d")
    done = cr("cp", "cc:/w", tmp_path / "out")
    assert "have lost set-user-id bits or capabilities" in done.stderr and "were not copied" in done.stderr
    out = tmp_path / "out" / "d"
    assert (out / "a").stat().st_ino == (out / "b").stat().st_ino and not (out / "null").exists()
    assert stat.S_IMODE((out / "su").stat().st_mode) == 0o755 and not (out / "link").is_symlink()
    ok("cp", "-a", "cc:/w", tmp_path / "all")
    subprocess.run(
        ["tar", "x", "--xattrs", "--xattrs-include=*", "-C", tmp_path], input=cr_bytes("cp", "cc:/w", "-"), check=True
    )
    for place in (tmp_path / "all", tmp_path / "w"):
        assert stat.S_IMODE((place / "d" / "su").stat().st_mode) == 0o4755
        assert stat.S_ISCHR((place / "d" / "null").stat().st_mode) and (place / "d" / "a").stat().st_nlink == 2
        assert os.getxattr(place / "real", "security.capability") == os.getxattr(here / "real", "security.capability")
    archive = subprocess.run(["tar", "c", "--xattrs", "-C", tmp_path / "all", "."], capture_output=True, check=True).stdout
    subprocess.run([BIN / "crun", "cp", "-", "cc:/home"], input=archive, check=True, timeout=60 * SLOW)
    listed = subprocess.run(["tar", "tv"], input=cr_bytes("cp", "cc:/home/d", "-"), capture_output=True, check=True).stdout
    assert b"-rwsr-xr-x" in listed and b"\ncrw" in listed and b" link to d/a" in listed
    ok("rm", "cc")


def test_cp_writes_what_a_link_names_and_leaves_the_link(image: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    ok("create", "--name", "ll", "--network", "none", "b:1", "true")
    ok("cp", tmp_path / "old", "ll:/tmp/old")
    ok("cp", tmp_path / "link", "ll:/tmp/link")
    ok("cp", tmp_path / "new", "ll:/tmp/link")
    assert cr_bytes("cp", "ll:/tmp/old", "-").count(b"new") and b"link" in cr_bytes("cp", "ll:/tmp/link", "-")
    ok("cp", "-L", "ll:/tmp/link", tmp_path / "got")
    assert (tmp_path / "got").read_text() == "new" and not (tmp_path / "got").is_symlink()
    ok("cp", "ll:/tmp/old", tmp_path / "link")
    assert (tmp_path / "old").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert cr("cp", tmp_path / "new", "ll:/nothing/").returncode == 4 and cr("cp", "ll:/tmp/old/", tmp_path).returncode == 4
    assert cr("cp", f"{tmp_path}/new/", "ll:/tmp/x").returncode != 0
    ok("rm", "ll")


def test_a_command_with_a_terminal_may_run_detached_and_top_takes_the_words_of_ps(image: Path) -> None:
    background("term", "b:1", "sleep", "60")
    ok(
        "exec",
        "-dit",
        "term",
        "sh",
        "-c",
        "tty > /seen; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; echo end >> /seen",
    )
    assert until(lambda: ok("exec", "term", "cat", "/seen").splitlines()[-1:] == ["end"]), "nobody reads what it prints"
    assert ok("exec", "term", "cat", "/seen").startswith("/dev/pts/")
    head, *lines = ok("top", "term", "-eo", "pid,args").splitlines()
    assert head.split() == ["PID", "COMMAND"] and any(line.endswith("sleep 60") for line in lines) and len(lines) < 5
    assert cr("top", "term", "-eo", "args").returncode == 1
    ok("rm", "-f", "term")
