"""Time reading a whole image, verified, from a store behind HTTP with 15 ms a request, beside the least that anybody has to do:
download the same packs one after the other, and decompress and hash what is in them.

usage: bulk.py TREE [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench)
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request

import zstandard

from cafs import image, pack
from cafs.bulk import read_index
from cafs.indexing import Options, create_image
from cafs.store import Store

DELAY_S = 0.015


def download(url: str, names: list[str]) -> list[bytes]:
    found = []
    for name in names:
        with urllib.request.urlopen(f"{url}/packs/{name}") as answer:
            found.append(answer.read())
    return found


def unpack(packs: list[bytes]) -> None:
    """zstd and sha256 of every frame, nothing else, on one processor."""
    decompressor = zstandard.ZstdDecompressor()
    for data in packs:
        footer = pack.decode_footer(data[-pack.footer_size(data[-pack.FOOTER.size :]) :], len(data))
        for _, _, offset, stored, _ in footer.rows():
            body = data[offset + pack.FRAME.size : offset + stored]
            hashlib.sha256(decompressor.decompress(body) if data[offset + 4] else body).digest()


def ours(url: str) -> None:
    store = Store(url)
    index = image.load_tree(store, image.resolve(store, "bench:1"))
    kept = [data for _, data in read_index(store, index)]
    assert all(isinstance(data, memoryview) for data in kept)


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


if __name__ == "__main__":
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "bulk")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    os.environ["CAFS_CACHE"] = f"{base}/cache"
    create_image(Options(sys.argv[1], jobs=2), f"{base}/store", "bench:1")
    names = list(Store(f"{base}/store").pack_sizes())
    # In a process of its own, so that it does not wait for the interpreter that is measured.
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "serve.py"), base, str(DELAY_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        url, ratios, rows = f"http://127.0.0.1:{int(server.stdout.readline())}/store", [], []
        for _ in range(int(sys.argv[2]) if sys.argv[2:] else 3):
            shutil.rmtree(f"{base}/cache", ignore_errors=True)
            down, packs = timed(download, url, names)
            work, _ = timed(unpack, packs)
            del packs
            mine, _ = timed(ours, url)
            rows.append((down, work, mine))
            ratios.append(max(down, work) / mine)
        down, work, mine = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"download {down:.2f} s\tzstd + sha256 {work:.2f} s\tours {mine:.2f} s\tspeed {statistics.median(ratios):.2f}")
    shutil.rmtree(base, ignore_errors=True)
