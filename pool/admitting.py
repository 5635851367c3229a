"""Who may be an instance at a function host: processes of the worker's jobs, and what zygotes make for one.

Part of the agent's program: standard library only, Python 3.9.  cpool-function(7), INSTANCES, ZYGOTES.
"""

from __future__ import annotations

import json
import os

from pool import calls
from pool.hosted import PLACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool import loop


def admit(directory: str, said: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(job, what its agent has written of it) of who says whose it is, and knows what only that can know.

    directory: of the agent.  Raises ValueError, LookupError.
    """
    job = str(said["job"])
    if said["is"] != "hello" or not job.replace(".", "", 1).isdigit():
        raise ValueError("no hello")
    try:
        wanted = _token(directory, job)
        with open(os.path.join(directory, "jobs", job, "about.json"), encoding="utf-8") as file:
            about = json.load(file)
    except OSError as error:
        raise ValueError("no such job") from error
    if said["token"] != wanted:
        raise ValueError("not the job that it says")
    return job, about


def _token(directory: str, job: str) -> str:
    with open(os.path.join(directory, "jobs", job, PLACE, "token"), encoding="ascii") as file:
        return file.read().split()[1]


class Zygotes:
    """Those of this worker, by job, and the jobs whose processes are to be made of them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._wires: dict[str, loop.Wire] = {}
        self._wanted: dict[str, tuple[loop.Wire, str, str]] = {}
        """Who waits for the process of a job that is to be forked, from which zygote, and what counts in its cgroup."""

    def add(self, job: str, wire: loop.Wire) -> None:
        """Raises ValueError."""
        if job in self._wires:
            raise ValueError("there is one")
        self._wires[job] = wire

    def fork(self, agent: loop.Wire, zygote: str, job: str, kills: str) -> None:
        """An agent wants one more instance of what a zygote has loaded."""
        there = self._wires.get(zygote)
        if there is None:
            return agent.say(calls.control("refused"))
        self._wanted[job] = agent, zygote, kills
        there.say(calls.control("fork", job=job, token=_token(self._directory, job)))

    def is_wanted(self, job: str) -> bool:
        """Whether a process of this job may come from a zygote."""
        return job in self._wanted

    def came(self, job: str, pid: int) -> str:
        """A process of a job has said whose it is; returns what counts in its own cgroup, '' if it has its container's."""
        agent, _, kills = self._wanted.pop(job, (None, "", ""))
        if agent:
            agent.say(calls.control("forked", pid=pid))
        return kills

    def heed(self, said: dict[str, Any]) -> None:
        """What a zygote says after its hello: that it cannot be forked for a job."""
        if said["is"] == "refused":
            self._refuse(str(said["job"]))

    def lost(self, zygote: str) -> None:
        """One has ended."""
        del self._wires[zygote]
        for job in [job for job, (_, whose, _) in self._wanted.items() if whose == zygote]:
            self._refuse(job)

    def unwanted(self, agent: loop.Wire) -> None:
        """Who asked has gone: a process that still comes is not wanted any more."""
        for job in [job for job, (waits, _, _) in self._wanted.items() if waits is agent]:
            del self._wanted[job]

    def _refuse(self, job: str) -> None:
        agent, _, _ = self._wanted.pop(job, (None, "", ""))
        if agent:
            agent.say(calls.control("refused"))
