"""The processes that serve LAZY, or a tree: one worker, and three supervisors that keep each other and the worker alive.

All hold the descriptor of /dev/fuse and watch each other by pidfd (pidfd_open(2)).  When one dies, a supervisor forks another
in its place: no program is loaded, so that takes a few milliseconds, and only killing all four within that time ends the mount.
A new worker has the requests that the dead one had taken sent again.  SIGHUP to the first supervisor: they run the program that
is installed now, one after the other, and then replace the worker.

usage: python -m cafs.lazyd STATE FUSE_FD COLUMNS_FD TABLE_FD SLOT [upgraded]
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import threading
import time

from cafs import atomic, linux, slots
from cafs.serving import PID_FILE, hold, is_over, note_pid, read_config, remove_state, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_STAND_IN_S = 5.0
_RETRY_S = 1.0
_AGAIN_MS = 100
_BEGIN_WAIT_S = 10.0
_UPGRADED = "upgraded"
_WORKER_LOADS = ("concurrent.futures.thread", "cafs.store", "cafs.worker")
_LAZY_LOADS = ("cafs.lazy", "cafs.overlay")
_TREE_LOADS = ("cafs.columns", "cafs.kept", "cafs.treefs")


class Served:
    """What a process of a mount needs.  state: its directory.

    fd: of /dev/fuse; columns: of a tree, -1 for LAZY; table: of the slots; slot: which one of them is ours.
    """

    __slots__ = ("columns", "fd", "slot", "state", "table")

    def __init__(self, state: str, fd: int, columns: int, table: int, slot: int) -> None:
        self.state, self.fd, self.columns, self.table, self.slot = state, fd, columns, table, slot

    def descriptors(self) -> list[int]:
        """What a program that takes our place has to inherit."""
        return [one for one in (self.fd, self.columns, self.table) if one >= 0]

    def command(self, *more: str) -> list[str]:
        """The program that takes our place."""
        numbers = (self.fd, self.columns, self.table, self.slot)
        return [sys.executable, "-P", "-m", "cafs.lazyd", self.state, *map(str, numbers), *more]


def wait(answers: int) -> None:
    """Wait for the worker that `begin` has started.  answers: what it returned.  Raises CafsError if it cannot begin."""
    from cafs.answer import failure, receive

    answer = receive(answers)
    if answer != b"ok":
        raise failure(answer)


def begin(state: str, fd: int, columns: int = -1) -> int:
    """Start the servers of a file system that was just mounted; returns a descriptor for `wait`.

    The caller must have no threads: all that ever serves this mount is forked from it.
    """
    _preload(columns)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(writer)
        os.waitpid(child, 0)
        return reader
    try:
        if os.fork():
            os._exit(0)  # nobody has to wait for the supervisor
        linux.leave_session()
        linux.set_command_line(f"cafs-mount: serving {state}")
        linux.set_name("cafs-lazy" if columns < 0 else "cafs-tree")
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        alive, table = hold(state), slots.create(state)
        os.set_inheritable(alive, True)
        _close_all_but(*(one for one in (fd, alive, table, writer, columns) if one >= 0))
        served = Served(state, fd, columns, table, slots.SUPERVISORS[0])
        slots.take(table, served.slot)
        first = Supervisor(served)
        first.fork(slots.WORKER, writer)
        os.close(writer)
        first.run(has_just_begun=True)
    finally:
        os._exit(1)


def _preload(columns: int) -> None:
    """Load what a worker needs, so that one that is forked later begins at once."""
    for name in _WORKER_LOADS + (_LAZY_LOADS if columns < 0 else _TREE_LOADS):
        importlib.import_module(name)


def _close_all_but(*kept: int) -> None:
    """Whoever waits for the end of a pipe or a lock of the caller's must not wait for us."""
    first = 3
    for one in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, one)
        first = one + 1


