"""Time containers: crun beside docker, ctr, and runc with the same bundle; starts a second; a pipe; `import sklearn`.

usage: run.py TREE [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench)

Needs root.  docker and ctr are measured if dockerd and containerd are installed: both are started here, on directories of
their own.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.path.dirname(sys.executable)
CRUN = os.path.join(BIN, "crun")
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
PIPE_BYTES = 4 << 30


def timed(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, **QUIET)
    return time.perf_counter() - began


def inside(*words: str) -> float:
    """How long the import takes by the clock of the program that does it."""
    code = "import time; began = time.perf_counter(); import sklearn; print(time.perf_counter() - began)"
    return float(subprocess.run([*words, "python3", "-c", code], check=True, stdout=subprocess.PIPE).stdout)


def rounds(count: int, sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each side; all in turns."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, side in sides.items():
            found[name].append(side())
    return {name: statistics.median(values) for name, values in found.items()}


def show(title: str, found: dict[str, float], *, unit: str = "s") -> None:
    print(f"\n{title}")
    mine = next(iter(found.values()))
    for name, value in found.items():
        print(f"  {name.ljust(34)}{value:9.3f} {unit}\t{mine / value:.2f}")


@contextlib.contextmanager
def daemons(base: str) -> Iterator[bool]:
    """dockerd with a containerd of its own, and the small image `tiny:1` in both."""
    if not shutil.which("dockerd") or not shutil.which("containerd"):
        yield False
        return
    sock = f"unix://{base}/docker.sock"
    os.environ |= {
        "DOCKER_HOST": sock,
        "CONTAINERD_ADDRESS": f"{base}/containerd/containerd.sock",
        "CONTAINERD_NAMESPACE": "bench",
    }
    log = open(f"{base}/daemons.log", "w")
    arguments = [
        "--data-root",
        f"{base}/docker",
        "--exec-root",
        f"{base}/docker-run",
        "-H",
        sock,
        "--pidfile",
        f"{base}/docker.pid",
    ]
    settings = f'version = 2\nroot = "{base}/ctd"\nstate = "{base}/containerd"\n'
    settings += f'[grpc]\n address = "{base}/containerd/containerd.sock"\n'
    with open(f"{base}/containerd.toml", "w") as file:
        file.write(settings)
    containerd = subprocess.Popen(["containerd", "--config", f"{base}/containerd.toml"], stdout=log, stderr=log)
    docker = subprocess.Popen(["dockerd", *arguments, "--iptables=false", "--bridge=none"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while any(subprocess.run([program, "version"], capture_output=True).returncode for program in ("docker", "ctr")):
            if time.monotonic() > until:
                yield False
                return
            time.sleep(0.3)
        tar = subprocess.run(["tar", "c", "-C", f"{base}/tiny", "."], stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["docker", "import", "-", "tiny:1"], input=tar, check=True, stdout=subprocess.DEVNULL)
        saved = subprocess.run(["docker", "save", "tiny:1"], stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["ctr", "images", "import", "-"], input=saved, check=True, stdout=subprocess.DEVNULL)
        yield True
    finally:
        for daemon in (docker, containerd):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def tiny(base: str) -> None:
    for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
        os.makedirs(f"{base}/tiny/{name}", exist_ok=True)
    shutil.copy(str(shutil.which("busybox")), f"{base}/tiny/bin/busybox")
    for name in ("sh", "true", "cat"):
        with contextlib.suppress(FileExistsError):
            os.symlink("busybox", f"{base}/tiny/bin/{name}")


def same_bundle(base: str) -> list[str]:
    """runc alone, with the config.json that crun has written, on the plain directory."""
    subprocess.run([CRUN, "run", "--name", "bundle", "--network", "none", "tiny:1", "true"], check=True, **QUIET)
    directory = os.path.dirname(
        json.loads(subprocess.run([CRUN, "inspect", "bundle"], capture_output=True, check=True).stdout)["LogPath"]
    )
    bundle = f"{base}/bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(directory, bundle, ignore=shutil.ignore_patterns("upper", "work", "rootfs"))
    document = json.load(open(f"{bundle}/config.json"))
    document["root"]["path"] = f"{base}/tiny"
    document["linux"]["cgroupsPath"] = "/cafs/bench-runc"
    for mount in document["mounts"]:
        mount["source"] = mount["source"].replace(directory, bundle)
    json.dump(document, open(f"{bundle}/config.json", "w"))
    subprocess.run([CRUN, "rm", "bundle"], check=True, **QUIET)
    return ["runc", "run", "-b", bundle, "bench-runc"]


def at_once(count: int, words: Callable[[int], list[str]]) -> Callable[[], float]:
    """COUNT starts, eight at a time: starts a second."""

    def run() -> float:
        began, left, running = time.perf_counter(), iter(range(count)), []
        while True:
            while len(running) < 8 and (number := next(left, None)) is not None:
                running.append(subprocess.Popen(words(number), **QUIET))
            if not running:
                return count / (time.perf_counter() - began)
            running.pop(0).wait()

    return run


def pipe(*words: str) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        script = f"head -c {PIPE_BYTES} /dev/zero | {' '.join(words)} > /dev/null"
        subprocess.run(["sh", "-c", f"{script.replace('> /dev/null', '| cat > /dev/null')}"], check=True)
        return PIPE_BYTES / (time.perf_counter() - began) / 1e9

    return run


def main() -> None:
    tree, count = sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else 15
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "run")
    subprocess.run([sys.executable, "-m", "compileall", "-q", "cafs", "cli", "runner"], check=True)
    os.makedirs(base, exist_ok=True)
    os.environ |= {f"CAFS_{name}": f"{base}/cafs/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")}
    tiny(base)
    for source, name in ((f"{base}/tiny", "tiny:1"), (tree, "bench:1")):
        subprocess.run([f"{BIN}/cafs-index", "create", source, "-t", name], check=True, **QUIET)
        os.makedirs(f"{base}/{name[:-2]}-mnt", exist_ok=True)
        subprocess.run([f"{BIN}/cafs-mount", "--prefetch", "none", name, f"{base}/{name[:-2]}-mnt"], check=True, **QUIET)
    crun = [CRUN, "run", "--rm", "--network", "none"]
    try:
        with daemons(base) as have_peers:
            docker = ["docker", "run", "--rm", "--network", "none", "tiny:1"]
            runc = same_bundle(base)
            sides = {"crun run --rm --network none": lambda: timed(*crun, "tiny:1", "true")}
            sides["runc run of the same bundle"] = lambda: timed(*runc)
            sides["crun run --rm (bridge)"] = lambda: timed(CRUN, "run", "--rm", "tiny:1", "true")
            if have_peers:
                sides["docker run --rm --network none"] = lambda: timed(*docker, "true")
                sides["ctr run --rm"] = lambda: timed(
                    "ctr", "run", "--rm", "docker.io/library/tiny:1", f"b{time.monotonic_ns()}", "true"
                )
            show("true (the ratio: crun's to it)", rounds(count, sides))
            sides = {"crun": at_once(100, lambda _: [*crun, "tiny:1", "true"])}
            if have_peers:
                sides["docker"] = at_once(100, lambda _: [*docker, "true"])
            show("100 starts, 8 at a time", rounds(1, sides), unit="a second")
        sides = {
            "crun": lambda: timed(*crun, "bench:1", "python3", "-c", "import sklearn"),
            "chroot into the native tree": lambda: timed("chroot", tree, "python3", "-c", "import sklearn"),
        }
        show("import sklearn, warm", rounds(max(count // 3, 3), sides))
        sides = {
            "crun": lambda: inside(*crun, "bench:1"),
            "chroot into the native tree": lambda: inside("chroot", tree),
        }
        show("import sklearn, warm, without the start of the container", rounds(max(count // 3, 3), sides))
        cat = {"crun run -i --rm": pipe(*crun, "-i", "tiny:1", "cat"), "chroot": pipe("chroot", f"{base}/tiny", "/bin/cat")}
        foreground = json.load(open(f"{base}/bundle/config.json"))
        foreground["process"]["args"] = ["cat"]
        json.dump(foreground, open(f"{base}/bundle/config.json", "w"))
        cat["runc run in the foreground"] = pipe(*runc)
        show("a pipe of 4 GiB", rounds(3, cat), unit="GB/s")
    finally:
        for name in ("tiny", "bench"):
            subprocess.run([f"{BIN}/cafs-mount", "--unmount", f"{base}/{name}-mnt"], check=False, **QUIET)


if __name__ == "__main__":
    main()
