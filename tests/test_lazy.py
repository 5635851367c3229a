"""LAZY under fire: killed, without a store, without room, with damage: no wrong byte, and no read that hangs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cafs import slots
from tests.conftest import BIN, SLOW, Run, lazy_pids, make_files, pid_of, wait_until
from tests.faultproxy import Proxy, free_port

pytestmark = pytest.mark.needs("root", "fuse")

READER = """
import errno, hashlib, json, os, random, sys, time
top, seed, names = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[4]))
rng, reads, wrong, failed, slowest = random.Random(seed), 0, 0, [], 0.0
while not os.path.exists(sys.argv[3]):
    name = rng.choice(sorted(names))
    began = time.monotonic()
    try:
        fd = os.open(f"{top}/{name}", os.O_RDONLY)
        try:
            data = b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the next read asks again
        finally:
            os.close(fd)
        reads, wrong = reads + 1, wrong + (hashlib.sha256(data).hexdigest() != names[name])
    except OSError as error:
        failed.append(str(error))
    if reads == 101:
        open(f"{sys.argv[3]}.{seed}", "w").close()
    slowest = max(slowest, time.monotonic() - began)
print(json.dumps([reads, wrong, failed, slowest]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_files(tmp_path / "tree", 300, (9 << 20) + 5)


def digests(tree: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tree.iterdir()}


def cached(home: Path, path: Path) -> Path:
    """Where the content of a small file is in the cache."""
    name = hashlib.sha256(path.read_bytes()).hexdigest()
    return home / "cache" / "data" / ".cafs-objects" / name[:2] / name[2:]


def kill_at_random(state: Path, seconds: float, pause_s: float, seed: int) -> int:
    """Kill one of the servers, whichever, at once again and again, without waiting for another to come; how many."""
    kills, rng, until = 0, random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < until:
        live = list(slots.pids(str(state)).values())
        assert live, f"all servers were lost after {kills} kills"
        with suppress(ProcessLookupError):
            os.kill(rng.choice(live), signal.SIGKILL)
            kills += 1
        time.sleep(pause_s)  # the rate that is wanted, not a wait
    return kills


def test_servers_killed_twenty_times_a_second_fail_no_read(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """Slow (60 s) because it is what the engine is for: any of its processes, on busy processors, under uncached reads."""
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    (state,) = (home / "run" / "lazy").iterdir()
    names, done = digests(tree), tmp_path / "done"
    objects = {}
    for line in cmd("cafs-index", "ls", "x:1", "--json").stdout.splitlines():
        entry = json.loads(line)
        if entry.get("digest"):
            name = entry["digest"] + (".c" if entry["type"] == "F" else "")
            objects[f".cafs-objects/{name[:2]}/{name[2:]}"] = names[entry["path"][1:]]
    readers = []
    for seed, (top, files) in enumerate([(tmp_path / "k", names), (state / "mnt", objects)]):
        (tmp_path / f"names{seed}").write_text(json.dumps(files))
        command = [sys.executable, "-c", READER, top, str(seed), done, tmp_path / f"names{seed}"]
        readers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        kills = kill_at_random(state, 60, 0.05, 7)
    finally:
        done.touch()
        for one in busy:
            one.kill()
            one.wait()
    total = 0
    for reader in readers:
        reads, wrong, failed, slowest = json.loads(reader.communicate(timeout=60 * SLOW)[0])
        print(f"{kills} kills: {reads} reads, {wrong} wrong, {len(failed)} failed, slowest {slowest:.2f} s")
        assert (wrong, failed) == (0, []) and slowest < 5 * SLOW
        total += reads
    assert kills >= 1000 and total > 500


def test_when_all_servers_are_killed_at_once_the_next_mount_is_new_and_says_what_is_lost(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    for name in ("k", "other"):
        assert kernel("x:1", tmp_path / name).returncode == 0
    (state,) = (home / "run" / "lazy").iterdir()
    live = slots.pids(str(state))
    assert sorted(live) == list(slots.ALL)
    for pid in live.values():  # all stopped first: none may fill the place of another
        os.kill(pid, signal.SIGSTOP)
    for pid in live.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not slots.pids(str(state)))
    done = cmd("cafs-mount", "--reload")
    assert done.returncode == 1 and b"its mounts are lost" in done.stderr
    for name, file in (("k", "large"), ("other", "8")):
        with pytest.raises(OSError):
            (tmp_path / name / file).read_bytes()
        assert kernel("x:1", tmp_path / name).returncode == 0
        assert (tmp_path / name / file).read_bytes() == (tree / file).read_bytes()


def test_the_end_of_the_cgroup_in_which_a_mount_was_made_ends_no_other_mount(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """As when systemd stops the service that mounted first."""
    cmd("cafs-index", "create", tree, "-t", "x:1")
    top = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids").is_dir() else Path("/sys/fs/cgroup")
    cgroup = top / f"cafs-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        (tmp_path / "a").mkdir()
        script = 'echo $$ >"$1/cgroup.procs"; "$2" --engine kernel x:1 "$3"; exec sleep 1000'
        service = subprocess.Popen(["sh", "-c", script, "sh", cgroup, BIN / "cafs-mount", tmp_path / "a"])
        wait_until(lambda: os.path.ismount(tmp_path / "a"))
        assert kernel("x:1", tmp_path / "b").returncode == 0
        wait_until(lambda: (cgroup / "cgroup.procs").read_text().split() == [str(service.pid)])
        service.kill()
        service.wait()
        assert (tmp_path / "b" / "1").read_bytes() == (tree / "1").read_bytes()
    finally:
        wait_until(lambda: (cgroup / "cgroup.procs").read_text() == "")
        cgroup.rmdir()


@pytest.mark.parametrize("engine", ["kernel", "fuse"])
def test_a_copied_mount_namespace_keeps_no_servers(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    point = tmp_path / "k"
    assert kernel("x:1", point, "--engine", engine).returncode == 0
    copying = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"]
    with subprocess.Popen(copying, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout and other.stdout.readline() == b"\n"
            began = time.monotonic()
            assert cmd("cafs-mount", "--unmount", point).returncode == 0
            assert time.monotonic() - began < 1.5 * SLOW
            assert list((home / "run" / ("lazy" if engine == "kernel" else "fuse")).iterdir()) == []
        finally:
            other.kill()


@pytest.mark.parametrize("engine", ["kernel", "fuse"])
def test_a_bind_mount_in_another_namespace_outlives_the_mount(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, engine: str
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    point, bound = tmp_path / "k", tmp_path / "bound"
    bound.mkdir()
    assert kernel("x:1", point, "--engine", engine, "--prefetch", "none").returncode == 0
    script = f"mount --bind {point} {bound} && umount {point} && echo && read go && exec cat {bound}/9"
    other = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout and user.stdout.readline() == b"\n"
        assert cmd("cafs-mount", "--unmount", point).returncode == 0
        assert user.communicate(b"go\n", timeout=60 * SLOW)[0] == (tree / "9").read_bytes()


def test_an_open_file_outlives_a_lazy_unmount(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k", "--prefetch", "none").returncode == 0
    with open(tmp_path / "k" / "9", "rb") as file:
        subprocess.run(["umount", "-l", tmp_path / "k"], check=True)
        (tmp_path / "other").mkdir()
        assert kernel("x:1", tmp_path / "other").returncode == 0  # which takes away what nobody uses
        assert cmd("cafs-mount", "--unmount", tmp_path / "other").returncode == 0
        assert file.read() == (tree / "9").read_bytes()


def test_no_server_shows_the_arguments_of_the_command_that_started_it(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    secret = tmp_path / "TOKEN-123456"
    assert kernel("x:1", secret).returncode == 0
    (state,) = (home / "run" / "lazy").iterdir()
    for pid in slots.pids(str(state)).values():
        assert b"TOKEN" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_new_program_takes_over_a_live_mount(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    supervisor, worker = pid_of(home, "supervisor", "lazy"), pid_of(home, "worker", "lazy")
    with open(tmp_path / "k" / "large", "rb", buffering=0) as file:
        head = file.read(1 << 20)
        assert cmd("cafs-mount", "--reload").returncode == 0
        wait_until(lambda: pid_of(home, "worker", "lazy") != worker)
        assert pid_of(home, "supervisor", "lazy") == supervisor
        rest = b"".join(iter(lambda: file.read(1 << 20), b""))
    assert head + rest == (tree / "large").read_bytes()


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_containers_do_not_notice_a_hundred_kills(home: Path, tmp_path: Path, tree: Path, cmd: Run) -> None:
    """Slow (some 25 s), and worth it: two containers that verify all files again and again, by way of LAZY alone.

    A recording mount leaves the cache out, and what the kernel has of the files is dropped all the time.
    """
    (tree / "bin").mkdir()
    shutil.copy(shutil.which("busybox") or "", tree / "bin" / "busybox")
    names = [path.name for path in tree.iterdir() if path.is_file()]
    (tree / "sums").write_text("".join(f"{hashlib.sha256((tree / n).read_bytes()).hexdigest()}  /{n}\n" for n in names))
    (tmp_path / "stop").mkdir()
    assert cmd("cafs-index", "create", tree, "-t", "c:1").returncode == 0
    loop = "n=0; while [ ! -e /stop/done ]; do busybox sha256sum -c -s /sums || exit 1; n=$((n+1)); done; echo $n"
    command = [
        "--cpus",
        "0.5",
        "--record",
        tmp_path / "record",
        "-v",
        f"{tmp_path}/stop:/stop:ro",
        "c:1",
        "/bin/busybox",
        "sh",
        "-c",
        loop,
    ]
    containers = [
        subprocess.Popen([BIN / "crun", "run", "--rm", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    wait_until(lambda: len(list((home / "run" / "lazy").glob("record.*/worker"))) == 2)
    states = sorted((home / "run" / "lazy").iterdir())
    kills, others, rng = 0, 0, random.Random(5)
    while kills < 100:
        # Who kills only workers waits for supervisors, which begin one that dies at once more and more slowly.
        state, name = rng.choice(states), rng.choice(["worker", "supervisor"])
        pid = int((state / name).read_text())
        time.sleep(rng.uniform(0, 0.04))  # at random moments
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        kills, others = kills + (name == "worker"), others + (name == "supervisor")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        wait_until(lambda state=state, name=name, pid=pid: int((state / name).read_text()) != pid)
    (tmp_path / "stop" / "done").touch()
    for container in containers:
        out, said = container.communicate(timeout=120 * SLOW)
        print(f"{kills} and {others} kills: {int(out)} rounds over {len(names)} files, none failed")
        assert (container.returncode, said) == (0, b"") and int(out) >= 1
    wait_until(lambda: lazy_pids(home) == [])


def test_a_store_that_is_away_for_ten_seconds_is_waited_for(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    """Slow (10 s), for that is how long people wait for a switch to come back."""
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k", "--timeout", "30").returncode == 0
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    os.rename(home / "store", home / "away")
    command = [sys.executable, "-c", "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"]
    reader = subprocess.Popen([*command, tmp_path / "k" / "2"], stdout=subprocess.PIPE)
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    os.kill(pid_of(home, "worker", "lazy"), signal.SIGKILL)  # also a new server waits, and serves what is cached
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(10)
    os.rename(home / "away", home / "store")
    assert reader.communicate(timeout=20 * SLOW)[0] == (tree / "2").read_bytes()


def test_a_store_that_is_away_for_good_is_eio_within_the_limit(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k", "--timeout", "2").returncode == 0
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    os.rename(home / "store", home / "away")
    for name in ("2", "large"):
        began = time.monotonic()
        with pytest.raises(OSError) as caught:
            (tmp_path / "k" / name).read_bytes()
        assert caught.value.errno == errno.EIO and time.monotonic() - began < 10 * SLOW
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    os.rename(home / "away", home / "store")
    assert (tmp_path / "k" / "2").read_bytes() == (tree / "2").read_bytes()


def test_damage_in_the_store_is_eio_for_that_object_alone(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    (pack,) = (home / "store" / "packs").glob("?" * 64)
    data = bytearray(pack.read_bytes())
    data[40] ^= 1  # in the first frame, which is that of /0
    pack.unlink()
    pack.write_bytes(data)
    assert kernel("x:1", tmp_path / "k", "--log", tmp_path / "log").returncode == 0
    with pytest.raises(OSError) as caught:
        (tmp_path / "k" / "0").read_bytes()
    assert caught.value.errno == errno.EIO
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    assert hashlib.sha256((tree / "0").read_bytes()).hexdigest() in (tmp_path / "log").read_text()


def test_without_room_in_the_cache_it_serves_from_memory(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    shutil.rmtree(home / "cache")
    (home / "cache").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", home / "cache"], check=True)
    assert kernel("x:1", tmp_path / "k").returncode == 0
    with open(home / "cache" / "fill", "wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            os.write(file.fileno(), bytes(4096))
    for name in ("1", "2", "large"):
        assert (tmp_path / "k" / name).read_bytes() == (tree / name).read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    wait_until(lambda: lazy_pids(home) == [])
    subprocess.run(["umount", home / "cache"], check=True)


def test_a_cached_object_that_was_changed_is_healed_at_the_next_mount(
    home: Path,
    tmp_path: Path,
    tree: Path,
    cmd: Run,
    kernel: Run,
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    for name in ("1", "large"):
        assert (tmp_path / "k" / name).read_bytes() == (tree / name).read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    (large,) = (home / "cache" / "data" / ".cafs-objects").glob("*/*.c")
    for path in (cached(home, tree / "1"), large):
        data = path.read_bytes()
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes([data[len(data) // 2] ^ 1]))
    done = kernel("x:1", tmp_path / "k")
    assert done.returncode == 0 and done.stderr.count(b"was damaged") == 2
    for name in ("1", "large"):
        assert (tmp_path / "k" / name).read_bytes() == (tree / name).read_bytes()


def test_what_a_crash_of_the_machine_may_have_lost_is_verified_again(
    home: Path,
    tmp_path: Path,
    tree: Path,
    cmd: Run,
    kernel: Run,
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    path = cached(home, tree / "1")
    status = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes(status.st_size))  # as after a crash: the right size, zeros
    digest = bytes.fromhex(path.parent.name + path.name)
    now = path.stat()
    stamp = b"".join(value.to_bytes(8, "little") for value in (now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    with open(home / "cache" / "ledger", "ab") as file:
        file.write(digest + bytes(8) + stamp)
    assert b"damaged" not in kernel("x:1", tmp_path / "k").stderr  # nothing tells it by the ledger alone
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    wait_until(lambda: lazy_pids(home) == [])
    (home / "cache" / "synced").write_text(json.dumps({"boot_id": "another", "time_ns": 1}))
    assert b"was damaged" in kernel("x:1", tmp_path / "k").stderr
    assert (tmp_path / "k" / "1").read_bytes() == (tree / "1").read_bytes()


def test_a_miss_brings_its_neighbours_and_asks_once(home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run) -> None:
    port = free_port()
    with subprocess.Popen(["busybox", "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", tmp_path]) as server:
        try:
            cmd("cafs-index", "create", tree, "-t", "x:1")
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            with Proxy(("127.0.0.1", port), 0.05) as proxy:
                assert kernel("x:1", tmp_path / "k", "--store", f"{proxy.url}/store", "--prefetch", "none").returncode == 0
                before = len(proxy.log)
                threads = [threading.Thread(target=(tmp_path / "k" / name).read_bytes) for name in ("1", "10", "100")]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                wait_until(lambda: cached(home, tree / "101").exists())
                for name in ("1", "10", "100", "101"):
                    assert (tmp_path / "k" / name).read_bytes() == (tree / name).read_bytes()
                assert len(proxy.log) - before == 1
                for path in sorted(tree.iterdir()):
                    assert (tmp_path / "k" / path.name).read_bytes() == path.read_bytes()
                assert len(proxy.log) - before < 40, "some 25 MB of small files by blocks of 1 MiB, and 3 chunks"
        finally:
            server.terminate()


def test_a_server_that_cannot_begin_is_an_error_and_no_hang(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    done = kernel("x:1", tmp_path / "k", "--log", tmp_path / "no" / "such" / "log")
    assert done.returncode == 0  # the directory of a log is made
    assert cmd("cafs-mount", "--unmount", tmp_path / "k").returncode == 0
    wait_until(lambda: lazy_pids(home) == [])
    monkeypatch.setenv("CAFS_CACHE_QUOTA", "much")
    done = kernel("x:1", tmp_path / "k")
    assert done.returncode == 2 and b"CAFS_CACHE_QUOTA is 'much'" in done.stderr
    (tmp_path / "file").touch()
    monkeypatch.delenv("CAFS_CACHE_QUOTA")
    done = kernel("x:1", tmp_path / "k", "--log", tmp_path / "file" / "log")
    assert done.returncode == 1 and b"cannot log to" in done.stderr and done.stderr.count(b"\n") == 1


def test_a_signal_that_does_not_kill_lets_a_read_go_on_and_one_that_does_ends_it(
    home: Path, tmp_path: Path, tree: Path, cmd: Run, kernel: Run
) -> None:
    cmd("cafs-index", "create", tree, "-t", "x:1")
    assert kernel("x:1", tmp_path / "k").returncode == 0
    os.rename(home / "store", home / "away")
    program = """
import signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
sys.stdout.buffer.write(open(sys.argv[1], "rb").read())
"""
    readers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "k" / name], stdout=subprocess.PIPE) for name in ("1", "2")
    ]
    with pytest.raises(subprocess.TimeoutExpired):
        readers[0].wait(1.5)
    readers[1].kill()
    assert readers[1].wait(5 * SLOW) == -signal.SIGKILL
    os.rename(home / "away", home / "store")
    assert readers[0].communicate(timeout=20 * SLOW)[0] == (tree / "1").read_bytes()
