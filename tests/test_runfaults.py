"""Containers under fire: programs killed between two steps, slow and greedy partners, hostile containers.  One test a bug."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cafs import atomic
from tests.conftest import BIN, Run
from tests.crunning import leftovers, make_rootfs, until
from tests.test_containers import LOOP, background, cr, cr_bytes, monitors, ok, read_until, state
from tests.waiting import SLOW

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox", "nft", "ip")


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a script before a program on the path; $real is the program."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def wrap(name: str, script: str) -> Path:
        real = shutil.which(name, path=os.environ["PATH"].partition(":")[2])
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\nreal={real}\n{script}\n")
        path.chmod(0o755)
        return path

    return wrap


def test_files_and_devices_of_the_host_are_not_reached_through_standard_streams(image: Path, tmp_path: Path) -> None:
    """The command opens what it has anew, for writing, and changes its mode."""
    for words in (["run", "--rm", "-i", "--network", "none", "b:1"], ["exec", "-i", "held"]):
        if words[0] == "exec":
            background("held", "b:1", "sleep", "60")
        (tmp_path / "in").write_text("original")
        (tmp_path / "out").write_text("before\n")
        script = (
            "cat; echo HACKED > /proc/self/fd/0; chmod 4777 /proc/self/fd/0 /proc/self/fd/1; : > /proc/self/fd/1; echo after"
        )
        with open(tmp_path / "in", "rb") as given, open(tmp_path / "out", "ab") as out:
            subprocess.run(
                [BIN / "crun", *words, "sh", "-c", script], stdin=given, stdout=out, stderr=-3, check=False, timeout=60 * SLOW
            )
        assert (tmp_path / "in").read_text() == "original" and (tmp_path / "out").read_text() == "before\noriginalafter\n"
        assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644 for name in ("in", "out"))
    mode = os.stat("/dev/null").st_mode
    for more in ([], ["-d"]):
        cr(
            "exec",
            *more,
            "held",
            "sh",
            "-c",
            "chmod 0611 /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2",
            stdin=subprocess.DEVNULL,
        )
    time.sleep(0.3)  # the one in the background has nobody to wait for it
    assert os.stat("/dev/null").st_mode == mode
    ok("rm", "-f", "held")


def test_what_a_container_keeps_in_a_volume_is_for_nobody_else_on_the_host(image: Path) -> None:
    ok("run", "--rm", "--network", "none", "-v", "vol:/v", "b:1", "sh", "-c", "cp /bin/busybox /v/id; chmod 4755 /v/id")
    assert (image / "state" / "volumes").stat().st_mode & 0o077 == 0
    ok("volume", "rm", "vol")


def test_cp_gives_no_set_user_id_of_anothers_to_root(image: Path, tmp_path: Path) -> None:
    background("suid", "b:1", "sh", "-c", "cp /bin/busybox /tmp/evil; chmod 6755 /tmp/evil; echo ready; sleep 60")
    assert until(lambda: cr("logs", "suid").stdout == "ready\n")
    ok("cp", "suid:/tmp/evil", tmp_path / "evil")
    assert stat.S_IMODE((tmp_path / "evil").stat().st_mode) == 0o755
    ok("rm", "-f", "suid")


FRAME = """
import socket, struct, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(("eth0", 0))
mac = bytes.fromhex(sys.argv[1].replace(":", "")); mine = s.getsockname()[4]
udp = struct.pack(">HHHH", 5, 29999, 8 + 4, 0) + b"evil"
ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, socket.inet_aton("10.87.0.9"), socket.inet_aton("127.0.0.1"))
total = sum(struct.unpack(">10H", ip)); total = (total & 0xffff) + (total >> 16); total = ~((total & 0xffff) + (total >> 16)) & 0xffff
s.send(mac + mine + b"\\x08\\x00" + ip[:10] + struct.pack(">H", total) + ip[12:] + udp)
"""
HOST = [word for name in ("usr", "lib", "lib64") if os.path.isdir(f"/{name}") for word in ("-v", f"/{name}:/{name}:ro")]


def test_a_container_does_not_reach_the_hosts_loopback(image: Path) -> None:
    """CVE-2020-8558: a frame to the bridge for 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 29999))
        listener.settimeout(0.5)
        ok("run", "--rm", "b:1", "true")  # so that there is a bridge
        shown = subprocess.run(["ip", "-j", "link", "show", "cafs0"], capture_output=True, check=True).stdout
        mac = json.loads(shown)[0]["address"]  # not by /sys, which is of the network that the machine began with
        done = cr("run", "--rm", *HOST, "b:1", "/usr/bin/python3", "-c", FRAME, mac)
        assert done.returncode == 0, done.stderr
        with pytest.raises(TimeoutError):
            listener.recv(100)


