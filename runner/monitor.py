"""The monitor of a container that runs in the background: its log, who is attached, its health, its end.  Small, no threads.

It may be killed at any time.  The next crun command starts another, which finds the container's pipes by their names and its
process 1 by state.json; what the container writes meanwhile waits in the pipes.

usage: python -m runner.monitor ID NAME=FD...    lock, lower, host (mount namespace), process (pidfd), stdin, stdout, stderr or
       terminal, ready (closed when what was there is read)
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from cafs import linux
from runner import containers
from runner.attachment import Attachments
from runner.logs import Log
from runner.tap import PIECE, Taps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container
    from runner.health import Health

_FIRST_WAIT_S, _WAIT_MAX_S = 0.1, 60.0
_STEADY_S = 10.0
_GONE_POLL_S = 0.2
_IDLE_S = 3600.0
_PIPE_MAX = 1 << 20


class Monitor:
    """Watches one container to its end."""

    def __init__(self, container: Container, fds: dict[str, int]) -> None:
        self.container = container
        self.fds = fds
        state = container.state()
        self.pid = int(state.get("pid", 0))
        self._has_lost, self._lost_before = False, int(state.get("log_lost", 0))
        self.status: int | None = None
        self.health: Health | None = None
        log = container.asked["log"]
        self.log = Log(container.path("log"), log["max_size"], log["max_files"]) if log["driver"] != "none" else None
        self.sources = {fds[name]: name for name in ("stdout", "stderr", "terminal") if name in fds}
        for fd in self.sources:
            os.set_blocking(fd, False)
        self.taps = Taps(container.path("taking"), self.log)
        for fd, name in self.sources.items():
            if name != "terminal":
                self.taps.recover(fd, name)
        self.attachments = Attachments(container.directory, fds.get("stdin", fds.get("terminal", -1)), "terminal" in fds)
        self.deadline = self._deadline(state)
        if container.asked["health"]:
            from runner.health import Health

            self.health = Health(container)

    def _deadline(self, state: dict[str, object]) -> float | None:
        seconds = self.container.asked["timeout_s"]
        started = state.get("started_ns")
        return int(str(started)) / 1e9 + seconds if seconds and started else None

    def run(self) -> None:
        """Returns once process 1 has ended and all that it wrote is in the log."""
        process = self.fds.get("process", -1)
        for fd in list(self.sources):  # what waits there since another monitor was killed: no more than a pipe holds
            for _ in range(_PIPE_MAX // PIECE + 1):
                if fd not in self.sources or not self._pass_on(fd):
                    break
        if "ready" in self.fds:
            os.close(self.fds.pop("ready"))
        while process >= 0:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            waits = self.attachments.input_waits
            for fd in self.sources.keys() | {waits} - {-1}:
                reads = fd in self.sources and not self.attachments.are_full
                poll.register(fd, (select.POLLIN if reads else 0) | (select.POLLOUT if fd == waits else 0))
            self.attachments.register(poll)
            if self.health:
                self.health.register(poll)
            ready = dict(poll.poll(self._wait_ms()))
            if ready.get(waits, 0) & select.POLLOUT:
                self.attachments.feed()
            for fd in [fd for fd in ready if fd in self.sources and ready[fd] & ~select.POLLOUT]:
                self._pass_on(fd)
            self.attachments.serve(ready)
            if self.health:
                self.health.serve(ready)
            self._check_time()
            self._note_loss(is_over=False)
            self._reap()
            if process in ready:
                break
        if self.container.value("pid"):  # processes may outlive the first, and write for ever
            from runner import cgroups

            cgroups.kill_processes(cgroups.path_for(self.container, self.container.id))
        for fd in list(self.sources):
            while fd in self.sources and self._pass_on(fd):
                pass
        self._note_loss(is_over=True)
        self._reap()

    def _wait_ms(self) -> int:
        ends = [one for one in (self.deadline, self.health.next_s if self.health else None) if one is not None]
        left_s = min(ends) - time.time() if ends else _IDLE_S
        return int(min(max(left_s, 0), _IDLE_S) * 1000) + 1

    def _check_time(self) -> None:
        if self.deadline is not None and time.time() >= self.deadline:
            self.deadline = None
            signal.pidfd_send_signal(self.fds["process"], signal.SIGKILL)
        if self.health:
            self.health.tick()

    def _pass_on(self, fd: int) -> bool:
        """Some of what it wrote to the log, and to who is attached; whether there was any."""
        name = self.sources[fd]
        data = self._read_terminal(fd) if name == "terminal" else self.taps.take(fd, name)
        if data:
            self.attachments.send("stderr" if name == "stderr" else "stdout", data)
        return bool(data)

    def _read_terminal(self, fd: int) -> bytes | None:
        try:
            data = os.read(fd, PIECE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            del self.sources[fd]  # nobody has it open any more
        elif self.log:
            self.log.write("stdout", data)
        return data

    def _note_loss(self, *, is_over: bool) -> None:
        """What its log lacks: at first, so that a kill does not hide it, and in the end."""
        if self.log and self.log.lost and (is_over or not self._has_lost):
            self._has_lost = True
            self.container.note(log_lost=self._lost_before + self.log.lost)

    def _reap(self) -> None:
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self.pid:
                    self.status = status
                elif self.health:
                    self.health.ended(pid, status)
        except ChildProcessError:
            return

    def code(self) -> int | None:
        """The exit code; None if nobody knows it."""
        status = self.status
        if status is None and "process" in self.fds:
            from runner.pidinfo import exit_status

            status = exit_status(self.fds["process"], self.pid)
        return None if status is None else linux.exit_code(status)

    def finish(self) -> None:
        """Note the end, and start it again if it is to be."""
        from runner import ending

        container, code = self.container, self.code()
        started = int(container.state().get("started_ns", 0))
        more = ending.take_down(container, has_ended=True)
        self.attachments.end(code)
        if "lower" in self.fds:
            os.close(self.fds["lower"])
        os.chdir("/")
        linux.setns(self.fds["host"], linux.CLONE_NEWNS)
        if self._is_wanted_again(code):
            container.note(status=containers.EXITED, exit_code=code, finished_ns=time.time_ns(), restarting=True, **more)
            containers.event(container, "die", exit_code=code)
            if self._wait_for_restart(started):
                self._start_again()
            container.note(restarting=False)
        else:
            ending.settle(container, code, **more)
        ending.release(container)

    def _is_wanted_again(self, code: int | None) -> bool:
        restart, state = self.container.asked["restart"], self.container.state()
        if os.path.exists(self.container.path("stopped")) or restart["policy"] == "no":
            return False
        if restart["policy"] == "on-failure":
            return code != 0 and (not restart["most"] or int(state.get("restarts", 0)) < restart["most"])
        return True

    def _wait_for_restart(self, started_ns: int) -> bool:
        """Longer each time, unless it ran for a while; False if it is stopped meanwhile."""
        again = int(self.container.state().get("restarts", 0))
        is_steady = time.time() - started_ns / 1e9 > _STEADY_S
        until = time.monotonic() + (_FIRST_WAIT_S if is_steady else min(_FIRST_WAIT_S * 2 ** min(again, 20), _WAIT_MAX_S))
        while time.monotonic() < until:
            if os.path.exists(self.container.path("stopped")) or not os.path.exists(self.container.path("container.json")):
                return False
            time.sleep(min(_GONE_POLL_S, max(until - time.monotonic(), 0)))
        return True

    def _start_again(self) -> None:
        for name in ("lock", "host"):
            os.set_inheritable(self.fds[name], True)
        words = [self.container.id, str(self.fds["lock"]), str(self.fds["host"])]
        os.execv(sys.executable, [sys.executable, "-P", "-m", "runner.launching", "again", *words])


def main(identity: str, words: list[str]) -> None:
    """Watch a container, and what is to be done at its end."""
    fds = {name: int(fd) for name, _, fd in (word.partition("=") for word in words)}
    for fd in fds.values():
        os.set_inheritable(fd, False)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    container = containers.load(identity)
    if container is None:
        return
    container.lock = fds["lock"]
    monitor = Monitor(container, fds)
    monitor.run()
    monitor.finish()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except Exception:
        import traceback

        try:
            with open(os.path.join(containers.root(), sys.argv[1], "monitor.error"), "w", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        except OSError:
            pass
    finally:
        os._exit(0)
