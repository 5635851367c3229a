"""Who else may use a pool, how much of it at once, and whose turn it is: [tenants.NAME] of pool.toml.

A tenant is who the kernel says is at the other end of the socket (SO_PEERCRED, unix(7)); the pool's owner is the tenant ''.
Jobs of several tenants are taken in the order of their virtual time: what a tenant has running and had queued before, by its
share, so that who has less gets more (start-time fair queueing, Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import pwd
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from pool.state import Job

OWNER = ""


@dataclass(frozen=True, slots=True)
class Tenant:
    """users: ids.  cpus, memory (bytes), gpus: at most at once; jobs, calls of functions: that have not ended; 0: no limit.

    share: weight.
    """

    users: frozenset[int] = frozenset()
    cpus: float = 0.0
    memory: int = 0
    gpus: int = 0
    jobs: int = 0
    calls: int = 0
    share: float = 1.0


@dataclass(slots=True)
class Usage:
    """What a tenant's jobs have for themselves now."""

    cpus: float = 0.0
    memory: int = 0
    gpus: int = 0

    def add(self, spec: Mapping[str, Any]) -> None:
        """A job is placed."""
        self.cpus += float(spec["cpus"])
        self.memory += int(spec["memory"])
        self.gpus += int(spec["gpus"])


class Tenants:
    """tables: [tenants] of pool.toml."""

    def __init__(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        self.all = {name: _tenant(table) for name, table in tables.items()}

    def of_user(self, uid: int) -> str | None:
        """Whose jobs somebody submits; None: nobody's."""
        return next((name for name, one in self.all.items() if uid in one.users), None)

    def usage(self, placed: Iterable[Job]) -> dict[str, Usage]:
        """By tenant."""
        found: dict[str, Usage] = {}
        for job in placed:
            found.setdefault(tenant_of(job), Usage()).add(job.spec)
        return found

    def over(self, job: Job, usage: Mapping[str, Usage]) -> str:
        """What of its tenant's quota it would exceed now, in words; '' if it may run."""
        limit = self.all.get(tenant_of(job))
        if limit is None:
            return ""
        has = usage.get(tenant_of(job), Usage())
        for name, most in (("cpus", limit.cpus), ("memory", limit.memory), ("gpus", limit.gpus)):
            if most and getattr(has, name) + job.spec[name] > most + 1e-9:
                return f"quota: {tenant_of(job)} has {getattr(has, name):g} of {most:g} {name}"
        return ""

    def in_order(self, queue: Iterable[Job], usage: Mapping[str, Usage]) -> list[Job]:
        """By priority and number within a tenant, tenants by their share of processors."""
        ordered = sorted(queue, key=lambda job: (-job.priority, job.id))
        if len({tenant_of(job) for job in ordered}) < 2:
            return ordered
        at = {name: one.cpus for name, one in usage.items()}
        keys: dict[int, float] = {}
        for job in ordered:
            name = tenant_of(job)
            share = self.all[name].share if name in self.all else 1.0
            keys[job.id] = at.get(name, 0.0) / share
            at[name] = at.get(name, 0.0) + max(float(job.spec["cpus"]), 0.01)
        return sorted(ordered, key=lambda job: (keys[job.id], -job.priority, job.id))


def tenant_of(job: Job) -> str:
    """Whose it is."""
    return str(job.spec.get("tenant", OWNER))


def _tenant(table: Mapping[str, Any]) -> Tenant:
    users = frozenset(uid_of(one) for one in table["users"])
    limits = {name: table.get(name, 0) for name in ("cpus", "memory", "gpus", "jobs", "calls")}
    return Tenant(users, share=table.get("share") or 1.0, **limits)


def uid_of(user: str) -> int:
    """Of a name, or a number as text.  Raises KeyError."""
    return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