def test_what_the_caller_had_open_is_not_kept_by_the_monitor(image: Path, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = subprocess.run(
        [BIN / "crun", "run", "-d", "--name", "fd", "--network", "none", "b:1", "sleep", "60"],
        pass_fds=(fd,),
        check=True,
        capture_output=True,
    )
    assert done.returncode == 0
    os.close(fd)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    ok("rm", "-f", "fd")


def test_a_start_that_is_killed_after_the_runtime_leaves_nothing_that_runs(
    image: Path, wrapped: Callable[[str, str], Path]
) -> None:
    identity = ok("create", "--name", "cut", "--network", "none", "b:1", "sleep", f"555.{os.getpid()}").strip()
    wrapper = wrapped("runc", 'case "$*" in *" run "*) "$real" "$@"; kill -9 $PPID;; *) exec "$real" "$@";; esac')
    assert cr("start", "cut").returncode != 0
    wrapper.unlink()
    assert (
        "Created" in ok("ps", "-a")
        and subprocess.run(["pgrep", "-f", f"sleep 555.{os.getpid()}"], check=False, capture_output=True).returncode == 1
    )
    ok("start", "cut")
    assert state("cut")["Running"] is True
    ok("rm", "-f", "cut")
    assert not (image / "run" / "runc" / identity).exists()


def served(port: int) -> bytes:
    """What httpd in a container that has just been started says of /etc/group; it may not be there yet."""
    words = ["curl", "-s", "-m", "9", "--retry-connrefused", "--retry", "4", f"http://127.0.0.1:{port}/group"]
    return subprocess.run(words, capture_output=True, check=False).stdout


def test_a_failed_start_takes_away_nobodys_port_but_its_own(image: Path) -> None:
    ok("run", "--name", "first", "-p", "28080:80", "b:1", "true")
    ok("run", "-d", "--name", "second", "-p", "28080:80", "b:1", "httpd", "-f", "-h", "/etc")
    assert cr("start", "first").returncode != 0
    assert b"joe" in served(28080)
    ok("rm", "-f", "first", "second")


def test_a_kill_after_a_port_was_published_leaves_no_rule(image: Path, wrapped: Callable[[str, str], Path]) -> None:
    ok("run", "--rm", "b:1", "true")
    wrapper = wrapped(
        "nft",
        'in=$(cat); printf "%s\\n" "$in" | "$real" "$@"; code=$?; case "$in" in add*ports*) kill -9 $PPID;; esac; exit $code',
    )
    assert cr("run", "-d", "--name", "rule", "-p", "28081:80", "b:1", "sleep", "60").returncode != 0
    wrapper.unlink()
    ok("ps")
    assert (
        "28081" not in subprocess.run(["nft", "list", "table", "ip", "cafs"], capture_output=True, text=True, check=True).stdout
    )
    left = ok("ps", "-aq").split()
    if left:
        ok("rm", "-f", *left)


def test_rules_that_somebody_has_flushed_are_made_again(image: Path) -> None:
    ok("run", "--rm", "b:1", "true")
    subprocess.run(["nft", "delete", "table", "ip", "cafs"], check=True)
    ok("run", "-d", "--name", "anew", "-p", "28082:80", "b:1", "httpd", "-f", "-h", "/etc")
    assert b"joe" in served(28082)
    ok("rm", "-f", "anew")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cp_that_is_ended_leaves_its_container_running(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    background("cold", "b:1", "sh", "-c", LOOP)
    (tmp_path / "big").write_bytes(bytes(200 << 20))
    with subprocess.Popen([BIN / "crun", "cp", tmp_path / "big", "cold:/big"]) as copying:
        until(lambda: state("cold")["Paused"] is True, 3)
        copying.send_signal(number)
    assert until(lambda: state("cold")["Paused"] is False)
    ok("rm", "-f", "cold")


def test_a_new_volume_is_seen_whole_or_not_at_all(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "rootfs" / "seed").mkdir()
    for number in range(300):
        (tmp_path / "rootfs" / "seed" / str(number)).write_text("x")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "s:1").returncode == 0
    run = [BIN / "crun", "run", "--rm", "--network", "none", "-v", "new:/seed", "s:1", "sh", "-c", "ls /seed | wc -l"]
    children = [subprocess.Popen(run, stdout=subprocess.PIPE) for _ in range(4)]
    assert [child.communicate(timeout=60 * SLOW)[0].split() for child in children] == [[b"300"]] * 4


@pytest.mark.parametrize("flags", [["--timeout", "3000000"], ["--health-cmd", "true", "--health-interval", "60d"]])
def test_times_of_months_are_waited_for(image: Path, tmp_path: Path, flags: list[str]) -> None:
    wait = "until test -f /go/go; do sleep 0.02; done"
    identity = background("long", "-v", f"{tmp_path}:/go", *flags, "b:1", "sh", "-c", f"{wait}; exit 4")
    assert until(lambda: len(monitors(identity)) == 1)
    (tmp_path / "go").touch()
    assert ok("wait", "long") == "4\n"
    assert cr("run", "--rm", "--network", "none", *flags, "b:1", "sh", "-c", "exit 5").returncode == 5
    ok("rm", "long")
    background("long", "b:1", "sh", "-c", LOOP)
    assert ok("stop", "-t", "3000000", "long") == "long\n"
    ok("rm", "long")


def test_a_terminal_carries_both_ways_at_once(image: Path) -> None:
    """More than a terminal holds, to a command that writes as much as it reads, and to somebody who reads late."""
    data = b"a" * 300_000
    command = [BIN / "crun", "run", "--rm", "-it", "--network", "none", *HOST, "b:1", "/bin/sh", "-c"]
    command.append("/usr/bin/stty raw -echo; echo ok; head -c 300000")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == b"ok\n"  # before that the terminal keeps no line of such length
        writer = threading.Thread(target=lambda: (child.stdin.write(data), child.stdin.flush()))  # type: ignore[union-attr]
        writer.start()
        assert child.stdout.read(len(data)) == data
        writer.join(30 * SLOW)
        assert child.wait(30 * SLOW) == 0


def test_a_window_that_changes_after_the_terminal_was_closed_ends_nothing(image: Path) -> None:
    master, slave = pty.openpty()
    script = "echo up; exec </dev/null >/dev/null 2>&1; sleep 2; exit 5"
    command = [BIN / "crun", "run", "--rm", "-it", "--network", "none", "b:1", "sh", "-c", script]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as child:
        read_until(master, b"up")
        time.sleep(0.5)  # so that the terminal is closed
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 11, 22, 0, 0))
        child.send_signal(signal.SIGWINCH)
        assert child.wait(20 * SLOW) == 5
    os.close(slave)
    os.close(master)


