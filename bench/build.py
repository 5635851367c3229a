"""Time builds: cbuild beside docker's classic builder, buildah, and the same commands by hand in a chroot on an overlay.

usage: build.py TREE [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench)

Needs root.  docker and buildah are measured if they are installed; dockerd is started here, on directories of the bench.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".venv", "bin")
QUIET: dict = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
STEPS = """ENV A=1
RUN echo one > /one
COPY app /app
RUN cat /app/* > /all && rm /app/f1
RUN python3 -m compileall -q -f /usr/lib/python3/dist-packages/sklearn
RUN dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null
CMD ["python3"]
"""
BY_HAND = """set -e
mount -t overlay o -o lowerdir={tree},upperdir={base}/hand/u,workdir={base}/hand/w {base}/hand/m
chroot {base}/hand/m sh -c 'echo one > /one'
cp -r {base}/context/app {base}/hand/m/app
chroot {base}/hand/m sh -c 'cat /app/* > /all && rm /app/f1'
chroot {base}/hand/m python3 -m compileall -q -f /usr/lib/python3/dist-packages/sklearn
chroot {base}/hand/m dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null
"""


def timed(command: list[str], **options: object) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, **QUIET, **options)
    return time.perf_counter() - began


def make_context(base: str) -> None:
    os.makedirs(f"{base}/context/app")
    rng = random.Random(1)
    for number in range(1, 1001):
        with open(f"{base}/context/app/f{number}", "wb") as file:
            file.write(rng.randbytes(1350).hex().encode())


def by_hand(base: str, tree: str) -> float:
    for name in "uwm":
        os.makedirs(f"{base}/hand/{name}")
    try:
        return timed(["sh", "-c", BY_HAND.format(base=base, tree=tree)])
    finally:
        subprocess.run(["umount", f"{base}/hand/m"], check=True)
        shutil.rmtree(f"{base}/hand")


@contextmanager
def docker(base: str) -> Iterator[bool]:
    if not shutil.which("dockerd"):
        yield False
        return
    options = ["--data-root", f"{base}/docker", "--exec-root", f"{base}/docker-run", "--pidfile", f"{base}/docker.pid"]
    options += ["--storage-driver", "overlay2", "--iptables=false", "--bridge=none", "-H", f"unix://{base}/docker.sock"]
    with open(f"{base}/docker.log", "wb") as log, subprocess.Popen(["dockerd", *options], stdout=log, stderr=log) as server:
        os.environ |= {"DOCKER_HOST": f"unix://{base}/docker.sock", "DOCKER_BUILDKIT": "0"}
        try:
            for _ in range(100):
                if subprocess.run(["docker", "info"], check=False, **QUIET).returncode == 0:
                    break
                time.sleep(0.1)
            yield True
        finally:
            server.terminate()


def sides(base: str, tree: str, have_docker: bool) -> dict[str, Callable[[bool], float]]:
    """name -> builds, with everything cached or nothing."""
    cbuild = [f"{BIN}/cbuild", "-q", "-t", "t:1", "--network", "none"]
    found: dict[str, Callable[[bool], float]] = {
        "cbuild": lambda is_cached: timed([*cbuild, *([] if is_cached else ["--no-cache"]), f"{base}/context"]),
        "by hand": lambda is_cached: 0.0 if is_cached else by_hand(base, tree),
    }
    if have_docker:
        command = ["docker", "build", "--network", "none", "-q", "-t", "t:1"]
        found["docker"] = lambda is_cached: timed([*command, *([] if is_cached else ["--no-cache"]), f"{base}/context"])
    if shutil.which("buildah"):
        words = ["buildah", "--root", f"{base}/buildah", "bud", "--isolation", "chroot", "--layers", "-q", "-t", "t:1"]
        words += ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]
        found["buildah"] = lambda is_cached: timed([*words, *([] if is_cached else ["--no-cache"]), f"{base}/context"])
    return found


def prepare(base: str, tree: str, have_docker: bool) -> None:
    subprocess.run([f"{BIN}/cafs-index", "create", tree, "-t", "sk:1"], check=True, **QUIET)
    os.makedirs(f"{base}/mnt")
    subprocess.run([f"{BIN}/cafs-mount", "--prefetch", "all", "sk:1", f"{base}/mnt"], check=True, **QUIET)
    subprocess.run(f"find {base}/mnt -type f -print0 | xargs -0 cat > /dev/null", shell=True, check=True)
    if have_docker:
        subprocess.run(f"tar -C {tree} -c . | docker import - sk:1", shell=True, check=True, **QUIET)
    if shutil.which("buildah"):
        script = (
            f"c=$(buildah --root {base}/buildah from scratch); m=$(buildah --root {base}/buildah mount $c); cp -a {tree}/. $m; "
        )
        script += f"buildah --root {base}/buildah commit -q $c sk:1; buildah --root {base}/buildah rm $c"
        subprocess.run(["sh", "-c", script], check=True, **QUIET)


def main() -> None:
    tree, count = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 3
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "build")
    subprocess.run([sys.executable, "-m", "compileall", "-q", "cafs", "cli", "runner", "builder"], check=True)
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    os.environ |= {f"CAFS_{name}": f"{base}/cafs/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")}
    make_context(base)
    with open(f"{base}/context/Dockerfile", "w", encoding="ascii") as file:
        file.write(f"FROM sk:1\n{STEPS}")
    with docker(base) as have_docker:
        prepare(base, tree, have_docker)
        try:
            builders = sides(base, tree, have_docker)
            for title, is_cached in (("nothing cached but the base", False), ("everything cached", True)):
                rows = [{name: build(is_cached) for name, build in builders.items()} for _ in range(count)]
                print(title)
                ours = statistics.median(row["cbuild"] for row in rows)
                for name in builders:
                    middle = statistics.median(row[name] for row in rows)
                    print(f"  {name}\t{middle:.2f} s\t{f'{ours / middle:.2f}' if middle else ''}")
        finally:
            subprocess.run([f"{BIN}/cafs-mount", "--unmount", f"{base}/mnt"], check=False, **QUIET)


if __name__ == "__main__":
    main()