class Supervisor:
    """One of the supervisors.  It has no threads: a child that is forked from it is whole."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._watched: dict[int, int] = {}  # slot -> pidfd
        self._signals = -1

    def run(self, *, has_just_begun: bool = False, is_upgraded: bool = False) -> NoReturn:
        """Keep all slots filled until the file system is unmounted, then remove STATE."""
        try:
            _go_first()
            self._signals = _on_signal()
            if self._served.slot == slots.SUPERVISORS[0]:
                note_pid(self._served.state, PID_FILE)
            self._mend()
            if has_just_begun:
                from cafs.apart import leave_cgroups

                leave_cgroups([os.getpid(), *filter(None, (slots.pid(self._served.table, slot) for slot in slots.ALL))])
            if is_upgraded:
                self._pass_on()
            while not (is_over(self._served.state, self._served.fd) and slots.WORKER not in self._watched):
                self._wait()
                self._mend()
            _end(self._served.state)
        except BaseException as error:
            _complain(self._served.state, error)
            time.sleep(_RETRY_S)  # whoever takes our place may fare no better
        finally:
            os._exit(0)

    def _wait(self) -> None:
        """Until one of the others ends, a signal comes, or the file system is unmounted."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        for pidfd in self._watched.values():
            poll.register(pidfd, select.POLLIN)
        if not is_over(self._served.state, self._served.fd):
            poll.register(self._served.fd, 0)  # POLLERR when it is unmounted
        is_whole = len(self._watched) == len(slots.ALL) - 1
        ready = dict(poll.poll(None if is_whole or is_over(self._served.state, self._served.fd) else _AGAIN_MS))
        for slot, pidfd in list(self._watched.items()):
            if pidfd in ready:
                os.close(self._watched.pop(slot))
        _reap()
        if self._signals in ready:
            self._heed(os.read(self._signals, 64))

    def _heed(self, numbers: bytes) -> None:
        if signal.SIGINT in numbers or signal.SIGTERM in numbers:
            unmount(self._served.state)
        if signal.SIGHUP in numbers:
            _run_anew(self._served)

    def _mend(self) -> None:
        """Fill the slots whose process has died, and watch all others."""
        lost = [slot for slot in slots.ALL if slot not in self._watched and slot != self._served.slot]
        if not lost:
            return
        slots.lock(self._served.table)
        try:
            for slot in lost:
                pidfd = slots.watch(self._served.table, slot)
                if pidfd < 0 and not is_over(self._served.state, self._served.fd):
                    try:
                        self.fork(slot)
                    except OSError:
                        continue  # no process can be had now, as under pids.max: `_wait` does not wait long then
                    pidfd = slots.watch(self._served.table, slot)
                if pidfd >= 0:
                    self._watched[slot] = pidfd
        finally:
            slots.unlock(self._served.table)

    def fork(self, slot: int, answers: int = -1) -> None:
        """Fork the process of a slot; returns when it has taken the slot, or has died.  answers: of `begin`, for a worker."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a signal of ours must not be noted by the child, nor the reverse
        child = -1
        try:
            child = os.fork()
        finally:
            if child:
                os.close(writer)
                if child > 0:
                    os.read(reader, 1)
                os.close(reader)
                if self._signals >= 0:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if child:
            return
        try:
            os.close(reader)
            mine = self._become(slot)
            if not slots.take(mine.table, slot):
                os._exit(0)  # our parent was killed, and another one has filled the slot
            os.write(writer, b"x")
            os.close(writer)
            if slot == slots.WORKER:
                _go_as_others()
                _work(mine, answers)
            if answers >= 0:
                os.close(answers)
            Supervisor(mine).run()
        finally:
            os._exit(0)

    def _become(self, slot: int) -> Served:
        """In a new child: forget what its parent watched."""
        os.setsid()
        for one in (*self._watched.values(), self._signals, signal.set_wakeup_fd(-1)):
            if one >= 0:
                os.close(one)
        served = self._served
        return Served(served.state, served.fd, served.columns, served.table, slot)

    def _pass_on(self) -> None:
        """We run the new program: the next supervisor is to do the same; after the last the worker is replaced."""
        after = [slot for slot in slots.SUPERVISORS if slot > self._served.slot and slot in self._watched]
        if after:
            signal.pidfd_send_signal(self._watched[after[0]], signal.SIGHUP)
        elif slots.WORKER in self._watched:
            signal.pidfd_send_signal(self._watched[slots.WORKER], signal.SIGTERM)


def _run_anew(served: Served) -> None:
    """Run the program that is installed now in this process, which keeps its number and its slot."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is somebody to handle them
    for one in served.descriptors():
        os.set_inheritable(one, True)
    os.execv(sys.executable, served.command(_UPGRADED))