def test_a_healthcheck_that_prints_or_hangs_does_no_harm(image: Path) -> None:
    identity = background(
        "loud", "--health-cmd", "head -c 20000000 /dev/zero", "--health-interval", "200ms", "b:1", "sleep", "60"
    )
    assert until(lambda: state("loud")["Health"]["Log"] != [])  # type: ignore[index]
    (pid,) = monitors(identity)
    background(
        "hangs", "--health-cmd", "sleep 777", "--health-interval", "100ms", "--health-timeout", "200ms", "b:1", "sleep", "60"
    )
    assert until(lambda: len(state("hangs")["Health"]["Log"]) >= 4)  # type: ignore[index]
    assert ok("top", "hangs").count("sleep 777") <= 2
    assert monitors(identity) == [pid]
    assert not list((image / "state" / "containers").glob("*/monitor.error"))
    ok("rm", "-f", "loud", "hangs")


def test_stop_ends_a_container_that_is_just_being_started(image: Path, wrapped: Callable[[str, str], Path]) -> None:
    wrapped("runc", 'case "$*" in *" run "*) sleep 1.5;; esac; exec "$real" "$@"')
    with subprocess.Popen(
        [BIN / "crun", "run", "-d", "--name", "slow", "--network", "none", "b:1", "sh", "-c", LOOP], stdout=-3
    ) as starting:
        assert until(lambda: "slow" in cr("ps", "-a").stdout)
        began = time.monotonic()
        ok("stop", "-t", "1", "slow")
        assert time.monotonic() - began < 20 * SLOW
        starting.wait(20 * SLOW)
    assert state("slow")["Running"] is False
    ok("rm", "slow")


