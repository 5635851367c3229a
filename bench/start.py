"""Time `python3 -c 'import sklearn'` in the benchmark's tree: natively (chroot), on the kernel engine and on the fuse engine;
with warm and cold page cache, and with nothing on the machine and a store of 15 ms a request.  Needs root.

usage: start.py TREE [RUNS [OUT.svg]]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench)

With OUT.svg it also draws how long reading 1, 5, 30 and 100 % of the files takes: touched.py.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time

from cafs.indexing import Options, create_image

HERE = os.path.dirname(os.path.abspath(__file__))
MOUNT = os.path.join(os.path.dirname(sys.executable), "cafs-mount")
DELAY_S = 0.015


def start(root: str) -> float:
    began = time.perf_counter()
    subprocess.run(["chroot", root, "/usr/bin/python3", "-c", "import sklearn"], check=True)
    return time.perf_counter() - began


def find(root: str) -> float:
    began = time.perf_counter()
    subprocess.run(["find", root, "-printf", "%s"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def cold() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


class Mounted:
    """A mount of the image; seconds: how long mounting took."""

    def __init__(self, base: str, engine: str, store: str, cache: str, *more: str) -> None:
        self.point = os.path.join(base, "mnt")
        os.makedirs(self.point, exist_ok=True)
        os.environ.update(CAFS_CACHE=cache, CAFS_RUN=os.path.join(base, "run"))
        began = time.perf_counter()
        subprocess.run([MOUNT, "--engine", engine, "--store", store, *more, "bench:1", self.point], check=True)
        self.seconds = time.perf_counter() - began

    def __enter__(self) -> "Mounted":
        return self

    def __exit__(self, *failure: object) -> None:
        subprocess.run([MOUNT, "--unmount", self.point], check=True)


def one_round(tree: str, base: str, url: str) -> dict[str, float]:
    found, cache = {}, os.path.join(base, "cache")
    cold()
    found["native cold"] = start(tree)
    found["native warm"] = start(tree)
    found["find native"] = find(tree)
    record = ["--record", f"{base}/again"]
    for name, more in (
        ("recorded", [*record, "--prefetch", "none"]),
        ("no profile", ["--prefetch", "none"]),
        ("profile", ["--prefetch", "default"]),
    ):
        shutil.rmtree(cache, ignore_errors=True)
        cold()
        with Mounted(base, "kernel", url, cache, *more) as mounted:
            found[f"nothing here, {name}, mount alone"] = mounted.seconds
            found[f"nothing here, {name}"] = start(mounted.point) + mounted.seconds
    cold()
    with Mounted(base, "kernel", url, cache, "--prefetch", "none") as mounted:
        found["kernel cold"] = start(mounted.point)
        found["kernel warm"] = start(mounted.point)
        find(mounted.point)
        found["find kernel"] = find(mounted.point)
    with Mounted(base, "kernel", url, cache) as mounted:
        found["mount, metadata cached"] = mounted.seconds
    for engine in ("fuse", "pyfuse3"):
        with Mounted(base, engine, url, cache, "--prefetch", "none"):
            pass  # the columns are in the cache now
        with Mounted(base, engine, url, cache, "--prefetch", "none") as mounted:
            found[f"{engine}: mount, metadata cached"] = mounted.seconds
            start(mounted.point)
            found[f"{engine} warm"] = start(mounted.point)
            found[f"find {engine}, first"] = find(mounted.point)
            found[f"find {engine}"] = find(mounted.point)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import click"], check=True)
    found["python3 -c 'import click'"] = time.perf_counter() - began
    return found


def compiled() -> None:
    """As an installed package has them: modules that were changed here would be compiled anew at each start."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", "cafs", "cli", "runner"], check=True)


def main() -> None:
    tree = sys.argv[1]
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "start")
    shutil.rmtree(os.path.join(base, "store"), ignore_errors=True)
    os.makedirs(base, exist_ok=True)
    os.environ["CAFS_CACHE"] = f"{base}/cache"
    create_image(Options(tree, jobs=2), f"{base}/store", "bench:1")
    record = f"{base}/record"
    with Mounted(base, "kernel", f"{base}/store", f"{base}/cache", "--record", record) as mounted:
        start(mounted.point)
    index = os.path.join(os.path.dirname(sys.executable), "cafs-index")
    subprocess.run([index, "profile", "bench:1", "--from", record, "--store", f"{base}/store"], check=True)
    os.unlink(record)
    command = [sys.executable, os.path.join(HERE, "serve.py"), base, str(DELAY_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/store"
        rounds = [one_round(tree, base, url) for _ in range(int(sys.argv[2]) if sys.argv[2:] else 5)]
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    against = {"kernel warm": "native warm", "kernel cold": "native cold"}
    against |= {f"nothing here, {name}": "native cold" for name in ("no profile", "profile")}
    against |= {"nothing here, recorded": "nothing here, no profile"}
    against |= {f"{engine} warm": "native warm" for engine in ("fuse", "pyfuse3")}
    against |= {f"find {engine}": "find native" for engine in ("kernel", "fuse", "pyfuse3")}
    for name, seconds in middle.items():
        ratio = f"\t{seconds / middle[against[name]]:.2f} x {against[name]}" if name in against else ""
        print(f"{name}\t{seconds:.3f} s{ratio}")
    if sys.argv[3:]:
        subprocess.run([sys.executable, os.path.join(HERE, "touched.py"), tree, sys.argv[3], "2"], check=True)


if __name__ == "__main__":
    main()
