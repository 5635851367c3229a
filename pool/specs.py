"""A job as it is asked for, kept, and told to an agent: what may be in it, and what goes to its worker beside the state."""

from __future__ import annotations

import base64
import json
import math
import re

from cafs.errors import UsageError, quote
from pool import functions, inputs, secrets, state
from pool.state import Job
from pool.tenants import OWNER, tenant_of
from pool.workers import STRICT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KEEP = 64 << 10
"""Output of a job up to so many bytes comes with its end."""

_SPEC_MAX = 128 << 10
_AFTER_MAX = 100_000
_LATER = ("tenant", "secrets", "disk", "strict", "start_s", "in", "out", "fn", "attended", "is_here")
"""What is in a job only if it has it."""

LENT = "lent"
"""For the address of a store: that which the controller lends."""


def asked(job: Job, pool: str, worker: str, store: str, output_max: int = 0) -> dict[str, Any]:
    """What an agent is told of a job.  store: address, '' for its own.  output_max: bytes of a stream that are kept, 0: all."""
    spec = job.spec
    own = {
        "CPOOL_POOL": pool,
        "CPOOL_WORKER": worker,
        "CPOOL_INDEX": str(spec.get("index", "")),
        "CPOOL_TENANT": str(spec.get("tenant", "")),
    }
    return {
        "id": job.id,
        "attempt": job.attempt,
        "command": spec["command"],
        "image": spec["image"],
        "store": store,
        "cpus": spec["cpus"],
        "memory": spec["memory"],
        "gpus": spec.get("gpus", 0),
        "env": {**spec["env"], **own},
        "cwd": spec["cwd"],
        "timeout_s": spec["timeout_s"],
        "alone_s": STRICT_S if spec.get("strict") else 0,
        "keep": _KEEP,
        "output_max": output_max,
        "is_here": bool(spec.get("is_here")),
        **({"fn": spec["fn"]} if "fn" in spec else {}),
    }


def has_more(job: Job) -> bool:
    """Whether its agent is told more than what is in the state."""
    return any(name in job.spec for name in ("secrets", "in", "out"))


def more_of(job: Job, directory: str) -> dict[str, Any]:
    """That: secrets by name, files.  directory: of the pool.  Raises CafsError, OSError."""
    found: dict[str, Any] = {}
    if "secrets" in job.spec:
        tenant = tenant_of(job)
        values = {name: secrets.get(directory, tenant, name) for name in job.spec["secrets"]}
        found["secrets"] = {name: base64.b64encode(value).decode() for name, value in values.items()}
    if "in" in job.spec or "out" in job.spec:
        found |= {"in": inputs.of_job(directory, job.spec), "out": job.spec.get("out", [])}
    return found


def check_one(known: state.State, one: dict[str, Any]) -> dict[str, Any]:
    """The job, as it is kept, if it can be submitted.  Raises CafsError."""
    spec = check(one["spec"])
    for name in spec.get("secrets", ()):
        secrets.get(known.directory, spec.get("tenant", OWNER), name)
    if len(json.dumps({**spec, "after": []})) > _SPEC_MAX:
        raise UsageError(f"a job is larger than {_SPEC_MAX} bytes")
    if len(spec["after"]) > _AFTER_MAX:
        raise UsageError(f"a job comes after at most {_AFTER_MAX} jobs")
    if abs(int(one.get("priority", 0))) >= 1 << 31:
        raise UsageError(f"priority {one['priority']} is out of range")
    absent = next((number for number in spec["after"] if not known.has_job(number)), None)
    if absent is not None:
        known.job(absent)  # raises NotFound
    known.with_key(spec, one.get("key"))
    return spec


def check(spec: dict[str, Any]) -> dict[str, Any]:
    """A job as it is kept.  Raises UsageError."""
    kinds: dict[str, tuple[Any, Any]] = {
        "command": (list, None), "image": (str, ""), "env": (dict, {}), "cwd": (str, ""), "cpus": ((int, float), 1),
        "memory": (int, 0), "gpus": (int, 0), "timeout_s": ((int, float), 0), "retries": (int, 0), "name": (str, ""),
        "array": (int, 0), "index": (int, 0), "at_once": (int, 0), "requeue": (bool, True), "queue_s": ((int, float), 0),
        "tenant": (str, OWNER), "after": (list, []), "constraint": (list, []), "exclude": (list, []),
        "disk": (int, 0), "strict": (bool, False), "start_s": ((int, float), 0), "secrets": (list, []),
        "in": (list, []), "out": (list, []), "fn": (dict, {}), "attended": (bool, False),
        "is_here": (bool, False),
    }  # fmt: skip
    unknown = set(spec) - set(kinds)
    if unknown:
        raise UsageError(f"a job has no {quote(sorted(unknown)[0])}")
    found = {name: spec.get(name, default) for name, (_, default) in kinds.items()}
    for name, (kind, _) in kinds.items():
        if not isinstance(found[name], kind) or (isinstance(found[name], int | float) and found[name] < 0):
            raise UsageError(f"a job's {name} cannot be {found[name]!r}")
    if not all(type(number) is int and 0 < number < 1 << 62 for number in found["after"]):
        raise UsageError("a job comes after numbers of jobs")
    for name in _LATER:
        if not found[name]:
            del found[name]  # so that one key means the same as before there was such a thing
    names = found.get("secrets", [])
    if not all(isinstance(one, str) and secrets.check_name(one) for one in names) or len(names) > secrets.MANY:
        raise UsageError(f"a job has at most {secrets.MANY} secrets")
    if "fn" in found:
        found["fn"] = functions.check(found["fn"])
        if not found["image"]:
            raise UsageError("a function has an image")
        if found["fn"]["zygote"] and found["gpus"]:
            raise UsageError("a process that has GPUs cannot be forked: no zygote with --gpus")
    inputs.check(found)
    if not all(math.isfinite(found[name]) for name in ("cpus", "timeout_s", "queue_s")):
        raise UsageError("a job needs what can be counted")
    odd = next((name for name in found["env"] if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)), "")
    if odd:  # the shell that waits for a job would not pass it on
        raise UsageError(f"{quote(odd)} is not the name of a variable")
    words = [*found["command"], *found["env"], *found["env"].values(), *found["constraint"], *found["exclude"]]
    if not found["command"] or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise UsageError("a job's command is a list of words")
    return found