def test_the_end_is_not_waited_for_beyond_process_one(image: Path) -> None:
    began = time.monotonic()
    done = cr("run", "--rm", "--network", "none", "--pid", "host", "b:1", "sh", "-c", "sleep 1000 & exit 4")
    assert done.returncode == 4 and time.monotonic() - began < 20 * SLOW


def test_start_attached_misses_nothing_of_a_short_command(image: Path) -> None:
    for _ in range(5):
        identity = ok("create", "--network", "none", "b:1", "sh", "-c", "echo hi; echo oh >&2; exit 3").strip()
        done = cr("start", "-a", identity)
        assert (done.stdout, done.stderr, done.returncode) == ("hi\n", "oh\n", 3)
        ok("rm", identity)


def test_input_is_kept_until_it_is_read_and_the_exit_code_comes_whatever_is_read(image: Path) -> None:
    identity = ok("create", "-i", "--network", "none", "b:1", "sh", "-c", "sleep 2; wc -c").strip()
    assert (
        subprocess.run(
            [BIN / "crun", "start", "-ai", identity], input=bytes(3_000_000), capture_output=True, check=True, timeout=60 * SLOW
        ).stdout
        == b"3000000\n"
    )
    ok("rm", identity)
    identity = ok("create", "-i", "--network", "none", "b:1", "sh", "-c", "sleep 0.5; head -n 1; exit 7").strip()
    command = f"yes | {BIN}/crun start -ai {identity}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=60 * SLOW)
    assert (done.stdout, done.returncode) == (b"y\n", 7)
    ok("rm", identity)
    background("att", "-i", "b:1", "sh", "-c", "sleep 0.5; head -n 1; exit 8")
    assert (
        subprocess.run(
            ["sh", "-c", f"yes | {BIN}/crun attach att"], capture_output=True, check=False, timeout=60 * SLOW
        ).returncode
        == 8
    )
    ok("rm", "att")


def test_following_a_log_loses_nothing_when_it_is_rotated(image: Path) -> None:
    background(
        "turn",
        "--log-opt",
        "max-size=8k",
        "--log-opt",
        "max-file=100",
        "b:1",
        "sh",
        "-c",
        "sleep 0.3; seq 6000 | while read n; do echo $n; done",
    )
    assert ok("logs", "-f", "turn").split() == [str(number) for number in range(1, 6001)]
    ok("rm", "turn")


def test_a_log_with_a_gap_in_its_files_is_read_to_its_end(tmp_path: Path) -> None:
    """As a kill between two renames leaves it."""
    from runner import logs

    log = logs.Log(str(tmp_path / "log"), 1, 5)
    for number in range(4):
        log.write("stdout", b"%d" % number)
    (tmp_path / "log.2").unlink()
    assert [data for _, _, data in logs.read(str(tmp_path / "log"))] == [b"0", b"1", b"3"]


