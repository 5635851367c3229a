"""Starting a container that goes on without us: a process of its own starts it and then becomes its monitor, by execve(2).

So the monitor is small, and still the parent of process 1 (PR_SET_CHILD_SUBREAPER survives execve(2)).  For a restart the
monitor becomes this program again.

usage: python -m runner.launching again ID LOCK_FD HOST_NAMESPACE_FD
"""

from __future__ import annotations

import os
import sys
import time

from cafs import linux
from cafs.answer import failure, receive, tell
from cafs.errors import CafsError
from runner import containers, ending, holding, starting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container


def launch(container: Container) -> None:
    """Start it, and return when its command runs; its lock is the monitor's then.  Raises CafsError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        os.close(reader)
        _become_another(container, writer)
    os.close(writer)
    os.close(container.lock)
    container.lock = -1
    answer = receive(reader)
    if answer == b"ok":
        return
    os.waitpid(child, 0)
    raise failure(answer, CafsError("its monitor was killed"))


def _become_another(container: Container, writer: int) -> None:
    """In the child.  Never returns."""
    try:
        linux.leave_session()
        host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        _start(container, host, writer)
    except BaseException as error:  # the only way out of this process
        tell(writer, error)
    finally:
        os._exit(1)


def _start(container: Container, host: int, writer: int) -> None:
    """Start it and become its monitor; if it cannot be started, note that, and raise."""
    low = None
    try:
        low = starting.get_lower(container)
        uid = starting.prepare(container, low)
        descriptors = _run(container, uid)
    except BaseException as error:
        more = ending.take_down(container, has_ended=False)
        linux.setns(host, linux.CLONE_NEWNS)
        if low:
            low.let_go()
        ending.settle(container, starting.code_of(error), error=str(error), **more)
        ending.release(container)
        raise
    containers.event(container, "start")
    os.write(writer, b"ok") if writer >= 0 else None
    become_monitor(container, {**descriptors, "host": host, "lower": low.lock})


def _run(container: Container, uid: int) -> dict[str, int]:
    """Run runc; returns the descriptors that the monitor needs: of process 1, and of our ends of its standard streams."""
    from runner import stdio

    has_terminal = container.has("tty")
    console = stdio.Console(container.directory) if has_terminal else None
    pipes = None if console else stdio.Fifos(container.directory, container.has("interactive"), uid)
    pid = starting.start(container, pipes, console.directory if console else -1)
    found = pipes.ours if pipes else {}
    if console:
        found = {"terminal": console.receive()}
    restarts = container.state().get("restarts", 0)
    container.note(
        status=containers.RUNNING, started_ns=time.time_ns(), exit_code=None, restarts=restarts, restarting=False,
        health="starting" if container.asked["health"] else "", **containers.identify(pid),
    )  # fmt: skip
    holding.hold(container, found)
    return found | {"process": os.pidfd_open(pid)}


def become_monitor(container: Container, descriptors: dict[str, int]) -> None:
    """Run the monitor's program in this process."""
    descriptors = {"lock": container.lock} | {name: fd for name, fd in descriptors.items() if fd >= 0}
    for fd in descriptors.values():
        os.set_inheritable(fd, True)
    words = [f"{name}={fd}" for name, fd in descriptors.items()]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "runner.monitor", container.id, *words])


def succeed(container: Container) -> int:
    """Start another monitor for a container that runs, or has ended with something unread: the one it had was killed.

    Returns a descriptor to read from, which is at its end once what nobody had read is in the log.
    """
    from runner import stdio

    reader, ready = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(ready)
        os.close(container.lock)
        container.lock = -1
        os.waitpid(child, 0)
        return reader
    try:
        os.close(reader)
        if os.fork():
            os._exit(0)
        linux.leave_session()
        pidfd = containers.open_process(container.state())
        process = -1 if pidfd is None else pidfd
        descriptors = stdio.reopen(container.directory) | holding.recover(container) | {"process": process}
        host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        linux.become_subreaper()
        become_monitor(container, descriptors | {"host": host, "ready": ready})
    finally:
        os._exit(1)


def main(identity: str, lock: int, host: int) -> None:
    """Start it again: the monitor's program has become this one."""
    linux.setns(host, linux.CLONE_NEWNS)
    container = containers.load(identity)
    if container is None:
        return
    for fd in (lock, host):
        os.set_inheritable(fd, False)
    container.lock = lock
    if os.path.exists(container.path("stopped")):
        container.note(restarting=False)
        ending.release(container)
        return
    container.note(restarts=container.state().get("restarts", 0) + 1)
    _start(container, host, -1)


if __name__ == "__main__":
    try:
        main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    finally:
        os._exit(1)
