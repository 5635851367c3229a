"""Time opening a merged locator of a million objects and looking one up, beside reading the same bytes; and its memory.

usage: locator.py [OBJECTS]    works in $CAFS_CACHE, by default a temporary directory
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time


def make(count: int) -> None:
    """Merge packs of 10,000 objects until there are COUNT."""
    from cafs import merged, pack

    found, sizes = merged.Merged("sha256"), {}
    footers = {}
    for number in range(count // 10_000):
        name = f"{number:064x}"
        sizes[name] = 1 << 26
        footers[name] = pack.Records.build("sha256", [(os.urandom(32), 0, 8 + 6000 * n, 5000, 9000) for n in range(10_000)])
    merged.merge("bench", found, footers, sizes)


def measure() -> None:
    """In a process of its own: milliseconds to open and find, and the growth of the resident set in MiB."""
    from cafs import merged

    def resident() -> int:
        return int(re.search(r"VmRSS:\s*(\d+)", open("/proc/self/status").read())[1]) >> 10

    before, start = resident(), time.perf_counter()
    found = merged.load("bench", "sha256")
    list(found.locate(b"\x77" * 32, 0))
    opened = time.perf_counter() - start
    start = time.perf_counter()
    with open(merged.path_of("bench", "sha256"), "rb") as file:
        size = len(file.read())
    plain = time.perf_counter() - start
    print(len(found), opened * 1000, plain * 1000, resident() - before, size >> 20)


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        measure()
        sys.exit()
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("CAFS_CACHE", directory)
        make(int(sys.argv[1]) if sys.argv[1:] else 1_000_000)
        rows = [
            list(
                map(
                    float, subprocess.run([sys.executable, __file__, "--child"], capture_output=True, check=True).stdout.split()
                )
            )
            for _ in range(7)
        ]
        count, opened, plain, memory, size = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{count:.0f} objects, {size:.0f} MiB\topen {opened:.1f} ms\tread the file {plain:.1f} ms\tmemory {memory:.0f} MiB"
        )
