"""How long until 1, 5, 30 and 100 % of an image's files are read, from nothing, with a store of 15 ms a request: lazily, after
everything was brought first, and natively from a cold disk.  Draws the result, so that the weak side of fetching lazily shows.

usage: touched.py TREE OUT.svg [RUNS]    from the top of the project; works in $CAFS_BENCH; needs root
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import time

from start import DELAY_S, HERE, Mounted, cold, compiled

from cafs.indexing import Options, create_image

SHARES = (1, 5, 30, 100)
STORE = os.path.join(os.path.dirname(sys.executable), "cafs-store")
COLOURS = {"native, cold disk": "#555555", "fetched as it is read": "#2b6cb0", "everything brought first": "#c05621"}


def read(top: str, names: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(["xargs", "-0", "cat"], cwd=top, input="\0".join(names).encode(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def one_round(tree: str, base: str, url: str, chosen: dict[int, list[str]]) -> dict[tuple[str, int], float]:
    found = {}
    cache = f"{base}/cache"
    for share, names in chosen.items():
        cold()
        found["native, cold disk", share] = read(tree, names)
        shutil.rmtree(cache, ignore_errors=True)
        cold()
        with Mounted(base, "kernel", url, cache, "--prefetch", "none") as mounted:
            found["fetched as it is read", share] = mounted.seconds + read(mounted.point, names)
        shutil.rmtree(cache, ignore_errors=True)
        cold()
        began = time.perf_counter()
        subprocess.run([STORE, "pull", "bench:1", "--store", url], check=True)
        brought = time.perf_counter() - began
        with Mounted(base, "kernel", url, cache, "--prefetch", "none") as mounted:
            found["everything brought first", share] = brought + mounted.seconds + read(mounted.point, names)
    return found


def draw(middle: dict[tuple[str, int], float], path: str) -> None:
    """Seconds against the share of files, both on logarithmic axes."""
    import math

    left, top, width, height = 60, 40, 560, 300
    low, high = math.log10(min(middle.values())), math.log10(max(middle.values()))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2

    def place(share: int, seconds: float) -> tuple[float, float]:
        return left + width * math.log10(share) / 2, top + height * (high - math.log10(seconds)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{top + height + 50}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#fff" stroke="#999"/>',
    ]
    for share in SHARES:
        x = place(share, 1)[0]
        parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{share} %</text>')
    parts.append(f'<text x="{left + width / 2:.0f}" y="{top + height + 38}" text-anchor="middle">of the files are read</text>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        points = [place(share, middle[name, share]) for share in SHARES]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for share, (x, y) in zip(SHARES, points, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y - 6:.1f}" fill="{colour}">{middle[name, share]:.2g} s</text>')
        parts.append(f'<text x="{left + 200 * number}" y="20" fill="{colour}">{name}</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>", ""]))


def main() -> None:
    tree, out = sys.argv[1:3]
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "touched")
    os.makedirs(base, exist_ok=True)
    os.environ["CAFS_CACHE"] = f"{base}/cache"
    create_image(Options(tree, jobs=2), f"{base}/store", "bench:1")
    files = [os.path.join(top, name) for top, _, names in os.walk(tree) for name in names]
    files = sorted(os.path.relpath(path, tree) for path in files if os.path.isfile(path) and not os.path.islink(path))
    rng = random.Random(1)
    chosen = {share: sorted(rng.sample(files, len(files) * share // 100)) for share in SHARES}
    command = [sys.executable, os.path.join(HERE, "serve.py"), base, str(DELAY_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/store"
        rounds = [one_round(tree, base, url, chosen) for _ in range(int(sys.argv[3]) if sys.argv[3:] else 3)]
    middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    for (name, share), seconds in middle.items():
        print(f"{share} % of the files\t{name}\t{seconds:.2f} s")
    draw(middle, out)


if __name__ == "__main__":
    main()
