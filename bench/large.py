"""Read one file of 1 GB in order: cached, beside a native file; not cached, from a web server on loopback, beside curl.

usage: large.py [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root
"""

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time

from start import HERE, Mounted, cold, compiled

from cafs.indexing import Options, create_image

SIZE = 1 << 30


def read(path: str) -> float:
    began = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    return time.perf_counter() - began


def keep_warm(base: str) -> None:
    """For curl and for us alike: have the server's files in memory, as its disk is not what is measured, and free memory that
    the hypervisor has not taken back, which after `cold` costs up to a second a gigabyte.
    """
    for directory, _, names in os.walk(f"{base}/store"):
        for name in names:
            read(os.path.join(directory, name))
    read(f"{base}/one")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, 6 * SIZE, flags=flags).close()


def one_round(base: str, url: str, whole: str) -> dict[str, float]:
    found = {}
    for name in ("cold", "warm"):
        if name == "cold":
            cold()
        found[f"native {name}"] = read(f"{base}/tree/file")
    keep_warm(base)
    began = time.perf_counter()
    subprocess.run(["curl", "-s", "-o", f"{base}/out", whole], check=True)
    found["curl to a file"] = time.perf_counter() - began
    os.unlink(f"{base}/out")
    for engine in ("kernel", "fuse"):
        shutil.rmtree(f"{base}/cache", ignore_errors=True)
        keep_warm(base)
        with Mounted(base, engine, url, f"{base}/cache") as mounted:
            found[f"{engine}, not cached"] = read(f"{mounted.point}/file")
        for name in ("cold", "warm"):
            with Mounted(base, engine, url, f"{base}/cache") as mounted:
                if name == "cold":
                    cold()
                else:
                    read(f"{mounted.point}/file")
                found[f"{engine}, cached, {name}"] = read(f"{mounted.point}/file")
    return found


def main() -> None:
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "large")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(f"{base}/tree")
    with open(f"{base}/tree/file", "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    os.environ["CAFS_CACHE"] = f"{base}/cache"
    create_image(Options(f"{base}/tree", jobs=2), f"{base}/store", "bench:1")
    with open(f"{base}/one", "wb") as file:  # the same bytes as one file, for curl
        for name in sorted(os.listdir(f"{base}/store/packs")):
            if name != "list":
                with open(f"{base}/store/packs/{name}", "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
    command = [sys.executable, os.path.join(HERE, "serve.py"), base, "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        rounds = [one_round(base, f"{url}/store", f"{url}/one") for _ in range(int(sys.argv[1]) if sys.argv[1:] else 3)]
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, seconds in middle.items():
        beside = "curl to a file" if "not cached" in name else f"native {name.rpartition(' ')[2]}" if "," in name else ""
        ratio = f"\t{middle[beside] / seconds:.2f} of the speed of {beside}" if beside else ""
        print(f"{name}\t{seconds:.3f} s\t{SIZE / seconds / 1e6:.0f} MB/s{ratio}")


if __name__ == "__main__":
    main()