def test_a_foreground_container_is_up_since_it_was_started(image: Path) -> None:
    command = [BIN / "crun", "run", "--rm", "-i", "--name", "fore", "--network", "none", "b:1", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert until(lambda: "fore" in ok("ps"))
        assert " second" in ok("ps") and "week" not in ok("ps")
        assert child.stdin
        child.stdin.close()
        assert child.wait(30 * SLOW) == 0
    rows = [json.loads(line)["event"] for line in ok("events", "--filter", "container=fore").splitlines()]
    assert rows == ["create", "start", "die", "destroy"]


def test_an_archive_keeps_its_hard_links_and_follows_the_containers_links(image: Path, tmp_path: Path) -> None:
    background("tar", "b:1", "sh", "-c", "mkdir -p /var; ln -s ../tmp /var/run; echo ready; sleep 60")
    assert until(lambda: cr("logs", "tar").stdout == "ready\n")
    (tmp_path / "t" / "var" / "run").mkdir(parents=True)
    (tmp_path / "t" / "var" / "run" / "f").write_text("through")
    (tmp_path / "t" / "a").write_text("one")
    os.link(tmp_path / "t" / "a", tmp_path / "t" / "b")
    data = subprocess.run(["tar", "c", "-C", tmp_path / "t", "a", "b", "var/run/f"], capture_output=True, check=True).stdout
    subprocess.run([BIN / "crun", "cp", "-", "tar:/"], input=data, check=True, timeout=60 * SLOW)
    assert ok("exec", "tar", "sh", "-c", "cat /tmp/f; stat -c %h /a") == "through2\n"
    evil = tmp_path / "evil.tar"
    code = f"import tarfile; t = tarfile.open('{evil}', 'w'); i = tarfile.TarInfo('x'); i.type = tarfile.LNKTYPE; i.linkname = '../../etc/shadow'; t.addfile(i)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (
        subprocess.run([BIN / "crun", "cp", "-", "tar:/"], input=evil.read_bytes(), check=False, capture_output=True).returncode
        == 1
    )
    ok("rm", "-f", "tar")


def test_names_in_diff_cannot_look_like_other_lines_and_may_be_deep(image: Path) -> None:
    background(
        "deep",
        "b:1",
        "sh",
        "-c",
        "touch '/a\nC b'; i=0; while [ $i -lt 1200 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done 2>/dev/null",
    )
    ok("wait", "deep")
    lines = ok("diff", "deep").splitlines()
    assert "A /a\\x0aC b" in lines and len(lines) == 1201
    ok("rm", "deep")


def test_docker_s_ways_of_spelling(image: Path) -> None:
    assert ok("run", "--rm", "-h", "name", "--network", "none", "b:1", "hostname") == "name\n"
    assert ok("run", "--rm", "-d=false", "--init=0", "--network", "none", "b:1", "echo", "x") == "x\n"
    assert ok("run", "--rm", "-u", ":1001", "--network", "none", "b:1", "id", "-g") == "1001\n"
    assert json.loads(
        ok("inspect", ok("create", "-e", "PATH", "b:1", "true", env={k: v for k, v in os.environ.items()}).strip())
    )["Config"]["Env"]
    ok("rm", *ok("ps", "-aq").split())


def test_twice_is_as_good_as_once(image: Path) -> None:
    """Whatever gives back may be done again: gc after everything, and nothing is left."""
    background("once", "b:1", "true")
    ok("wait", "once")
    for _ in range(2):
        ok("gc")
    ok("rm", "once")
    assert leftovers(image) == []
    assert cr_bytes("ps", "-aq") == b""


