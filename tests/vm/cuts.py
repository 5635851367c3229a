"""Cut the power of a machine at random moments, and look whether anything is gone that was acknowledged.

usage: python -m tests.vm.cuts SUITE CUTS [--plant]

In each round the machine has its data disk (ext4 with noauto_da_alloc and data=writeback, so that a rename without an fsync before it
shows) under three at a time of create, push, gc, cbuild, crun -d and cpool submit.  What a command has printed, and this host has
received, is an acknowledgement.  Then the emulator is killed, the machine comes back, and each acknowledgement of all rounds is looked up; the stores
are checked.  --plant: leave out every fsync (eatmydata's way); at least one round must then find something missing.

What the guest has written to its disk survives the kill of the emulator, as this host has it in its page cache: that a flush of the
disk's own cache is missing is not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.vm.machine import SUITES, Machine, VmError, make
from tests.vm.run import lacks_qemu

_LOOPS = ("creating", "pushing", "collecting", "building", "running", "submitting")
_SPAN_S = (10.0, 45.0)
_MOUNT = "blockdev --flushbufs /dev/vdb; mount -o noauto_da_alloc,data=writeback,commit=60 /dev/vdb /data"

WORK = r"""
export PATH=/opt/tests/bin:$PATH CAFS_STORE=/data/store CAFS_CACHE=/data/cache CAFS_STATE=/data/state CAFS_POOL=/data/pool CAFS_RUN=/run/c
cd /data
made() { head -c $((RANDOM * 3 + 1)) /dev/urandom >"$1"; }
creating() {
    n=0
    while :; do
        n=$((n + 1)); mkdir -p "work/c$1.$n/d"; made "work/c$1.$n/d/a"; made "work/c$1.$n/b"
        digest=$(cafs-index create "work/c$1.$n" -t "create:r$1.$n") && echo "ack image create:r$1.$n $digest"
    done
}
pushing() {
    while :; do
        ref=$(cafs-store ls -q 2>/dev/null | grep '^create:' | shuf -n 1) || continue
        [ -n "$ref" ] && cafs-store push "$ref" /data/other >/dev/null 2>&1 && echo "ack pushed $ref"
    done
}
collecting() { while :; do cafs-store gc --grace 0 >/dev/null 2>&1; sleep 1; done; }
building() {
    n=0
    while :; do
        n=$((n + 1)); mkdir -p "work/b$1.$n"; made "work/b$1.$n/f"
        printf 'FROM base:1\nCOPY f /f\nRUN echo %s >/n\n' "$1.$n" >"work/b$1.$n/Dockerfile"
        digest=$(cbuild -q -t "build:r$1.$n" "work/b$1.$n" 2>/dev/null) && echo "ack image build:r$1.$n $digest"
    done
}
running() {
    n=0
    while :; do n=$((n + 1)); id=$(crun run -d --network none --name "r$1.$n" base:1 true 2>/dev/null) && echo "ack container $id"; sleep 1; done
}
submitting() { while :; do id=$(cpool submit --no-container -- true 2>/dev/null) && echo "ack job $id"; done; }
"""

LOOK = r"""
import json, subprocess, sys
lost = []
def run(*words):
    return subprocess.run(words, capture_output=True, text=True)
def said(*words):
    return set(run(*words).stdout.split())
images = {(one["ref"], one["digest"]) for one in map(json.loads, run("cafs-store", "ls", "--json").stdout.splitlines())}
there = {
    "pushed": said("cafs-store", "ls", "-q", "--store", "/data/other"),
    "container": said("crun", "ps", "-a", "-q", "--no-trunc"),
    "job": said("cpool", "jobs", "-a", "-q", "--limit", "100000"),
}
for kind, *words in filter(None, map(str.split, sys.stdin)):
    if not (tuple(words) in images if kind == "image" else words[0] in there[kind]):
        lost.append(" ".join([kind, *words]))
for store in ("/data/store", "/data/other"):
    run("cafs-store", "gc", "--store", store)  # takes away the leases of those who were cut off
    done = run("cafs-store", "fsck", "--store", store)
    if done.returncode not in (0, 4):
        lost.append(f"fsck {store}: {done.returncode}: {done.stdout[-600:]} {done.stderr[-300:]}")
