"""Functions as a user has them: a pool, an image of busybox, an image with Python, and handlers in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crunning import BIN, make_rootfs
from tests.pooling import agents, cp, kill_all, ok, processes, serving
from tests.waiting import SLOW, until, wait_until

HANDLERS = Path(__file__).parent / "handlers.py"
NEEDS = ("root", "fuse", "runc", "busybox")
_LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "distutils", "unittest")
PROGRAMS = {
    "upper": 'while read -r line; do echo "$line" | tr a-z A-Z; done',
    "meet": "while read -r line; do touch /tmp/$line; until test -e /tmp/1 -a -e /tmp/2 -a -e /tmp/3; do sleep 0.02; done; echo '\"met\"'; done",
    "slow": "while read -r line; do sleep 3; echo '\"late\"'; done",
    "odd": (
        "while read -r line; do case \"$line\" in *half*) printf '\"half'; exit 3;; *two*) printf '1\\n2\\n';; "
        "*nojson*) echo 'not json';; *die*) exit 4;; *flood*) yes err | head -c 3000000 >&2; echo '\"ok\"';; "
        "*long*) head -c 2000000 /dev/zero | tr '\\0' 1; echo;; *) echo \"$line\";; esac; done"
    ),
    "greet": 'echo hello; while read -r line; do echo "$line"; done',
    "late-greet": 'sleep 5; echo hello; while read -r line; do echo "$line"; done',
    "fat": "while read -r line; do test $line = 1 || exit 4; exec sort /dev/zero; done",
    "size": "while read -r line; do f=$(echo \"$line\" | cut -d'\"' -f4); wc -c < $f | tr -d ' '; done",
    "large": (
        "while read -r line; do { printf '\"'; head -c 3000000 /dev/zero | tr '\\0' y; printf '\"'; } > /run/cpool/out/x; "
        'echo \'{"$ref":"/run/cpool/out/x"}\'; done'
    ),
    "letters": "while read -r line; do printf '\"'; yes ж | head -n 400000 | tr -d '\\n'; printf '\"\\n'; done",
    "evil": 'while read -r line; do ln -sf /etc/passwd /run/cpool/out/x; echo \'{"$ref":"/run/cpool/out/x"}\'; done',
}
"""Of the image b:1, by the names of their files in /bin."""


def make_python(root: Path) -> None:
    """This Python, its library, what it is linked to, and the handlers in /code."""
    make_rootfs(root)
    stdlib = Path(sysconfig.get_path("stdlib"))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    there = root / "usr" / "lib" / version
    ignore = shutil.ignore_patterns("site-packages", "dist-packages", "config-*", *_LEFT_OUT)
    shutil.copytree(stdlib, there, ignore=ignore)
    program = Path(os.path.realpath(sys.executable))
    (root / "usr" / "bin").mkdir(parents=True)
    shutil.copy(program, root / "usr" / "bin" / "python3")
    needed: set[str] = set()
    for one in [program, *(there / "lib-dynload").glob("*.so")]:
        said = subprocess.run(["ldd", one], capture_output=True, text=True, check=False).stdout
        needed |= {path for path in re.findall(r"(/\S+)", said) if os.path.isfile(path)}
    for path in needed:
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path[1:])
    (root / "code").mkdir()
    shutil.copy(HANDLERS, root / "code" / "h.py")


@contextmanager
def functions_at(base: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store with b:1 and p:1, mounted once, and a pool with a controller; afterwards nothing of it is left."""
    for name in ("STORE", "CACHE", "RUN", "STATE"):
        patch.setenv(f"CAFS_{name}", str(base / name.lower()))
    patch.setenv("CAFS_POOL", str(base / "pool"))
    make_rootfs(base / "b")
    for name, text in PROGRAMS.items():
        (base / "b" / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (base / "b" / "bin" / name).chmod(0o755)
    make_python(base / "p")
    for name in "bp":
        subprocess.run([BIN / "cafs-index", "create", "-q", base / name, "-t", f"{name}:1"], check=True)
        (base / f"mnt-{name}").mkdir()
        subprocess.run([BIN / "cafs-mount", f"{name}:1", base / f"mnt-{name}"], check=True)
    ok("init")
    try:
        with serving() as controller:
            yield base
            cp("down", "--grace", "0")  # of whoever is the controller now
            controller.wait(60 * SLOW)
        end_all(base)
    finally:
        for name in "bp":
            subprocess.run([BIN / "cafs-mount", "--unmount", base / f"mnt-{name}"], check=False)
        wait(lambda: not list((base / "run").glob("lazy/*")), 30)


def end_all(base: Path) -> None:
    """Agents, function hosts and the router, whatever a test has done to them."""
    until(lambda: not agents(base))
    kill_all([*agents(base), *routers(base)])


def routers(base: Path) -> list[int]:
    """Processes of routers whose pool is below a place."""
    start = os.fsencode(base)
    return processes(lambda words: len(words) > 4 and b"pool.router" in words[3] and words[4].startswith(start))


def remove_all() -> None:
    """Functions: none holds a place then."""
    names = ok("fn", "ls", "-q").split()
    if names:
        ok("fn", "rm", *dict.fromkeys(names))


def deploy(name: str, handler: str, *more: object, image: str = "") -> str:
    """Less than a processor each, so that several fit on this machine."""
    image = image or ("p:1" if handler.startswith("python:") else "b:1")
    workdir = ("-e", "PYTHONPATH=/code") if handler.startswith("python:") else ()
    return ok("fn", "deploy", name, "--image", image, "--handler", handler, "--cpus", "0.4", *workdir, *more).strip()


def call(name: str, value: object, *more: object) -> subprocess.CompletedProcess[str]:
    return cp("fn", "call", name, *more, input=json.dumps(value))


def answer(name: str, value: object, *more: object) -> object:
    done = call(name, value, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shown(name: str) -> dict[str, object]:
    rows = [json.loads(line) for line in ok("fn", "ls", "--json").splitlines()]
    found: dict[str, object] = next(row for row in rows if row["name"] == name and row["state"] != "failed")
    return found


def instances(name: str) -> list[dict[str, object]]:
    """The jobs of its instances that have not ended."""
    jobs = [json.loads(line) for line in ok("jobs", "--json").splitlines()]
    return [one for one in jobs if one["spec"].get("fn", {}).get("name") == name]


def outs(base: Path, name: str) -> list[Path]:
    """Where the instances of a function may write."""
    return [next(base.glob(f"pool/agents/*/jobs/{one['id']}.*/calls/out")) for one in instances(name)]


def wait(is_so: Callable[[], object], limit_s: float = 20) -> None:
    wait_until(is_so, limit_s)
