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
    """A container that serves calls.  number: for the router; about: as the agent wrote it; identity: of the version."""

    def __init__(self, number: int, wire: loop.Wire, job: str, about: dict[str, Any], directory: str, pid: int) -> None:
        self.number, self.wire, self.job, self.directory = number, wire, job, directory
        self.pid, self.process = pid, os.pidfd_open(pid)  # a number may be another's later
        self._kills, self._kills_before = "", 0
        self.concurrency = int(about["concurrency"])
        self.timeout_s = float(about["timeout_s"])
        self.idle_s = float(about["idle_s"])
        self.identity = str(about["id"])
        self.calls: OrderedDict[bytes, Call] = OrderedDict()
        self.used = time.monotonic()
        self.is_ready = self.is_leaving = self.is_serial = self.may_be_ahead = False
        self.left_at = 0.0
        """Since when it is to end."""

    def set_ready(self, *, is_serial: bool, may_be_ahead: bool) -> None:
        """It has said so: it is in its cgroup by now."""
        self.is_ready, self.is_serial, self.may_be_ahead = True, is_serial, may_be_ahead
        self.used = time.monotonic()
        self._kills = cgroup.kills_of(self.pid)
        self._kills_before = cgroup.kills(self._kills)

    def was_too_large(self) -> bool:
        """Whether the kernel has ended it, or a process beside it, as its memory was used up; no, where nobody knows."""
        return cgroup.kills(self._kills) > self._kills_before

    def send(self, number: int) -> None:
        """A signal to its process."""
        try:
            signal.pidfd_send_signal(self.process, number)
        except OSError:
            pass  # it has ended, or is not ours

    def forget_process(self) -> None:
        """It has ended."""
        os.close(self.process)
        self.process = -1
