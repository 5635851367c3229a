"""Build the cases of buildcases.py with docker's classic builder as well, and compare trees and configurations.

usage: python -m tests.referee [WORD]    those whose name has WORD; needs root, dockerd and busybox; not part of the test run

The classic builder knows no heredocs, no RUN --mount and few flags: cases that it cannot build are counted, not compared.  Where
it and BuildKit differ, BuildKit's way is ours, and _EXPECTED says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cafs import image
from cafs.format import DIRECTORY, Entry
from cafs.store import Store
from tests.buildcases import CASES, Case
from tests.crunning import make_rootfs
from tests.test_build import BIN, build, make_context, tree_of

_KEYS = (
    "Env",
    "Cmd",
    "Entrypoint",
    "User",
    "WorkingDir",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Healthcheck",
    "Shell",
    "OnBuild",
)
_EXPECTED = {
    "ADD of an archive with an owner": "the classic builder forgets --chown there",
    "an ignore file of its own": "BuildKit's",
    "ENTRYPOINT keeps the stage's CMD": "the classic builder forgets it",
    "a base's config is inherited": "its WORKDIR is root's",
    "a directory of the context over a link of the image": "ours alone: the link stays; the classic builder replaces it, BuildKit fails",
    "the later of ENV and ARG counts": "BuildKit's; with the classic builder ENV always wins",
    "ARGs go to stages on top": "not with the classic builder",
    "automatic arguments": "the classic builder has none",
    "changes below a VOLUME stay": "the classic builder throws them away",
    "no traces of mounts": "the classic builder leaves /etc/hosts and others",
    "the fixed host name": "BuildKit's",
    "WORKDIR is the user's": "the classic builder's is root's",
}


@contextmanager
def daemon(base: Path) -> Iterator[None]:
    options = [f"--data-root={base}/docker", f"--exec-root={base}/exec", f"--pidfile={base}/pid", f"--host=unix://{base}/sock"]
    options += ["--storage-driver=vfs", "--iptables=false", "--bridge=none"]
    os.environ |= {"DOCKER_HOST": f"unix://{base}/sock", "DOCKER_BUILDKIT": "0"}
    with open(base / "log", "wb") as log, subprocess.Popen(["dockerd", *options], stdout=log, stderr=log) as server:
        try:
            for _ in range(200):
                if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


def with_docker(base: Path, top: Path, case: Case) -> image.Image | str:
    """The image, as ours; or why not."""
    words = ["docker", "build", "-q", "--network=none", "-t", "case", *(f"--build-arg={k}={v}" for k, v in case.args.items())]
    words += [f"--target={case.target}"] if case.target else []
    done = subprocess.run([*words, str(top)], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed"
    if subprocess.run(["docker", "save", "-o", base / "saved.tar", "case"], capture_output=True, check=False).returncode:
        return "an image of no layers cannot be saved"
    created = subprocess.run(
        [BIN / "cafs-index", "create", f"docker-archive:{base}/saved.tar"], capture_output=True, text=True, check=True
    )
    return image.resolve(Store(os.environ["CAFS_STORE"]), created.stdout.strip())


def rows(made: image.Image) -> dict[bytes, Entry]:
    """The tree without times, and without what the classic builder leaves of its mounts."""
    index = tree_of(made)
    found = {
        index.path(at): replace(index.entry(index.inode(at)), path=b"", mtime_ns=0, target=b"") for at in range(len(index))
    }
    left = (b"/.dockerenv", b"/etc/hosts", b"/etc/hostname", b"/etc/resolv.conf", b"/etc/mtab", b"/dev/", b"/proc/", b"/sys/")
    return {
        path: entry
        for path, entry in found.items()
        if not path.startswith(left) or (path == b"/etc/resolv.conf" and entry.type == b"l")
    }


def settings(made: image.Image) -> dict[str, object]:
    found = made.config.get("config") or {}
    shown = {key: found.get(key) or None for key in _KEYS}
    if shown["Env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]:
        shown["Env"] = None
    shown["WorkingDir"] = shown["WorkingDir"] if shown["WorkingDir"] != "/" else None
    return shown


def compare(base: Path, case: Case) -> str:
    """'' if both are alike."""
    top = make_context(base / "context", dict(case.files), case.base + case.text)
    try:
        theirs = with_docker(base, top, case)
        if isinstance(theirs, str):
            return f"not built: {theirs}"
        ours = build(top, args=case.args, target=case.target)
    finally:
        shutil.rmtree(base / "context")
    one, other = rows(ours), rows(theirs)
    lines = [
        f"{path.decode()}: ours {one.get(path)}, docker's {other.get(path)}"
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path) and not (path == b"/" and one[path].type == DIRECTORY)
    ]
    a, b = settings(ours), settings(theirs)
    lines += [f"{key}: ours {a[key]}, docker's {b[key]}" for key in _KEYS if a[key] != b[key]]
    return "\n    ".join(lines)


def main() -> int:
    word = sys.argv[1] if sys.argv[1:] else ""
    counts = {"alike": 0, "not built": 0, "expected": 0, "differ": 0}
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="cafs-referee-") as name:
        base = Path(name)
        os.environ |= {f"CAFS_{one}": str(base / one.lower()) for one in ("STORE", "CACHE", "RUN", "STATE")}
        make_rootfs(base / "rootfs")
        subprocess.run([BIN / "cafs-index", "create", base / "rootfs", "-t", "b:1"], check=True, capture_output=True)
        with daemon(base):
            subprocess.run(f"tar -C {base}/rootfs -c . | docker import - b:1", shell=True, check=True, capture_output=True)
            for case in CASES:
                if case.error or case.secrets or word not in case.name:
                    continue
                said = compare(base, case)
                kind = (
                    "alike"
                    if not said
                    else "not built"
                    if said.startswith("not built")
                    else "expected"
                    if case.name in _EXPECTED
                    else "differ"
                )
                counts[kind] += 1
                if kind == "differ":
                    print(f"{case.name}\n    {said}", flush=True)
    print(json.dumps(counts))
    return 1 if counts["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
