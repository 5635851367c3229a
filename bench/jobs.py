"""The pool: placing; `cpool map` beside GNU parallel over the same four sshd; from a submit to its process; simulation.

usage: jobs.py [JOBS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root, sshd, and
                         parallel for what it is compared with
"""

import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from start import compiled

from pool.placement import Need, Placement, Worker
from pool.scaling import Kind, Policy
from pool.simulation import Arrival, Simulation

BIN = os.path.dirname(sys.executable)
CPOOL = os.path.join(BIN, "cpool")
SERVERS = 4


def placing() -> None:
    rng = random.Random(1)
    shapes = [Need(rng.randint(1, 8), rng.randint(1, 16) << 30) for _ in range(50)]
    for what, needs in (
        ("50 shapes", [rng.choice(shapes) for _ in range(10_000)]),
        ("all different", [Need(rng.random() * 8 + 0.1, rng.randint(1 << 28, 1 << 34)) for _ in range(10_000)]),
    ):
        rates = []
        for _ in range(5):
            placement = Placement([Worker(f"w{n}", 64, 256 << 30, 0, 64, 256 << 30, 0) for n in range(1000)])
            began = time.perf_counter()
            assert all(placement.choose(need) for need in needs)
            rates.append(len(needs) / (time.perf_counter() - began))
        print(f"10,000 jobs on 1,000 workers, {what}\t{statistics.median(rates):,.0f} decisions a second")


def simulating() -> None:
    rng = random.Random(1)
    times = itertools.accumulate(rng.expovariate(5) for _ in range(1_000_000))
    trace = (Arrival(time_s, rng.lognormvariate(2.3, 1), Need(1.0)) for time_s in times)
    began = time.perf_counter()
    Simulation(Policy((Kind("m", 16.0, price=1.0),), machines=200, least_cpus=16)).run(trace)
    print(f"simulation of 1,000,000 jobs\t{time.perf_counter() - began:.1f} s")


@contextmanager
def servers(base: str) -> Iterator[list[int]]:
    """Ports of sshd, each with a HOME of its own."""
    os.makedirs("/run/sshd", exist_ok=True)
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    subprocess.run([*keygen, "-f", f"{base}/key"], check=True)
    running, ports = [], []
    for number in range(SERVERS):
        place = f"{base}/server{number}"
        os.makedirs(place, mode=0o700)
        subprocess.run([*keygen, "-f", f"{place}/host"], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
        with open(f"{place}/config", "w") as file:
            file.write(f"Port {ports[-1]}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {base}/key.pub\n")
            file.write(f"StrictModes no\nPermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nSetEnv HOME={place}\n")
        running.append(subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", f"{place}/config"], stderr=subprocess.DEVNULL))
    for port in ports:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.01)
    try:
        yield ports
    finally:
        for one in running:
            one.terminate()
            one.wait()


def mapped(many: int) -> float:
    text = "".join(f"{n}\n" for n in range(many)).encode()
    began = time.perf_counter()
    command = [CPOOL, "map", "--no-container", "--cpus", "0.1", "--workdir", "/", "--", "true"]
    subprocess.run(command, input=text, check=True, stdout=subprocess.DEVNULL)
    return many / (time.perf_counter() - began)


def parallel(base: str, ports: list[int], many: int, *, is_shared: bool) -> float:
    """is_shared: with connections that are kept; GNU parallel itself makes one for each job."""
    ssh = f"{shutil.which('ssh')} -i {base}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    if is_shared:
        ssh += f" -o ControlMaster=auto -o ControlPath={base}/%p.ctl -o ControlPersist=30"
    logins = ",".join(f"2/{ssh} -p {port} root@127.0.0.1" for port in ports)
    text = "".join(f"{n}\n" for n in range(many)).encode()
    began = time.perf_counter()
    subprocess.run(
        ["parallel", "-S", logins, "true", "#"], input=text, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return many / (time.perf_counter() - began)


def latency() -> float:
    """From the controller's receipt of a submit to the process, by the clock of both, for they are on one machine."""
    found = []
    for _ in range(30):
        command = [CPOOL, "submit", "--no-container", "--workdir", "/", "--", "date", "+%s.%N"]
        number = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run([CPOOL, "wait", number], check=True)
        said = float(subprocess.run([CPOOL, "logs", number], check=True, capture_output=True, text=True).stdout)
        job = json.loads(subprocess.run([CPOOL, "job", number, "--json"], check=True, capture_output=True, text=True).stdout)
        found.append(said - job["submitted_s"])
    return statistics.median(found)


def main() -> None:
    compiled()
    placing()
    simulating()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "pool")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(f"{base}/home", mode=0o700)
    many = int(sys.argv[1]) if sys.argv[1:] else 2000
    with servers(base) as ports:
        os.environ |= {"HOME": f"{base}/home", "CAFS_POOL": f"{base}/state"}
        subprocess.run([CPOOL, "init"], check=True)
        for number, port in enumerate(ports):
            add = [CPOOL, "host", "add", f"w{number}", f"root@127.0.0.1:{port}", "--identity", f"{base}/key", "--yes"]
            subprocess.run(add, check=True, stderr=subprocess.DEVNULL)
        with subprocess.Popen([CPOOL, "serve"]) as controller:
            while subprocess.run([CPOOL, "nodes"], capture_output=True, text=True).stdout.count(" ready ") < SERVERS:
                time.sleep(0.1)
            ours: list[float] = []
            theirs: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(3):
                ours.append(mapped(many))
                for is_shared in theirs if shutil.which("parallel") else ():
                    theirs[is_shared].append(parallel(base, ports, 100 if is_shared else 40, is_shared=is_shared))
            print(f"cpool map -- true, four sshd\t{statistics.median(ours):.0f} jobs a second")
            for is_shared, found in theirs.items():
                if found:
                    middle, how = statistics.median(found), "connections kept" if is_shared else "as it comes"
                    ratio = statistics.median(ours) / middle
                    print(f"parallel --sshlogin, {how}\t{middle:.0f} jobs a second\t{ratio:.0f} x")
            print(f"from a submit to the process\t{latency() * 1000:.1f} ms")
            subprocess.run([CPOOL, "down"], check=True)
            controller.wait()


if __name__ == "__main__":
    main()
