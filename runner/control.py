"""What is done to containers: start, stop, kill, wait, pause, rename, remove.  Each sees first to what was abandoned."""

from __future__ import annotations

import os
import select
import signal
import time

from cafs import atomic
from cafs.errors import BusyError, quote
from runner import alive, cgroups, containers, create, ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_SETTLE_S = 30.0
_POLL_S = 0.01
_POLL_MAX_S = 2_000_000.0


def hold(container: Container) -> int | None:
    """The lock of one that does not run, once nobody has it: it may be ending just now; None if it runs.  Raises BusyError."""
    deadline = time.monotonic() + _SETTLE_S
    while not container.is_running():
        lock = alive.hold(container.id)
        if lock is not None:
            return lock
        if time.monotonic() > deadline:
            raise BusyError(f"container {quote(container.name)} is neither running nor at rest", hint="try again later")
        time.sleep(_POLL_S)
    return None


def start(container: Container) -> None:
    """Start one that does not run, in the background.  Raises CafsError."""
    if container.status() == "restarting" and not os.path.exists(container.path("stopped")):
        return  # its monitor is about to
    lock = hold(container)
    if lock is None:
        return
    container.lock = lock
    atomic.unlink_quietly(container.path("stopped"))
    if container.asked["foreground"]:
        container.asked["foreground"] = False  # from now on it lives without its crun
        container.save()
    from runner import launching

    launching.launch(container)


def stop(container: Container, seconds: int | None, text: str | None = None) -> None:
    """Ask it to end, kill it after a while, and wait until all of it is given back.  Raises CafsError."""
    number = containers.signal_number(text) if text else int(container.asked["stop_signal"])
    wait_s = container.asked["stop_timeout_s"] if seconds is None else seconds
    try:
        with open(container.path("stopped"), "wb"):
            pass  # not to be started again by its monitor
    except FileNotFoundError:
        return  # it has ended just now, and was removed then
    deadline = time.monotonic() + _SETTLE_S
    while (fd := container.pidfd()) is not None or alive.is_watched(container.id):
        if fd is None:
            if time.monotonic() > deadline:
                raise BusyError(f"container {quote(container.name)} does not end")
            time.sleep(_POLL_S)  # it is being started, or all of it is given back just now
            continue
        try:
            _send(container, fd, number)
            if not _has_ended(fd, wait_s if wait_s >= 0 else None):
                _send(container, fd, signal.SIGKILL)
                _has_ended(fd, _SETTLE_S)
        finally:
            os.close(fd)
        deadline = time.monotonic() + _SETTLE_S
        if not alive.is_watched(container.id):
            break
    ending.tidy()
    containers.event(container, "stop")


def _settled(container: Container) -> None:
    """Wait until all of one that has ended is given back."""
    deadline = time.monotonic() + _SETTLE_S
    while alive.is_watched(container.id) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _has_ended(pidfd: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else int(min(seconds, _POLL_MAX_S) * 1000)))


def _send(container: Container, pidfd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
        if cgroups.is_frozen(container) and number == signal.SIGKILL:
            cgroups.freeze(container, is_on=False)
    except ProcessLookupError:
        pass


def kill(container: Container, text: str) -> None:
    """Send a signal to its process 1.  Raises CafsError, UsageError."""
    number = containers.signal_number(text)
    fd = container.process()
    try:
        if number in (signal.SIGKILL, container.asked["stop_signal"]):
            with open(container.path("stopped"), "wb"):
                pass
        _send(container, fd, number)
        if number == signal.SIGKILL:
            _has_ended(fd, _SETTLE_S)
    finally:
        os.close(fd)
    containers.event(container, "kill", signal=number)
    if number == signal.SIGKILL:
        _settled(container)


def wait(container: Container) -> str:
    """Its exit code once it has ended; 'unknown' if nobody saw it."""
    before = container.state().get("exit_code")
    while True:
        fd = container.pidfd()
        if fd is not None:
            try:
                _has_ended(fd, None)
            finally:
                os.close(fd)
        if not os.path.exists(container.path("container.json")):
            return str(_last_code(container, before))
        state = container.state()
        if not alive.is_watched(container.id):
            if state["status"] != containers.RUNNING:
                code = state.get("exit_code")
                return "unknown" if code is None and state["status"] == containers.EXITED else str(code or 0)
            ending.tidy()
        time.sleep(_POLL_S)


def _last_code(container: Container, before: object) -> object:
    """Of one that was removed when it ended: the events say."""
    import json

    try:
        for line in reversed(atomic.read_file(containers.events_path(), 1 << 26).splitlines()):
            row = json.loads(line)
            if row["id"] == container.id and row["event"] == "die":
                return "unknown" if row["exit_code"] is None else row["exit_code"]
    except (OSError, ValueError, KeyError):
        pass
    return "unknown" if before is None else before


def remove(container: Container, *, force: bool, with_volumes: bool) -> None:
    """Remove it, with its anonymous volumes if asked.  Raises CafsError."""
    if container.is_running() or alive.is_watched(container.id):
        if not force:
            raise BusyError(f"container {quote(container.name)} runs", hint=f"crun stop {container.name}, or rm -f")
        stop(container, 0, "KILL")
        if not os.path.exists(container.path("container.json")):
            return  # it was to be removed at its end
    lock = hold(container)
    if lock is None:
        raise BusyError(f"container {quote(container.name)} was started again", hint=f"crun stop {container.name}, or rm -f")
    container.lock = lock
    ending.take_down(container, has_ended=False)
    if not with_volumes:
        for one in container.asked["mounts"]:
            one.pop("anonymous", None)
    create.discard(container)
    containers.event(container, "destroy")


def pause(container: Container, *, is_on: bool) -> None:
    """Raises CafsError."""
    os.close(container.process())
    cgroups.freeze(container, is_on=is_on)
    containers.event(container, "pause" if is_on else "unpause")


def rename(container: Container, name: str) -> None:
    """Raises UsageError, BusyError."""
    old = container.name
    container.asked["name"] = containers.take_name(name, container.id)
    container.save()
    containers.drop_name(old, container.id)
    containers.event(container, "rename", old_name=old)