def _end(state: str) -> None:
    """Nothing is mounted any more: remove what told of it."""
    try:
        notes = read_config(state).get("notes")
        if notes and json.loads(atomic.read_file(notes, 1 << 16)).get("state") == state:
            atomic.unlink_quietly(notes)
    except (OSError, ValueError):
        pass  # they are gone already
    remove_state(state)


def _go_first() -> None:
    """A supervisor does next to nothing, and that before all others: on a busy host all could die before one has run.

    A nice value would not do: it counts within a session only (sched(7), autogroup).
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        pass  # for root alone, and not in every cgroup


def _go_as_others() -> None:
    """A worker works.  An ordinary user's class was never changed, and may not be: none may leave SCHED_IDLE."""
    if os.sched_getscheduler(0) == os.SCHED_RR:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _on_signal() -> int:
    """A descriptor from which the numbers of the signals are read that come: SIGHUP, SIGINT, SIGTERM."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return reader


def _work(served: Served, answers: int) -> None:
    """Be the worker.  answers: of `begin`, -1 if nobody waits."""
    from cafs.answer import tell
    from cafs.worker import work

    def ready() -> None:
        if answers >= 0:
            os.write(answers, b"ok")
            os.close(answers)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        watch(served)  # also if what follows fails: somebody has to answer
        work(served.state, served.fd, served.columns, ready)
    except BaseException as error:  # the only way out of this process
        if answers >= 0:
            tell(answers, error)
            os._exit(0)
        _complain(served.state, error)
        _stand_in(served.fd)
    finally:
        os._exit(0)  # not waiting for threads that wait for a store


def watch(served: Served) -> None:
    """From a thread of the worker: should all supervisors die at once, start one.  It forks the others."""
    threading.Thread(target=_watch, args=(served,), daemon=True).start()


def _watch(served: Served) -> None:
    while True:
        watched = [pidfd for slot in slots.SUPERVISORS if (pidfd := slots.watch(served.table, slot)) >= 0]
        if watched:
            poll = select.poll()
            for pidfd in watched:
                poll.register(pidfd, select.POLLIN)
            poll.poll()
            for pidfd in watched:
                os.close(pidfd)
        elif not is_over(served.state, served.fd):
            try:
                _start_supervisor(served)
            except OSError:
                pass  # no process can be had now
        time.sleep(0.05)  # the others have filled the slot by then


def _start_supervisor(served: Served) -> None:
    """By execve: a process that has threads cannot fork one that goes on."""
    import subprocess

    slots.lock(served.table)
    try:
        if any(slots.pid(served.table, slot) for slot in slots.SUPERVISORS):
            return
        null = subprocess.DEVNULL
        other = Served(served.state, served.fd, served.columns, served.table, slots.SUPERVISORS[0])
        child = subprocess.Popen(
            other.command(), pass_fds=other.descriptors(), stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True
        )
        deadline = time.monotonic() + _BEGIN_WAIT_S
        while child.poll() is None and not slots.pid(served.table, other.slot) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        slots.unlock(served.table)


def _complain(state: str, error: BaseException) -> None:
    """The log that was asked for may be what is wrong."""
    try:
        with open(os.path.join(state, "log"), "a", encoding="utf-8") as log:
            log.write(f"cannot serve: {error}\n")
    except OSError:
        pass


def _stand_in(fd: int) -> None:
    """Answer EIO for a while instead of a worker that cannot begin; then another one is tried."""
    from cafs.fusedev import Server

    server = Server(fd, None, 1)
    server.take_over()
    threading.Timer(_STAND_IN_S, server.stop).start()
    server.serve()


def _main(state: str, numbers: list[int], *, is_upgraded: bool) -> None:
    served = Served(state, *numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if not is_upgraded and not slots.take(served.table, served.slot):
        return
    for one in served.descriptors():
        os.set_inheritable(one, False)
    if not is_upgraded:
        os.set_inheritable(hold(state), True)
    _preload(served.columns)
    Supervisor(served).run(is_upgraded=is_upgraded)


if __name__ == "__main__":
    _main(sys.argv[1], [int(one) for one in sys.argv[2:6]], is_upgraded=sys.argv[6:] == [_UPGRADED])
