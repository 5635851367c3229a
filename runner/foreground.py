"""`crun run` in the foreground: from start to end, in this process.

A guard (guard.py) is forked before anything is set up, and cleans up if this process is killed.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

from cafs import linux, stopping
from cafs.errors import CafsError, os_error
from runner import cgroups, containers, create, ending, holding, logs, starting, stdio
from runner.guard import DONE, FORWARDED, HANDED_OVER, Guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container


def run(options: Options) -> int:
    """Run a command in an image; returns its exit code.  Raises CafsError before it started."""
    linux.close_on_exec()
    starting.find_runc()
    ending.tidy()
    if options.has("detach"):
        from runner import launching

        container = create.create(options, is_foreground=False)
        launching.launch(container)
        os.write(1, container.id.encode() + b"\n")
        return 0
    return make(options).run()


def make(options: Options, **more: Any) -> Foreground:
    """Make a container that ends with this process.  more: as of create.create.  Raises CafsError, having left nothing."""
    guard = Guard()
    try:
        return Foreground(create.create(options, is_foreground=True, when_held=guard.start, **more), guard)
    except BaseException:
        guard.end(DONE)
        raise


class Foreground:
    """One container that dies with this process."""

    def __init__(self, container: Container, guard: Guard) -> None:
        self.container = container
        self._guard = guard
        self._host = -1
        self._is_left = False
        asked = container.asked["log"]
        keeps = not container.has("rm") and asked["driver"] != "none"
        self._log = logs.Log(container.path("log"), asked["max_size"], asked["max_files"]) if keeps else None

    def _note_loss(self) -> None:
        """What its log lacks: it has been printed, but a full disk has not kept it."""
        if self._log and self._log.lost:
            self.container.note(log_lost=self._log.lost)
            logs.say_lost(self.container, self._log.lost, self._log.why)

    def run(self) -> int:
        """Start it, wait, give everything back."""
        container, code, error = self.container, 125, ""
        has_ended, low = False, None
        try:
            self._host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            low = starting.get_lower(container)
            uid = starting.prepare(container, low)
            code = self._run(uid)
            has_ended = True
        except _Left as left:
            self._note_loss()
            self._hand_over(left.master, low.lock if low else -1)
            return 0
        except CafsError as failure:
            code, error = starting.code_of(failure), str(failure)
            raise
        finally:
            if not self._is_left:
                self._note_loss()
                more = ending.take_down(container, has_ended=has_ended)
                ending.settle(container, code, error=error, **more)
                if low:
                    low.let_go()
                self._guard.end(DONE)
        return code

    def _hand_over(self, master: int, lower: int) -> None:
        """The keys that leave a terminal were typed: the container goes on, with a monitor instead of us."""
        from runner import launching

        container = self.container
        pidfd = container.pidfd()
        self._is_left = True
        container.asked["foreground"] = False
        container.save()
        self._guard.end(HANDED_OVER)
        child = os.fork()
        if child:
            return
        try:
            linux.leave_session()
            holding.hold(container, {"terminal": master})
            fds = {"terminal": master, "process": -1 if pidfd is None else pidfd, "host": self._host, "lower": lower}
            launching.become_monitor(container, fds)
        finally:
            os._exit(1)

    def _run(self, uid: int) -> int:
        container = self.container
        forward = Forwarder()
        has_terminal, interactive = container.has("tty"), container.has("interactive")
        log = self._log
        console = stdio.Console(container.directory) if has_terminal else None
        streams = None if console else stdio.Streams(interactive, log, uid)
        pid = starting.start(container, streams, console.directory if console else -1)
        gc.enable()
        container.note(status=containers.RUNNING, started_ns=time.time_ns(), **containers.identify(pid))
        containers.event(container, "start")
        forward.to(pid)
        deadline = _Deadline(pid, container.asked["timeout_s"])
        if console:
            master = console.receive()
            detacher = None
            if interactive and os.isatty(0):
                from runner.joining import Detacher, keys

                detacher = Detacher(keys(container.value("detach-keys")))
            if not stdio.run_terminal(master, interactive, log, detacher):
                raise _Left(master)
            os.close(master)
        _, status = os.waitpid(pid, 0)
        forward.stop()
        deadline.stop()
        if container.value("pid"):  # processes may outlive the first, and hold what we wait for
            cgroups.kill_processes(cgroups.path_for(container, container.id))
        if streams:
            try:
                streams.drain()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise os_error("cannot write what the command printed", error) from error
        return linux.exit_code(status)


class _Left(Exception):
    """Its terminal was left by the keys for that."""

    def __init__(self, master: int) -> None:
        super().__init__()
        self.master = master


class _Deadline:
    """--timeout: a process of ours that kills the command in time; it ends with us."""

    def __init__(self, pid: int, seconds: int) -> None:
        self._child = 0
        if seconds:
            fd = os.pidfd_open(pid)
            self._child = os.fork()
            if not self._child:
                try:
                    linux.die_with_parent()
                    time.sleep(seconds)
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                finally:
                    os._exit(0)
            os.close(fd)

    def stop(self) -> None:
        """The command has ended."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)


class Forwarder:
    """Passes our signals on to the command; those that come before it runs wait for it."""

    def __init__(self) -> None:
        self._pid = 0
        self._waiting: list[int] = []
        self._lock = threading.Lock()
        stopping.on_signals(FORWARDED, self._pass_on)

    def _pass_on(self, number: int) -> None:
        """In a thread."""
        with self._lock:
            if self._pid:
                self._kill(number)
            elif self._waiting:
                os._exit(128 + number)  # the start itself may hang; the guard tidies up
            else:
                self._waiting.append(number)

    def _kill(self, number: int) -> None:
        if self._pid > 0:
            try:
                os.kill(self._pid, number)
            except ProcessLookupError:
                pass

    def to(self, pid: int) -> None:
        """From now on to this process."""
        with self._lock:
            self._pid = pid
            for number in self._waiting:
                self._kill(number)

    def stop(self) -> None:
        """The command is about to be waited for, and its pid may soon be another's."""
        with self._lock:
            self._pid = -1
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN)
