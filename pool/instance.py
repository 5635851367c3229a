"""What the agent does for an instance of a function: its directory, and the words of crun for it.  cpool-function(7).

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shlex
import sys

from pool import hostprocess
from pool.hosted import OUTCOME, PLACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

IN_IMAGE = "/run/cpool"
RECORD = "record"
"""Of a job: what its container has read of its image, if that is noted."""

PYTHON, LINES = "python", "jsonl"


def prepare(directory: str, asked: dict[str, Any]) -> None:
    """Of a job that is an instance: what its container sees, and a function host to speak with.  Raises OSError."""
    place = os.path.join(directory, PLACE)
    for name, mode in (("", 0o755), ("in", 0o755), ("host", 0o755), ("out", 0o777)):
        os.mkdir(os.path.join(place, name))
        os.chmod(os.path.join(place, name), mode)  # whatever our umask: runc opens them as a user of the container's
    token = os.urandom(16).hex()
    with open(os.path.join(place, "token"), "w", encoding="ascii") as file:
        file.write(f"{asked['id']}.{asked['attempt']} {token}\n")
    os.chmod(os.path.join(place, "token"), 0o444)
    with open(os.path.join(place, "shim.py"), "wb") as code:
        code.write(pkgutil.get_data("pool", "shim.py") or b"")
    os.chmod(os.path.join(place, "shim.py"), 0o444)
    with open(os.path.join(directory, OUTCOME), "wb"):
        pass  # there from the beginning: the host has it open
    with open(os.path.join(directory, "about.json"), "w", encoding="utf-8") as file:
        json.dump({**asked["fn"], "zygote_of": asked.get("zygote_of", "")}, file)
    hostprocess.ensure(os.path.dirname(os.path.dirname(directory)))


def words(directory: str, asked: dict[str, Any], run: Sequence[str]) -> list[str]:
    """What serves the calls.  run: the words of crun for a container of the job, without its image."""
    place = os.path.join(directory, PLACE)
    host = os.path.join(os.path.dirname(os.path.dirname(directory)), PLACE, "in")
    many_gpus = len(asked.get("gpu_ids", ()))
    run = [*run, "-e", "CUDA_VISIBLE_DEVICES=" + ",".join(map(str, range(many_gpus)))]  # it sees its own, numbered from 0
    if asked["fn"].get("record") and asked["fn"].get("is_first"):
        run = [*run, "--record", os.path.join(directory, RECORD)]
    mounts = ["-v", f"{place}:{IN_IMAGE}:ro", "-v", f"{host}:{IN_IMAGE}/host:ro", "-v", f"{place}/out:{IN_IMAGE}/out"]
    kind, _, handler = asked["fn"]["handler"].partition(":")
    many = str(asked["fn"]["concurrency"])
    if kind == PYTHON:
        more = []
        if asked["fn"].get("zygote"):
            # Each fork mounts a /tmp of its own, which is nothing that it may do on the host: its users are nobody there.
            at = run.index("--network")
            run = [*run[:at], *run[at + 2 :], "--userns", "auto", "--cap-add", "SYS_ADMIN"]
            more = ["zygote"]
        return [*run, *mounts, "--entrypoint", "python3", asked["image"], f"{IN_IMAGE}/shim.py", handler, many, *more]
    program = os.path.abspath(sys.argv[0])
    return [sys.executable, program, "lines", directory, many, *run, *mounts, "--", asked["image"], handler]


def is_handler(text: object) -> bool:
    """Whether it is one of python:MODULE:FUNCTION and jsonl:PROGRAM."""
    if not isinstance(text, str) or len(text) > 4096 or "\0" in text or "\n" in text:
        return False
    kind, _, rest = text.partition(":")
    if kind == PYTHON:
        module, _, function = rest.partition(":")
        return function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    try:
        return kind == LINES and bool(shlex.split(rest))
    except ValueError:
        return False
