"""Memory of mounts: the servers of one tree of 500,101 entries after `find` over it, and of fifty mounts at once.

usage: memory.py TREE    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root

PSS (proc_pid_smaps(5)): a page that N processes share counts as an N-th for each.
"""

import os
import shutil
import subprocess
import sys
import time

from load import make
from soak import MOUNT, memory, servers

from cafs.indexing import Options, create_image

FIFTY = 50


def main() -> None:
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "memory")
    shutil.rmtree(f"{base}/cache", ignore_errors=True)
    os.makedirs(base, exist_ok=True)
    os.environ.update(CAFS_CACHE=f"{base}/cache", CAFS_RUN=f"{base}/run", CAFS_STORE=f"{base}/store")
    create_image(Options(sys.argv[1], jobs=2), f"{base}/store", "tree:1")
    with open(f"{base}/large.idx", "wb") as file:
        file.write(make())
    for name, engine, images in (
        ("500,101 entries, fuse, after find", "fuse", [f"{base}/large.idx"]),
        ("36,000 entries, fuse, after find", "fuse", ["tree:1"]),
        ("fifty of 36,000 entries, kernel", "kernel", ["tree:1"] * FIFTY),
        ("fifty of 36,000 entries, fuse", "fuse", ["tree:1"] * FIFTY),
    ):
        points = [f"{base}/mnt{number}" for number in range(len(images))]
        try:
            for image, point in zip(images, points, strict=True):
                os.makedirs(point, exist_ok=True)
                subprocess.run([MOUNT, "--engine", engine, image, point], check=True)
                if "find" in name:
                    subprocess.run(["find", point, "-printf", "%s"], check=True, stdout=subprocess.DEVNULL)
            time.sleep(2)
            sizes = [memory(pid) / 1024 for pid in servers(f"{base}/run")]
            print(f"{name}\t{sum(sizes):.1f} MiB in {len(sizes)} processes\tlargest {max(sizes):.1f} MiB", flush=True)
        finally:
            for point in points:
                subprocess.run([MOUNT, "--unmount", point], check=False)


if __name__ == "__main__":
    main()
