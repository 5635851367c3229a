"""Functions beside Ray (where it is installed): warm calls, pipelined calls, large values, cold starts, idle functions.

usage: fn.py [TREE [SKLEARN-TREE]]    from the top of the project; TREE has /usr/bin/python3 (default: the demo's); works in
                                      $CAFS_BENCH (default /var/tmp/cafs-bench); needs root, runc, busybox, sshd
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pool.calling import Function, stats

BIN = os.path.dirname(sys.executable)
HANDLERS = """\
def echo(value):
    return value
def size(value):
    return len(value)
def nap(value):
    import time
    time.sleep(value)
def learn(value):
    import sklearn
    return sklearn.__version__
"""


def cpool(*words: object, **more: object) -> str:
    done = subprocess.run([f"{BIN}/cpool", *map(str, words)], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{words}: {done.stderr}")
    return str(done.stdout)


@contextmanager
def pool(base: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    os.environ["CAFS_POOL"] = f"{base}/{name}"
    cpool("init")
    with subprocess.Popen([f"{BIN}/cpool", "serve"]) as controller:
        try:
            yield controller
        finally:
            if controller.poll() is None:
                subprocess.run([f"{BIN}/cpool", "down", "--grace", "0"], check=False)
                controller.wait(60)


def ready() -> None:
    while (
        '"state": "ready"'
        not in subprocess.run([f"{BIN}/cpool", "nodes", "--json"], capture_output=True, text=True, check=False).stdout
    ):
        time.sleep(0.05)


def images(base: str, tree: str) -> None:
    root = f"{base}/busybox"
    os.makedirs(f"{root}/bin")
    shutil.copy(shutil.which("busybox") or "", f"{root}/bin/busybox")
    for name in ("sh", "cat"):
        os.symlink("busybox", f"{root}/bin/{name}")
    os.makedirs(f"{base}/code")
    with open(f"{base}/code/h.py", "w") as file:
        file.write(HANDLERS)
    for name, source in (("busybox:1", root), ("python:1", tree)):
        subprocess.run([f"{BIN}/cafs-index", "create", "-q", source, "-t", name], check=True)


def deploy(base: str, name: str, handler: str, *more: object, image: str = "python:1") -> None:
    code = ("--code", f"{base}/code") if handler.startswith("python") else ()
    cpool("fn", "deploy", "-q", name, "--image", image, "--handler", handler, *code, "--cpus", "0.5", *more)


def timed(call: Callable[[object], object], many: int) -> list[float]:
    found = []
    for number in range(many):
        began = time.perf_counter()
        call(number)
        found.append(time.perf_counter() - began)
    return sorted(found)


def shown(what: str, seconds: list[float]) -> None:
    median, p99 = statistics.median(seconds), seconds[int(len(seconds) * 0.99)]
    print(f"{what}\t{median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms ({len(seconds)} calls)", flush=True)


def rates(what: str, once: Callable[[], int]) -> None:
    found = []
    for _ in range(5):
        began = time.perf_counter()
        many = once()
        found.append(many / (time.perf_counter() - began))
    print(f"{what}\t{statistics.median(found):,.0f} calls a second (median of 5)", flush=True)


def measure(where: str) -> None:
    echo, size = Function("echo"), Function("size")
    echo.call(0)
    shown(f"warm call, {where}", timed(echo.call, 3000))
    rates(f"Function.map, {where}", lambda: sum(1 for _ in echo.map(range(10_000))))
    data = os.urandom(100_000_000)
    size.call(b"x")
    seconds = timed(lambda _: size.call(data), 5)
    print(f"100 MB, {where}\t{100 / statistics.median(seconds):.0f} MB/s (median of 5)", flush=True)
    lines = "".join(f"{number}\n" for number in range(20_000))
    found = []
    for _ in range(3):
        began = time.perf_counter()
        cpool("fn", "map", "echo", input=lines)
        found.append(20_000 / (time.perf_counter() - began))
    print(f"cpool fn map, 20,000 lines, {where}\t{statistics.median(found):,.0f} a second, the command's start included")


def cold(base: str, name: str, handler: str, what: str, image: str = "python:1") -> None:
    """From a call where no instance is to its answer; its image was run before."""
    deploy(base, name, handler, "--idle", "0.2", "--cpus", "1", image=image)
    found = []
    with Function(name) as function:
        for _ in range(7):
            while any(one["name"] == name and one["instances"] for one in stats()):
                time.sleep(0.02)
            time.sleep(0.3)  # the container before has gone, too
            found += timed(function.call, 1)
    print(f"{what}\t{statistics.median(found) * 1e3:.0f} ms (median of 7)", flush=True)
    cpool("fn", "rm", name)


def second(base: str) -> None:
    """A call while the only instance is busy: an instance that is a fork, from the call to its answer."""
    deploy(base, "nap", "python:h:nap", "--zygote", "--max", "2")
    found = []
    with Function("nap") as function:
        function.call(2)  # so that it is known to be worth a second one
        for _ in range(7):
            thread = threading.Thread(target=function.call, args=(2,))
            thread.start()
            time.sleep(0.3)
            found += timed(lambda _: function.call(0), 1)
            thread.join()
            jobs = [json.loads(line) for line in cpool("jobs", "--json").splitlines()]
            forks = [one["id"] for one in jobs if one["spec"].get("fn", {}).get("name") == "nap"][1:]
            cpool("cancel", "--grace", "0", *forks)
            time.sleep(0.5)
    print(f"second instance, by a zygote\t{statistics.median(found) * 1e3:.0f} ms (median of 7)", flush=True)
    cpool("fn", "rm", "nap")


def ray() -> None:
    try:
        import ray
    except ImportError:
        print("ray\tis not installed")
        return
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")

    @ray.remote
    class Echo:
        def call(self, value: object) -> object:
            return value

        def size(self, value: bytes) -> int:
            return len(value)

    began = time.perf_counter()
    actor = Echo.remote()
    ray.get(actor.call.remote(0))
    print(f"ray: an actor's start\t{time.perf_counter() - began:.2f} s")
    shown("ray: actor call", timed(lambda value: ray.get(actor.call.remote(value)), 3000))
    rates("ray: pipelined actor calls", lambda: len(ray.get([actor.call.remote(n) for n in range(10_000)])))
    data = os.urandom(100_000_000)
    seconds = timed(lambda _: ray.get(actor.size.remote(data)), 5)
    print(f"ray: 100 MB\t{100 / statistics.median(seconds):.0f} MB/s")
    ray.shutdown()


def resident(pids: list[int]) -> int:
    """Bytes, of all of them."""
    found = 0
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            found += next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))
    return found


def ours() -> int:
    """Processes of the pool."""
    return len(subprocess.run(["pgrep", "-f", os.environ["CAFS_POOL"]], capture_output=True, check=False).stdout.split())


def idle(controller: int) -> None:
    """What a thousand functions cost that nobody calls."""
    from pool.client import Client

    router = int(
        subprocess.run(
            ["pgrep", "-f", f"pool.router.*{os.environ['CAFS_POOL']}"], capture_output=True, check=True, text=True
        ).stdout
    )
    time.sleep(2)
    before, processes = resident([controller, router]), ours()
    with Client(os.environ["CAFS_POOL"]) as client:
        (row,) = client.ask("function", what="show", name="echo")["functions"]
        spec = {**row["spec"], "fn": {name: value for name, value in row["spec"]["fn"].items() if name != "version"}}
        for number in range(1000):
            one = {**spec, "fn": {**spec["fn"], "name": f"f{number}"}}
            client.ask("function", what="deploy", name=f"f{number}", spec=one, is_sure=True)
    time.sleep(2)
    more = resident([controller, router]) - before
    print(f"1,000 idle functions\t{more / 1e6:.1f} MB more in controller and router ({before / 1e6:.0f} before), "
          f"{ours() - processes:+d} processes")  # fmt: skip


def behind_ssh(base: str) -> None:
    os.makedirs("/run/sshd", exist_ok=True)
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    place = f"{base}/server"
    os.makedirs(place, mode=0o700)
    subprocess.run([*keygen, "-f", f"{base}/key"], check=True)
    subprocess.run([*keygen, "-f", f"{place}/host"], check=True)
    port = 20000 + os.getpid() % 10000
    with open(f"{place}/config", "w") as file:
        file.write(f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {base}/key.pub\n")
        file.write(f"StrictModes no\nPermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nSetEnv HOME={place}")
        file.write("".join(f" CAFS_{name}={base}/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")) + "\n")
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", f"{place}/config"], stderr=subprocess.DEVNULL)
    try:
        with pool(base, "far"):
            time.sleep(1)
            cpool("host", "add", "w0", f"root@127.0.0.1:{port}", "--identity", f"{base}/key", "--yes")
            ready()
            deploy(base, "echo", "python:h:echo")
            deploy(base, "size", "python:h:size")
            measure("a worker behind SSH on loopback")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    tree = sys.argv[1] if sys.argv[1:] else "/var/tmp/cafs-demo/debian-python"
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "fn")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    os.chdir(base)
    for name in ("STORE", "CACHE", "RUN", "STATE"):
        os.environ[f"CAFS_{name}"] = f"{base}/{name.lower()}"
    images(base, tree)
    ray()
    with pool(base, "near") as controller:
        ready()
        deploy(base, "echo", "python:h:echo")
        deploy(base, "size", "python:h:size")
        measure("this machine")
        idle(controller.pid)
        cpool("fn", "rm", "size")
        cold(base, "cat", "jsonl:cat", "cold: jsonl:cat, busybox", image="busybox:1")
        cold(base, "cold", "python:h:echo", "cold: python handler")
        second(base)
        if sys.argv[2:]:
            subprocess.run([f"{BIN}/cafs-index", "create", "-q", sys.argv[2], "-t", "learn:1"], check=True)
            words = ["chroot", sys.argv[2], "python3", "-c", "import sklearn"]
            native = statistics.median(timed(lambda _: subprocess.run(words, check=True), 5))
            print(f"import sklearn, native\t{native * 1e3:.0f} ms")
            cold(base, "learn", "python:h:learn", "cold: import sklearn", image="learn:1")
    behind_ssh(base)


if __name__ == "__main__":
    main()
