"""The functions of a pool as the controller keeps them: versions, which of them gets calls, and whoever watches (the router).

cpool-state(5), cpool-function(7).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from cafs.errors import BusyError, NotFound, UsageError, quote
from pool import instance, single
from pool.calls import KEPT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.commands import Client
    from pool.controller import Controller
    from pool.state import Job

TRYING, CURRENT, PREVIOUS, FAILED = "trying", "current", "previous", "failed"
MANY = 10_000
"""Functions of a pool."""

_KINDS: dict[str, tuple[Any, Any]] = {
    "name": (str, ""), "version": (int, 0), "handler": (str, ""), "concurrency": (int, 1), "min": (int, 0), "max": (int, 10),
    "buffer": (int, 0), "idle_s": ((int, float), 60), "wait_s": ((int, float), 0.5), "timeout_s": ((int, float), 300),
    "start_s": ((int, float), 60), "is_first": (bool, False), "zygote": (bool, False), "record": (bool, False), "id": (str, ""),
}  # fmt: skip
_LONGEST_S = 86400.0
_PATIENCE_S = 0.5


def check(fn: dict[str, Any]) -> dict[str, Any]:
    """What a job's 'fn' says of the function that it is an instance of.  Raises UsageError."""
    unknown = set(fn) - set(_KINDS)
    if unknown:
        raise UsageError(f"a function has no {quote(sorted(unknown)[0])}")
    found = {name: fn.get(name, default) for name, (_, default) in _KINDS.items()}
    for name, (kind, _) in _KINDS.items():
        value = found[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or (kind is not str and value < 0):
            raise UsageError(f"a function's {name} cannot be {value!r}")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", found["name"]):
        raise UsageError(f"{quote(found['name'])} is not a name for a function")
    if not instance.is_handler(found["handler"]):
        raise UsageError(f"{quote(found['handler'])} is no handler", hint="python:MODULE:FUNCTION or jsonl:PROGRAM")
    if found["zygote"] and not found["handler"].startswith("python:"):
        raise UsageError("a zygote is of a handler in Python")
    if not 1 <= found["concurrency"] <= 1000 or not 1 <= found["max"] <= 1000 or found["min"] > found["max"]:
        raise UsageError("a function has a concurrency, and a maximum, of 1 to 1000, and no more at least than at most")
    if not all(0 < found[name] <= _LONGEST_S for name in ("idle_s", "timeout_s", "start_s")) or found["wait_s"] > _LONGEST_S:
        raise UsageError("a function's times are more than 0, and at most a day")
    return found


class Functions:
    """Those that are deployed, in the controller's memory and its state."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in controller.state.functions():
            self._rows.setdefault((row["tenant"], row["name"]), []).append(row)
        self.jobs: dict[int, Job] = {}
        """Instances that have not ended."""

        self._left: dict[str, float] = {}
        """Workers, and when an instance of theirs ended last: its host still knows what it has done."""

        self._watchers: dict[int, Client] = {}
        self._router: subprocess.Popen[bytes] | None = None
        self._look_after = 0.0

    def rows(self, tenant: str | None) -> list[dict[str, Any]]:
        """Of a tenant, None for all."""
        return [row for key in sorted(self._rows) if tenant in (None, key[0]) for row in self._rows[key]]

    def images(self) -> set[str]:
        """Of all versions, to be kept in the store."""
        return {row["spec"]["image"] for rows in self._rows.values() for row in rows if row["state"] != FAILED}

    def of(self, tenant: str, name: str) -> list[dict[str, Any]]:
        """The versions of one.  Raises NotFound."""
        if (tenant, name) not in self._rows:
            raise NotFound(f"no function {quote(name)}", hint="cpool fn ls")
        return self._rows[tenant, name]

    def deploy(self, tenant: str, spec: dict[str, Any], *, is_sure: bool) -> int:
        """A new version; its number.  is_sure: no instance of it is tried first.  Raises CafsError."""
        name = spec["fn"]["name"]
        before = self._rows.get((tenant, name), [])
        if any(row["state"] == TRYING for row in before):
            raise BusyError(f"another version of {quote(name)} is being tried")
        if not before and len(self._rows) >= MANY:
            raise BusyError(f"there are {MANY} functions already")
        version = max((row["version"] for row in before), default=0) + 1
        spec = {**spec, "fn": {**spec["fn"], "version": version, "id": os.urandom(8).hex()}}
        row = {"tenant": tenant, "name": name, "version": version, "state": TRYING, "spec": spec, "reason": ""}
        kept = [one for one in before if one["state"] in (CURRENT, PREVIOUS)]
        rows = [*kept, {**row, "made_s": time.time()}]
        self._put(tenant, name, _promoted(rows) if is_sure else rows)
        return version

    def tried(self, tenant: str, name: str, version: int, problem: str) -> None:
        """The first instance of a version is ready, or has a problem."""
        rows = self._rows.get((tenant, name), [])
        one = next((row for row in rows if row["version"] == version and row["state"] == TRYING), None)
        if one is None:
            return
        if problem:
            changed = [{**row, "state": FAILED, "reason": problem} if row is one else row for row in rows]
            return self._put(tenant, name, changed)
        self._put(tenant, name, _promoted(rows))

    def roll_back(self, tenant: str, name: str) -> int:
        """To the version before; its number.  Raises NotFound."""
        rows = self.of(tenant, name)
        before = next((row for row in rows if row["state"] == PREVIOUS), None)
        if before is None:
            raise NotFound(f"there is no version of {quote(name)} before the one that is used")
        states = {PREVIOUS: CURRENT, CURRENT: PREVIOUS}
        self._put(tenant, name, [{**row, "state": states.get(row["state"], row["state"])} for row in rows])
        return int(before["version"])

    def remove(self, tenant: str, name: str) -> None:
        """With all versions.  Raises NotFound."""
        self.of(tenant, name)
        self._put(tenant, name, [])

    def _put(self, tenant: str, name: str, rows: list[dict[str, Any]]) -> None:
        self._controller.state.put_function(tenant, name, rows)
        if rows:
            self._rows[tenant, name] = rows
        else:
            self._rows.pop((tenant, name), None)
        self._tell({"watch": "function", "tenant": tenant, "name": name, "rows": [_told(row) for row in rows]})

    # Whoever watches.

    def watch(self, client: Client, hosts: list[str]) -> dict[str, Any]:
        """All that there is; from now on CLIENT is told what changes.  hosts: workers that it is connected to."""
        self._watchers[id(client)] = client
        for worker in self._controller.remotes.keys() & set(hosts):
            self._left.setdefault(worker, time.monotonic())  # of instances that had ended before this controller began
        jobs = [self._shown(job) for job in self.jobs.values()]
        functions = [_told(row) for row in self.rows(None)]
        return {"pool": self._controller.pool, "functions": functions, "jobs": jobs, "hosts": self._hosts()}

    def _hosts(self) -> dict[str, str]:
        """Addresses of workers, by name, whose hosts may know of calls although no instance is there now."""
        remotes = self._controller.remotes
        return {worker: remotes[worker].address for worker in self._recent() if worker in remotes}

    def _recent(self) -> dict[str, float]:
        """Of what has left, that of which hosts still know something."""
        since = time.monotonic() - KEPT_S
        return {worker: when for worker, when in self._left.items() if when > since}

    def changed(self, changes: list[dict[str, Any]]) -> None:
        """What has become of jobs in a turn."""
        for number in {row["id"] for row in changes if row["what"] == "job"} & set(self.jobs) if self.jobs else ():
            job = self.jobs[number]
            self._tell({"watch": "job", **self._shown(job)})
            if job.state in ("finished", "cancelled"):
                del self.jobs[number]
                self._left = {**self._recent(), job.worker: time.monotonic()}

    def _shown(self, job: Job) -> dict[str, Any]:
        remote = self._controller.remotes.get(job.worker)
        found = {"id": job.id, "state": job.state, "worker": job.worker, "address": remote.address if remote else ""}
        return found | {"code": job.code, "reason": job.reason, "fn": job.spec["fn"], "tenant": job.spec.get("tenant", "")}

    def _tell(self, said: dict[str, Any]) -> None:
        for key in [key for key in self._watchers if key not in self._controller.clients]:
            del self._watchers[key]
        for client in self._watchers.values():
            client.tell(said)

    def mind(self) -> None:
        """Once a second: a router is there while a function is."""
        now = time.monotonic()
        if now < self._look_after or self._controller.is_leaving:
            return
        self._look_after = now + 1.0
        self._ask_for_room()
        if self._router:
            self._router.poll()
        if not self._rows or any(key in self._controller.clients for key in self._watchers):
            return
        place = os.path.join(self._controller.directory, "router")
        if not single.is_there(place):
            with open(os.path.join(place, "log"), "wb") as log:
                code = "import sys; from pool.router import main; sys.exit(main(sys.argv[1]))"
                words = [sys.executable, "-P", "-c", code, self._controller.directory]
                null = subprocess.DEVNULL
                self._router = subprocess.Popen(words, stdin=null, stdout=log, stderr=log, cwd="/", start_new_session=True)

    def _ask_for_room(self) -> None:
        """For the first plain job that waits: an instance that is idle is worth less than it."""
        late_s = time.time() - _PATIENCE_S
        for job in self._controller.waiting.jobs if self.jobs else ():
            if job.state == "queued" and not job.spec.get("fn") and job.submitted_s < late_s:
                return self._tell({"watch": "room", "job": job.id, "cpus": job.spec["cpus"]})

    def soon(self) -> None:
        """A function was deployed: do not wait to look whether there is a router."""
        self._look_after = 0.0

    def end(self) -> None:
        """The router is to end, too."""
        self._tell({"watch": "end"})


def _promoted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The version that is tried is the current one, and that the one before."""
    states = {CURRENT: PREVIOUS, TRYING: CURRENT}
    return [{**row, "state": states[row["state"]]} for row in rows if row["state"] in states]


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tenant", "name", "version", "state", "spec")}
