"""What a step of a build costs over its command, whatever the size of the base, and a change of attributes the store.

usage: steps.py TREE [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root

Bases: the TREE (1.2 GB); a tree of busybox alone; that with 500,000 empty files more, which are made in the index only.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys

from cafs import image
from cafs.format import DIRECTORY, FILE, Entry, encode_trailer, order_key
from cafs.index import load
from cafs.indexing import put_layer
from cafs.store import Store
from cafs.writer import Writer

BIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".venv", "bin")
QUIET: dict = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
COUNT, WIDTH = 500_000, 500


def tiny(base: str) -> str:
    os.makedirs(f"{base}/tiny/bin")
    shutil.copy(shutil.which("busybox") or "", f"{base}/tiny/bin/busybox")
    for name in ("sh", "true", "chown", "find"):
        os.symlink("busybox", f"{base}/tiny/bin/{name}")
    return f"{base}/tiny"


def many(store: Store) -> None:
    """The tiny image with very many files."""
    found = image.load_tree(store, image.resolve(store, "tiny:1"))
    entries = list(found.entries())
    for number in range(COUNT // WIDTH):
        top = b"/many/%04d" % number
        entries.append(Entry(DIRECTORY, top, 0o755))
        entries += [Entry(FILE, b"%s/%04d" % (top, one), 0o644) for one in range(WIDTH)]
    entries.append(Entry(DIRECTORY, b"/many", 0o755))
    rows = sorted(entries, key=lambda entry: order_key(entry.path))
    data = b"".join([found.header.encode(), *(entry.encode() for entry in rows), encode_trailer(len(rows))])
    with Writer(store):
        made = put_layer(store, data, load(io.BytesIO(data)), {})
        store.set_ref("many:1", made.digest)


def steps(base: str, name: str, text: str) -> list[float]:
    """Seconds of each step."""
    os.makedirs(f"{base}/context", exist_ok=True)
    with open(f"{base}/context/Dockerfile", "w", encoding="ascii") as file:
        file.write(f"FROM {name}\n{text}")
    command = [f"{BIN}/cbuild", "--progress", "json", "--no-cache", "--network", "none", f"{base}/context"]
    done = subprocess.run(command, capture_output=True, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    return [event["seconds"] for event in events if event["event"] == "done"]


def stored(base: str) -> int:
    packs = f"{base}/cafs/store/packs"
    return sum(os.stat(f"{packs}/{name}").st_size for name in os.listdir(packs))


def main() -> None:
    tree, count = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 3
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "steps")
    subprocess.run([sys.executable, "-m", "compileall", "-q", "cafs", "cli", "runner", "builder"], check=True)
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    os.environ |= {f"CAFS_{name}": f"{base}/cafs/{name.lower()}" for name in ("STORE", "CACHE", "RUN", "STATE")}
    for source, name in ((tiny(base), "tiny:1"), (tree, "sk:1")):
        subprocess.run([f"{BIN}/cafs-index", "create", source, "-t", name], check=True, **QUIET)
    many(Store(f"{base}/cafs/store"))
    for name in ("tiny:1", "sk:1", "many:1"):
        os.makedirs(f"{base}/mnt", exist_ok=True)
        subprocess.run([f"{BIN}/cafs-mount", "--prefetch", "none", name, f"{base}/mnt"], check=True, **QUIET)
        try:
            rounds = [steps(base, name, 'RUN true\nRUN ["true"]\nRUN echo x > /f\n') for _ in range(count)]
        finally:
            subprocess.run([f"{BIN}/cafs-mount", "--unmount", f"{base}/mnt"], check=True, **QUIET)
        first, nothing, change = (1000 * statistics.median(row[at] for row in rounds) for at in range(3))
        print(f"{name}\tfirst step {first:.0f} ms\tRUN true {nothing:.0f} ms\tRUN echo x > /f {change:.0f} ms")
    before = stored(base)
    seconds = steps(base, "sk:1", "RUN chown -R 7:8 /usr\n")
    print(f"chown -R of /usr\t{seconds[0]:.1f} s\t{stored(base) - before} bytes more in the store's packs, of {before}")


if __name__ == "__main__":
    main()
