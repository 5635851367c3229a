"""Healthchecks: a command in the container every so often; what it says is in state.json, as docker's inspect shows it."""

from __future__ import annotations

import json
import os
import select
import signal
import time

from cafs import atomic
from runner import starting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_OUTPUT_MAX = 4096
_KEPT = 5


class Health:
    """next_s: when there is something to do, in seconds since 1970."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.check = container.asked["health"]
        self.began = time.time()
        self.next_s = self.began + self.check["interval_s"]
        self._child = 0
        self._pidfd = -1
        self._started = 0.0
        self._is_late = False
        self._streak = 0
        self._log: list[dict[str, object]] = []
        self._write_process()

    def _write_process(self) -> None:
        """What runc exec is to run: the container's own process, with the check's arguments."""
        document = json.loads(atomic.read_file(self.container.path("config.json"), 1 << 24))
        process = document["process"] | {"args": self.check["test"], "terminal": False}
        atomic.replace_hint(self.container.path("health.json"), json.dumps(process).encode(), 0o600)

    def register(self, poll: select.poll) -> None:
        """What to wait for: the end of a check."""
        if self._pidfd >= 0:
            poll.register(self._pidfd, select.POLLIN)

    def tick(self) -> None:
        """Begin a check, or end one that takes too long, if it is time."""
        if time.time() < self.next_s:
            return
        if self._child:
            self._is_late = True
            os.kill(self._child, signal.SIGKILL)
            self.next_s = time.time() + 1
            return
        self._begin()

    def _begin(self) -> None:
        path = self.container.path("health.out")
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        arguments = [starting.find_runc(), "--root", starting.runtime_root(), "exec"]
        arguments += ["--process", self.container.path("health.json"), self.container.id]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
            self._child = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=actions)
        finally:
            os.close(out)
            os.close(null)
        self._pidfd = os.pidfd_open(self._child)
        self._started, self._is_late = time.time(), False
        self.next_s = self._started + self.check["timeout_s"]

    def ended(self, pid: int, status: int) -> None:
        """A child of the monitor has ended: note it if it was the check."""
        if pid != self._child:
            return
        os.close(self._pidfd)
        self._child, self._pidfd = 0, -1
        code = -1 if self._is_late else os.waitstatus_to_exitcode(status)
        output = atomic.read_file(self.container.path("health.out"), 1 << 24)[:_OUTPUT_MAX].decode(errors="replace")
        if self._is_late:
            output = f"the check took longer than {self.check['timeout_s']:g} s"
        now = time.time()
        self.next_s = now + self.check["interval_s"]
        self._log = [*self._log, {"start_s": self._started, "end_s": now, "exit_code": code, "output": output}][-_KEPT:]
        self._judge(code, now)

    def _judge(self, code: int, now: float) -> None:
        before = self.container.state().get("health")
        status = before
        if code == 0:
            self._streak, status = 0, "healthy"
        elif before != "starting" or now - self.began > self.check["start_period_s"]:
            self._streak += 1
            status = "unhealthy" if self._streak >= self.check["retries"] else before
        self.container.note(health=status, health_streak=self._streak, health_log=self._log)
        if status != before:
            from runner.containers import event

            event(self.container, f"health_status: {status}")
