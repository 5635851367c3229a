"""What the function host of a worker has: calls that were begun, and instances that serve them.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import os
import signal
import time
from collections import OrderedDict

from pool import calls, cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool import loop, values

PLACE = "calls"
"""Directory of the host, in that of the agent; and of an instance, in that of its job."""

OUTCOME = "outcome"
"""Of a job: what its container has used, and how many of it the kernel has killed for want of memory; written at its end."""

RUNNING, DONE = "running", "done"


class Call:
    """instance: where it runs.  deadline: by time.monotonic().  given_up: when it was answered for its handler.

    limit_s: how long it may take from when it is begun; 0 if its caller has said how long in all.
    """

    __slots__ = (
        "answer",
        "credit",
        "deadline",
        "done",
        "given_up",
        "has_begun",
        "id",
        "instance",
        "items",
        "limit_s",
        "pull",
        "result",
    )

    def __init__(self, call: bytes, instance: Instance, deadline: float, limit_s: float) -> None:
        self.id, self.instance, self.deadline, self.limit_s = call, instance, deadline, limit_s
        self.answer = b""
        self.done = self.given_up = 0.0
        self.has_begun = False
        self.items, self.credit = 0, calls.ITEMS_AHEAD
        self.pull: values.Pull | None = None
        self.result: values.Kept | None = None


class Instance:
    """A container that serves calls.  number: for the router; about: as the agent wrote it; identity: of the version.

    kills: the file that counts in its cgroup, if that is not its container's.  outcome: where whoever removes its cgroup notes
    the count before.
    """

    def __init__(
        self,
        number: int,
        wire: loop.Wire,
        job: str,
        about: dict[str, Any],
        directory: str,
        pid: int,
        kills: str,
        outcome: str,
    ) -> None:
        self.number, self.wire, self.job, self.directory = number, wire, job, directory
        self._kills, self._kills_before = kills, 0
        # Now: it may be removed before we read it.
        self._outcome = os.open(outcome, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.pid, self.process = pid, os.pidfd_open(pid)  # a number may be another's later
        except OSError:
            os.close(self._outcome)
            raise
        self.concurrency = int(about["concurrency"])
        self.timeout_s = float(about["timeout_s"])
        self.idle_s = float(about["idle_s"])
        self.has_answered = not str(about.get("handler", "")).startswith("jsonl:")
        """Or is no program that may keep its lines to itself."""

        self.identity = str(about["id"])
        self.calls: OrderedDict[bytes, Call] = OrderedDict()
        self.used = time.monotonic()
        self.is_ready = self.is_told = self.is_leaving = self.is_serial = self.may_be_ahead = False
        self.left_at = 0.0
        """Since when it is to end."""

    def set_ready(self, *, is_serial: bool, may_be_ahead: bool) -> None:
        """It has said so: it is in its cgroup by now."""
        self.is_ready, self.is_serial, self.may_be_ahead = True, is_serial, may_be_ahead
        self.used = time.monotonic()
        self._kills = self._kills or cgroup.kills_of(self.pid)
        self._kills_before = cgroup.kills(self._kills) or 0

    def was_too_large(self) -> bool:
        """Whether the kernel has ended it, or a process beside it, as its memory was used up; no, where nobody knows.

        Of one that has ended: what the kernel counted is in its cgroup, or, if that has gone, was noted before.
        """
        found = cgroup.kills(self._kills)
        return (cgroup.noted_kills(self._outcome) if found is None else found) > self._kills_before

    def close(self) -> None:
        """It has ended, and what became of it was said."""
        os.close(self.process)
        os.close(self._outcome)
        self.process = -1  # the number may be another file's by now

    def send(self, number: int) -> None:
        """A signal to its process."""
        try:
            signal.pidfd_send_signal(self.process, number)
        except OSError:
            pass  # it has ended, or is not ours
