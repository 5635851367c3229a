"""Healthchecks: a command in the container every so often; what it says is in state.json, as docker's inspect shows it."""

from __future__ import annotations

import json
import os
import select
import signal
import time

from cafs import atomic
from cafs.errors import CafsError
from runner import starting, users

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
        self._pidfd = self._output_fd = -1
        self._output = b""
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
        """What to wait for: what a check prints, and its end."""
        for fd in (self._pidfd, self._output_fd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)

    def serve(self, ready: dict[int, int]) -> None:
        """Keep the beginning of what it prints."""
        if self._output_fd in ready:
            try:
                data = os.read(self._output_fd, 1 << 16)
            except BlockingIOError:
                return
            self._output = (self._output + data)[:_OUTPUT_MAX]
            if not data:
                os.close(self._output_fd)
                self._output_fd = -1

    def tick(self) -> None:
        """Begin a check, or end one that takes too long, if it is time."""
        if time.time() < self.next_s:
            return
        if self._pidfd >= 0:
            self._is_late = True
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except OSError:
                pass
            self.next_s = time.time() + 1
            return
        try:
            self._begin()
        except (OSError, CafsError):
            self.next_s = time.time() + self.check["interval_s"]  # it is ending, or there is no room for a process

    def _begin(self) -> None:
        """By runc exec in the background, which ends at once: the check is our child then, and can be killed."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        null = -1
        try:
            null = users.open_null(int(self.container.state()["pid"]))
            pid_path = self.container.path("health.pid")
            atomic.unlink_quietly(pid_path)
            process = self.container.path("health.json")
            arguments = starting.runc("exec", "--detach", "--pid-file", pid_path, "--process", process, self.container.id)
            code = starting.spawn(arguments, [null, writer, writer], [])
        finally:
            os.close(writer)
            if null >= 0:
                os.close(null)
        self._started, self._is_late, self._output = time.time(), False, b""
        os.set_blocking(reader, False)
        self._output_fd = reader
        self.next_s = self._started + self.check["timeout_s"]
        if code:
            self._note(code)
            return
        self._child = int(atomic.read_file(pid_path, 64))
        self._pidfd = os.pidfd_open(self._child)

    def ended(self, pid: int, status: int) -> None:
        """A child of the monitor has ended: note it if it was the check."""
        if pid == self._child:
            self._note(os.waitstatus_to_exitcode(status))

    def _note(self, code: int) -> None:
        while self._output_fd >= 0 and len(self._output) < _OUTPUT_MAX:
            before = len(self._output)
            self.serve({self._output_fd: select.POLLIN})
            if len(self._output) == before:
                break
        for fd in (self._pidfd, self._output_fd):
            if fd >= 0:
                os.close(fd)
        self._child, self._pidfd, self._output_fd = 0, -1, -1
        output = self._output.decode(errors="replace")
        if self._is_late:
            code, output = -1, f"the check took longer than {self.check['timeout_s']:g} s"
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
