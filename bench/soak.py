"""Open, read and close files of a mount very many times; show that its servers' memory and descriptors do not grow.

usage: soak.py TREE [OPENS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root

The pages are dropped after each read, so that each open is a request to the server; OPEN itself never reaches it.
"""

import os
import random
import shutil
import subprocess
import sys
import time

from cafs.indexing import Options, create_image

MOUNT = os.path.join(os.path.dirname(sys.executable), "cafs-mount")


def servers(run: str) -> list[int]:
    """Processes that hold the mark of life of a mount below RUN."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(path.startswith(run) and path.endswith("/alive") for path in held):
            found.append(int(pid))
    return sorted(found)


def memory(pid: int) -> int:
    """PSS in KiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def main() -> None:
    tree, opens = sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else 1_000_000
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "soak")
    os.makedirs(f"{base}/mnt", exist_ok=True)
    os.environ.update(CAFS_CACHE=f"{base}/cache", CAFS_RUN=f"{base}/run")
    shutil.rmtree(f"{base}/cache", ignore_errors=True)
    create_image(Options(tree, jobs=2), f"{base}/store", "soak:1")
    subprocess.run([MOUNT, "--engine", "fuse", "--store", f"{base}/store", "soak:1", f"{base}/mnt"], check=True)
    try:
        files = [os.path.join(top, name) for top, _, names in os.walk(f"{base}/mnt") for name in names]
        files = [path for path in files if os.path.isfile(path) and not os.path.islink(path)]
        rng, began = random.Random(1), time.monotonic()
        print("opens\tseconds\tPSS of the servers, MiB\tdescriptors")
        for number in range(opens + 1):
            if number % (opens // 10) == 0:
                pids = servers(f"{base}/run")
                size = "+".join(f"{memory(pid) / 1024:.1f}" for pid in pids)
                held = "+".join(str(len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids)
                print(f"{number}\t{time.monotonic() - began:.0f}\t{size}\t{held}", flush=True)
            fd = os.open(rng.choice(files), os.O_RDONLY)
            os.read(fd, 65536)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    finally:
        subprocess.run([MOUNT, "--unmount", f"{base}/mnt"], check=True)


if __name__ == "__main__":
    main()
