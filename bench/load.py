"""Time loading a 500,101-entry index with every check, beside the least that any reader does: hash it and split it.

usage: load.py [RUNS]    prints medians, their ratio, and the peak memory of a process that loads it
"""

import hashlib
import io
import re
import statistics
import subprocess
import sys
import time

from cafs.index import load


def make() -> bytes:
    """100 directories of 50 of 99 files each, in a root."""
    lines = ["cafs-index 1 sha256 4194304", "d 755 0 0 1700000000000000000 - - - - /"]
    for a in range(100):
        lines.append(f"d 755 0 0 1700000000000000000 - - - - /dir{a:03d}")
        for b in range(50):
            lines.append(f"d 755 0 0 1700000000000000000 - - - - /dir{a:03d}/sub{b:02d}")
            for c in range(99):
                number = (a * 50 + b) * 99 + c
                digest = hashlib.sha256(b"%d" % number).hexdigest()
                stat = f"644 {number % 7} 0 {1_700_000_000_000_000_000 + number} {number % 9999 + 1}"
                lines.append(f"f {stat} {digest} - - /dir{a:03d}/sub{b:02d}/file{c:02d}.py")
    lines.append(f"end {len(lines) - 1}")
    return "\n".join(lines).encode() + b"\n"


def least(data: bytes) -> None:
    """Hash and split."""
    hashlib.sha256(data).digest()
    [line.split(b" ") for line in data.split(b"\n")]


def timed(function, argument) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        load(sys.stdin.buffer)
        print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
        sys.exit()
    data = make()
    runs = int(sys.argv[1]) if sys.argv[1:] else 7
    pairs = [(timed(least, data), timed(lambda d: load(io.BytesIO(d)), data)) for _ in range(runs)]
    peak = subprocess.run([sys.executable, __file__, "--child"], input=data, capture_output=True, check=True).stdout
    low, high = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"hash + split {low:.2f} s\tload {high:.2f} s\tratio {ratio:.2f}\tpeak {int(peak) >> 10} MB")
