"""The two processes of LAZY, or of a tree: supervisor and worker watch each other; only both dying at once ends the mount.

Each holds the descriptor of /dev/fuse, and a pidfd of the other (pidfd_open(2)).  When the worker dies the supervisor starts
another, which has the requests of the dead one sent again.  When the supervisor dies the worker starts another.  SIGHUP to the
supervisor: start both programs anew, with whatever version is installed now.

usage: python -m cafs.lazyd worker|supervisor STATE FUSE_FD PEER_PIDFD COLUMNS_FD
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time

from cafs import atomic
from cafs.serving import PID_FILE, held, is_unmounted, note_pid, read_config, remove_state, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_SMALL_AFTER_MS = 1000
_SOON_S = 1.0
_WAIT_MAX_S = 2.0
_STAND_IN_S = 5.0


def start(role: str, state: str, fd: int, peer: int, columns: int) -> subprocess.Popen[bytes]:
    """Start one of the two.  peer: a pidfd of the other, -1: none yet; columns: of a tree, else -1."""
    import subprocess

    keep = [one for one in (fd, peer, columns) if one >= 0]
    null = subprocess.DEVNULL
    command = _command(role, state, fd, peer, columns)
    return subprocess.Popen(command, pass_fds=keep, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)


def wait(answers: int) -> None:
    """Wait for the worker that `begin` has started.  answers: what it returned.  Raises CafsError if it cannot begin."""
    from cafs.answer import failure, receive

    answer = receive(answers)
    if answer != b"ok":
        raise failure(answer)


def begin(state: str, fd: int, columns: int = -1) -> int:
    """Start both for a file system that was just mounted; returns a descriptor for `wait`.

    By fork, for the caller has loaded what the worker needs; the supervisor then runs the program anew, to be small.
    """
    from cafs import linux

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
        mine = os.pidfd_open(os.getpid())
        _close_all_but(*(one for one in (fd, mine, writer, columns) if one >= 0))
        note_pid(state, PID_FILE)
        worker = os.fork()
        if not worker:
            _first_work(state, fd, mine, columns, writer)
        peer = os.pidfd_open(worker)
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        poll.poll(_SMALL_AFTER_MS)  # what mounts needs the processor now
        if is_unmounted(fd):
            _end(state)
            os._exit(0)
        _supervise_anew(state, fd, peer, columns)
    finally:
        os._exit(1)


def _supervise_anew(state: str, fd: int, peer: int, columns: int) -> None:
    """Run the supervisor's program, as it is installed now, in this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is somebody to handle them
    for one in (fd, peer, columns):
        if one >= 0:
            os.set_inheritable(one, True)
    os.execv(sys.executable, _command("supervisor", state, fd, peer, columns))


def _first_work(state: str, fd: int, mine: int, columns: int, writer: int) -> None:
    from cafs.answer import tell

    def ready() -> None:
        os.write(writer, b"ok")
        os.close(writer)

    try:
        os.setsid()
        _work(state, fd, mine, columns, ready)
    except BaseException as error:  # the only way out of this process
        tell(writer, error)
    finally:
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    """Whoever waits for the end of a pipe or a lock of the caller's must not wait for us."""
    first = 3
    for one in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, one)
        first = one + 1


def _command(role: str, state: str, *fds: int) -> list[str]:
    return [sys.executable, "-P", "-m", "cafs.lazyd", role, state, *map(str, fds)]


def supervise(state: str, fd: int, peer: int, columns: int = -1) -> None:
    """Keep a worker alive until the file system is unmounted, then remove STATE."""
    inherited = held(state)
    note_pid(state, PID_FILE)
    for one in inherited:
        os.close(one)
    mine = os.pidfd_open(os.getpid())
    signals = _on_signal()
    wait_s = 0.0
    while not is_unmounted(fd):
        started = time.monotonic()
        if peer < 0:
            peer = os.pidfd_open(start("worker", state, fd, mine, columns).pid)
        if _ends(peer, signals, lambda: unmount(state)):
            _supervise_anew(state, fd, peer, columns)
        os.close(peer)
        peer = -1
        _reap()
        wait_s = min(wait_s * 2 + 0.05, _WAIT_MAX_S) if time.monotonic() - started < _SOON_S else 0.0
        time.sleep(wait_s)  # one that dies at once is not started over and over
    if peer >= 0:  # it was unmounted before we looked: the worker still writes down that it has let go
        _ends(peer, signals, lambda: None)
    _end(state)


def _end(state: str) -> None:
    """Nothing is mounted any more: remove what told of it."""
    try:
        notes = read_config(state).get("notes")
        if notes and json.loads(atomic.read_file(notes, 1 << 16)).get("state") == state:
            atomic.unlink_quietly(notes)
    except (OSError, ValueError):
        pass  # they are gone already
    remove_state(state)


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


def _ends(pidfd: int, signals: int, unmount: Callable[[], None]) -> bool:
    """Wait until a process ends (False) or SIGHUP has come and it was told to end (True)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(signals, select.POLLIN)
    while True:
        if pidfd in dict(poll.poll()):
            return False
        for number in os.read(signals, 64):
            if number == signal.SIGHUP:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                return True
            if number in (signal.SIGINT, signal.SIGTERM):
                unmount()


def _work(state: str, fd: int, peer: int, columns: int = -1, ready: Callable[[], None] = lambda: None) -> None:
    from cafs.worker import work

    watch(peer, lambda: _revive(state, fd, columns))  # also if what follows fails: somebody has to answer
    work(state, fd, columns, ready)


def _revive(state: str, fd: int, columns: int) -> subprocess.Popen[bytes]:
    mine = os.pidfd_open(os.getpid())
    try:
        return start("supervisor", state, fd, mine, columns)
    finally:
        os.close(mine)


def watch(peer: int, revive: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Start another supervisor whenever one dies, from a thread."""

    def run() -> None:
        pidfd = peer
        while True:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
            os.close(pidfd)
            child = revive()
            pidfd = os.pidfd_open(child.pid)
            time.sleep(0.05)

    threading.Thread(target=run, daemon=True).start()


def _complain(state: str, error: Exception) -> None:
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


def _main(role: str, state: str, fd: int, peer: int, columns: int) -> None:
    try:
        if role == "supervisor":
            supervise(state, fd, peer, columns)
        else:
            _work(state, fd, peer, columns)
    except Exception as error:
        _complain(state, error)
        if role == "worker":
            _stand_in(fd)
    finally:
        os._exit(0)  # not waiting for threads that wait for a store


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
