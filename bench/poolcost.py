"""What a pool costs while it runs: turns, reports, memory, connections that do nothing; images beside `crun run`.

usage: poolcost.py [CONNECTIONS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root,
                                    sshd, runc, busybox-static
"""

import os
import shutil
import statistics
import subprocess
import sys
import time

from jobs import BIN, CPOOL, servers
from start import compiled

from pool import frames, state, workers
from pool.controller import Controller
from pool.settings import Settings

REPORT = {"cpus": 8, "memory": 1 << 34, "free_memory": 1 << 33, "free_disk": 1 << 40, "load": 0.5, "gpus": 0, "running": 0}
REPORT |= {"sequence": 1, "images": "", "arch": "x86_64", "notice": False}
FINISHED = 100_000


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def controller_of_many(base: str) -> None:
    """Of 1,000 workers, in this process: a turn with nothing to do, and what reports cost."""
    os.makedirs(f"{base}/many", mode=0o700)
    state.create(f"{base}/many")
    held = Controller(f"{base}/many", Settings())
    held.wires.open = lambda _: None  # type: ignore[method-assign]
    for number in range(1000):
        one = held.remotes[f"w{number}"] = workers.Remote(f"w{number}", "x", is_draining=False)
        one.has_greeted = True
        one.reported(REPORT)
    turns = []
    for _ in range(50):
        for one in held.remotes.values():
            one.heard = time.monotonic()
        began = time.perf_counter()
        held.turn(0)
        turns.append(time.perf_counter() - began)
    print(f"a turn with nothing to do, 1,000 workers\t{statistics.median(turns) * 1000:.1f} ms")
    spec = {"command": ["true"], "image": "", "env": {}, "cwd": "", "timeout_s": 0, "cpus": 99, "memory": 0, "gpus": 0}
    for _ in range(1000):
        held.add(held.state.job(held.state.submit(spec)))
    turns = []
    for _ in range(20):
        held.waiting.may_place = True
        began = time.perf_counter()
        held.turn(0)
        turns.append(time.perf_counter() - began)
    print(f"the same with 1,000 jobs that fit nowhere\t{statistics.median(turns) * 1000:.1f} ms")
    frame, reader, remote = frames.message("report", **REPORT), frames.Reader(), held.remotes["w1"]
    began = time.process_time()
    for _ in range(2000):
        for _, body in reader.feed(frame):
            held._heed(remote, body)
    print(f"200 reports a second\t{(time.process_time() - began) / 10 * 100:.1f} % of a core")
    held.state.close()


def memory_of_finished(base: str) -> None:
    os.environ["CAFS_POOL"] = f"{base}/finished"
    subprocess.run([CPOOL, "init"], check=True)
    held = state.State(f"{base}/finished")
    spec = {
        "command": ["sh", "-c", "a command of some length"],
        "image": "",
        "env": {"A": "b"},
        "cwd": "/",
        "cpus": 1,
        "memory": 0,
    }
    for _ in range(FINISHED):
        one = held.job(held.submit(spec))
        held.change(one, state=state.FINISHED, code=0, started_s=1.0, finished_s=2.0, worker="local", usage={"wall_s": 1})
        held.keep_output(one.id, b"some output\n" * 5, b"")
    held.commit()
    held.close()
    with subprocess.Popen([CPOOL, "serve"]) as controller:
        while subprocess.run([CPOOL, "nodes"], capture_output=True, text=True).stdout.count(" ready ") < 1:
            time.sleep(0.1)
        subprocess.run([CPOOL, "jobs", "-a", "--limit", "1000"], check=True, stdout=subprocess.DEVNULL)
        print(f"controller with {FINISHED:,} finished jobs\t{resident_mb(controller.pid):.0f} MB resident")
        subprocess.run([CPOOL, "down"], check=True)


def idle_connections(base: str, many: int) -> None:
    os.environ["CAFS_POOL"] = f"{base}/idle"
    os.environ["HOME"] = f"{base}/home"
    subprocess.run([CPOOL, "init"], check=True)
    with servers(base) as ports:
        for number in range(many):
            address = f"root@127.0.0.1:{ports[number % len(ports)]}"
            add = [CPOOL, "host", "add", f"w{number}", address, "--identity", f"{base}/key", "--yes"]
            subprocess.run(add, check=True, stderr=subprocess.DEVNULL)
        with subprocess.Popen([CPOOL, "serve"]) as controller:
            while subprocess.run([CPOOL, "nodes"], capture_output=True, text=True).stdout.count(" ready ") < many:
                time.sleep(0.5)
            time.sleep(3)  # what was begun is over
            before = cpu_s(controller.pid)
            time.sleep(20)
            print(f"{many} idle connections\t{(cpu_s(controller.pid) - before) / 20 * 100:.1f} % of a core")
            print(f"the same\t{resident_mb(controller.pid):.0f} MB resident")
            subprocess.run([CPOOL, "down"], check=True)


def images(base: str, many: int = 60) -> None:
    os.environ |= {f"CAFS_{name}": f"{base}/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")}
    os.environ["CAFS_POOL"] = f"{base}/images"
    os.makedirs(f"{base}/root/bin")
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, f"{base}/root/bin/true")
    subprocess.run([f"{BIN}/cafs-index", "create", "-q", f"{base}/root", "-t", "b:1"], check=True)
    os.makedirs(f"{base}/mnt")
    subprocess.run([f"{BIN}/cafs-mount", "b:1", f"{base}/mnt"], check=True)
    subprocess.run([CPOOL, "init"], check=True)
    text = "".join(f"{number}\n" for number in range(many)).encode()
    run = [f"{BIN}/crun", "run", "--rm", "--network", "host", "b:1", "true"]
    ours, theirs = [], []
    try:
        with subprocess.Popen([CPOOL, "serve"]):
            while subprocess.run([CPOOL, "nodes"], capture_output=True, text=True).stdout.count(" ready ") < 1:
                time.sleep(0.1)
            for _ in range(5):
                began = time.perf_counter()
                mapped = [CPOOL, "map", "--image", "b:1", "--cpus", "1", "--", "true"]
                subprocess.run(mapped, input=text, check=True, stdout=subprocess.DEVNULL)
                ours.append(many / (time.perf_counter() - began))
                began = time.perf_counter()
                subprocess.run(["xargs", "-P", str(os.cpu_count()), "-n", "1", *run], input=text, check=True)
                theirs.append(many / (time.perf_counter() - began))
            subprocess.run([CPOOL, "down"], check=True)
    finally:
        subprocess.run([f"{BIN}/cafs-mount", "--unmount", f"{base}/mnt"], check=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"cpool map --image / xargs -P of crun run --rm\t{ratio:.2f}\t{mine:.1f} and {other:.1f} a second")


def main() -> None:
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "pool-costs")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(f"{base}/home", mode=0o700)
    controller_of_many(base)
    memory_of_finished(base)
    images(base)
    idle_connections(base, int(sys.argv[1]) if sys.argv[1:] else 50)


if __name__ == "__main__":
    main()