def test_a_container_that_fills_the_disk_of_its_state_has_an_exit_code_and_can_be_removed(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its start, when the monitor has files to make; and while it runs."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    try:
        monkeypatch.setenv("CAFS_STATE", str(place / "state"))
        for before in ("", "sleep 0.5; "):
            script = f"{before}cat /dev/zero > /x; echo >&2 full; exit 3"
            done = cr("run", "-d", "--name", "self", "b:1", "sh", "-c", script)
            assert done.returncode == 0, done.stderr
            assert ok("wait", "self") == "3\n" and os.statvfs(place).f_bavail < 8
            ok("rm", "self")
        assert cr("run", "--rm", "b:1", "sh", "-c", "cat /dev/zero > /x; exit 3").returncode == 3
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_hosts_files_are_whole_whenever_they_are_read(image: Path) -> None:
    """A neighbour's coming and going is written into them while they are mounted."""
    script = "i=0; while [ $i -lt 1500 ]; do grep -q localhost /etc/hosts || echo torn; i=$((i+1)); done; echo end"
    ok("run", "-d", "--name", "reader", "b:1", "sh", "-c", script)
    while cr("exec", "reader", "true").returncode == 0:
        cr("run", "--rm", "--name", "neighbour", "b:1", "true")
    ok("wait", "reader")
    assert ok("logs", "reader") == "end\n"
    ok("rm", "reader")


def test_a_small_text_is_overwritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    for data in (b"one\n", b"one\ntwo\n", b"x\n"):
        path.write_bytes(path.read_bytes() if path.exists() else b"")
        atomic.overwrite(str(path), data)
        assert path.read_bytes() == data
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        atomic.overwrite(str(tmp_path / "link"), b"y")


def test_an_archive_that_nobody_reads_to_its_end_ends_as_a_pipe_does(image: Path) -> None:
    ok("create", "--name", "cc", "b:1", "true")
    line = f"set -o pipefail; {BIN}/crun cp cc:/bin - | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False, timeout=60 * SLOW)
    assert (done.returncode, done.stderr) == (141, b"")
    ok("rm", "cc")


def test_a_full_disk_takes_the_log_and_says_so_but_not_the_output(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    try:
        monkeypatch.setenv("CAFS_STATE", str(place / "state"))
        script = "seq 1000000"
        done = cr("run", "--name", "fore", "--network", "none", "b:1", "sh", "-c", script + "; exit 5")
        assert done.returncode == 5 and len(done.stdout) == 6888896 and "lacks" in done.stderr
        done = cr("logs", "fore")
        assert done.returncode == 3 and "lacks" in done.stderr and done.stdout.startswith("1\n2\n")
        ok("rm", "fore")
        background("back", "b:1", "sh", "-c", f"trap 'echo healed; exit 0' USR1; {script}; while :; do sleep 0.05; done")
        assert until(lambda: cr("logs", "back").returncode == 3)
        subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
        ok("kill", "-s", "USR1", "back")
        assert ok("wait", "back") == "0\n"
        done = cr("logs", "back")
        assert done.returncode == 3 and done.stdout.endswith("healed\n") and "lacks" in done.stderr
        ok("rm", "back")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def holders(image: Path) -> list[int]:
    """Processes that keep pipes of containers of this state directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if path.read_bytes() == f"CAFS_STATE={image}/state\0".encode():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_who_keeps_the_pipes_of_a_container_ends_with_it(image: Path) -> None:
    for _ in range(5):
        background("again", "--restart", "always", "b:1", "sh", "-c", "exit 1")
        assert until(lambda: json.loads(ok("inspect", "again"))["RestartCount"] == 2)
        ok("rm", "-f", "again")
        assert until(lambda: not holders(image), 2)
    from runner import holding

    orphan = os.posix_spawn("/bin/sleep", [holding._name("d" * 64), "infinity"], {"CAFS_STATE": f"{image}/state"})
    background("kept", "b:1", "sleep", "60")
    assert len(holders(image)) == 2
    ok("gc")
    assert os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]) == -signal.SIGKILL and len(holders(image)) == 1
    ok("rm", "-f", "kept")
    assert until(lambda: not holders(image), 2)