print(json.dumps(lost))
"""

_PLANT = r"""
printf '#include <unistd.h>\nint fsync(int f){return 0;}int fdatasync(int f){return 0;}int syncfs(int f){return 0;}void sync(void){}\n' >/opt/n.c
gcc -shared -fPIC -o /opt/n.so /opt/n.c
"""


class Cuts:
    """The rounds over one data disk."""

    def __init__(self, place: Path, disk: Path, *, is_planted: bool, seed: int) -> None:
        self._place, self._disk, self._is_planted = place, disk, is_planted
        self._rng = random.Random(seed)
        self._saved, self._system = disk.parent / "booted", disk.parent / "system"
        self.acknowledged: list[str] = []

    def prepare(self) -> None:
        """Boot once, with everything installed, and keep that state: each round begins from it."""
        machine = Machine(self._place, self._disk, self._system)
        machine.boot()
        machine.install()
        machine.check("mkdir -p /data; echo 3 >/proc/sys/vm/drop_caches; sync" + _PLANT * self._is_planted)
        machine.save(self._saved)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._disk], check=True)
        machine.resume(self._saved)
        script = (
            f"{_MOUNT}; {WORK} mkdir -p work/base/bin /data/tmp; cp /bin/busybox work/base/bin/; ln -s busybox work/base/bin/true;"
            " ln -s busybox work/base/bin/sh; ln -s busybox work/base/bin/echo; cafs-index create work/base -t base:1;"
            " cafs-store init --store /data/other; cpool init; sync; cd /; umount /data"
        )
        machine.check(script)
        machine.cut()

    def round(self, number: int) -> tuple[int, list[str]]:
        """One cut: how many acknowledgements came in it, and what of all of them is lost afterwards.  Raise VmError."""
        machine = Machine(self._place, self._disk, self._system)
        machine.resume(self._saved)
        preload = "export LD_PRELOAD=/opt/n.so;" * self._is_planted
        chosen = self._rng.sample(_LOOPS, 3)  # all at once are too slow in an emulator to be acknowledged much
        loops = " ".join(f"{name} {number} &" for name in chosen)
        script = f"{_MOUNT} || exit 9; {preload} {WORK} cpool serve >/dev/null 2>&1 & {loops} wait"
        worker = subprocess.Popen(
            machine.command(f"bash -c '{_quoted(script)}'"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(_acknowledgements(worker)), daemon=True)
        reader.start()
        time.sleep(self._rng.uniform(*_SPAN_S))  # the moment is what is tested
        machine.cut()
        reader.join(30)
        worker.wait(30)
        self.acknowledged += lines
        return len(lines), self._look()

    def _look(self) -> list[str]:
        machine = Machine(self._place, self._disk, self._system)
        machine.resume(self._saved)
        try:
            script = f"{_MOUNT} || exit 9; {WORK} cat >/run/acks; cat >/run/look.py <<'EOF'\n{LOOK}\nEOF\npython3 /run/look.py </run/acks || exit 8; cd /; umount /data"
            given = "\n".join(self.acknowledged).encode() + b"\n"
            lost: list[str] = json.loads(machine.check(f"bash -c '{_quoted(script)}'", given=given))
            return lost
        finally:
            machine.cut()


def _quoted(script: str) -> str:
    return script.replace("'", "'\\''")


def _acknowledgements(worker: subprocess.Popen[bytes]) -> list[str]:
    """Whole lines that were received, until the connection ends."""
    assert worker.stdout
    return [
        line.decode().removeprefix("ack ").strip()
        for line in worker.stdout
        if line.startswith(b"ack ") and line.endswith(b"\n")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make cuts", description="Cut the power again and again; nothing acknowledged may be lost."
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("cuts", type=int)
    parser.add_argument("--plant", action="store_true", help="leave out every fsync: something must be lost")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    code = lacks_qemu()
    if code is not None:
        return code
    lost: list[str] = []
    try:
        with tempfile.TemporaryDirectory(dir=make(options.suite)) as directory:
            disk = Path(directory, "data")
            with open(disk, "wb") as file:
                file.truncate(4 << 30)
            cuts = Cuts(make(options.suite), disk, is_planted=options.plant, seed=options.seed)
            cuts.prepare()
            for number in range(1, options.cuts + 1):
                began = time.monotonic()
                count, lost = cuts.round(number)
                print(
                    f"cut {number}: {count} acknowledged, {len(cuts.acknowledged)} in all, {len(lost)} lost, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                for one in lost:
                    print(f"  lost: {one}", flush=True)
                if lost:
                    break
    except VmError as error:
        print(f"cuts: {error}", file=sys.stderr)
        return 1
    if options.plant:
        print("cuts: what was planted was found" if lost else "cuts: what was planted was NOT found")
    return 0 if bool(lost) == options.plant else 1


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent.parent)
    sys.exit(main())
