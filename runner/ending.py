"""After process 1 has ended: what is read before the cgroup goes, what is given back, what is noted.  All may be done twice."""

from __future__ import annotations

import json
import os
import select
import time

from cafs import atomic, linux
from cafs.removing import remove_tree
from runner import alive, cgroups, cleanup, containers, create, holding, lower, starting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runner.containers import Container

_DELETE_TRIES = 20
_DYING_S = 2
_READ_S = 2
KILLED = 137


def take_down(container: Container, *, has_ended: bool) -> dict[str, Any]:
    """Kill what is left of it, and remove its cgroups, runtime state and mount; returns what state.json is to say of it.

    What it has written was read, or is not wanted.
    """
    holding.let_go(container)
    cgroup = cgroups.path_for(container, container.id)
    found: dict[str, Any] = {}
    kills, used = cgroups.oom_kills(cgroup), cgroups.usage(cgroup)
    if kills is not None or used:  # else this was done before, and noted
        found = {"oom_killed": bool(kills), "usage": used}
        _note_outcome(container, {"oom_kills": kills or 0, **used})
    elif container.state().get("started_ns") and _is_unnoted(container):  # it had no cgroup
        _note_outcome(container, {"oom_kills": 0})
    state = os.path.join(starting.runtime_root(), container.id)
    for _ in range(_DELETE_TRIES):
        if not os.path.exists(state):
            cgroups.kill(cgroup)  # somebody removed the state of a running container
            break
        if has_ended and cleanup.remove_state(state):
            break
        starting.spawn(starting.runc("delete", "--force", container.id), [], [])
    if container.is_on_bridge:
        from runner import connecting

        connecting.disconnect(container)
    if container.value("userns") == "auto":
        from runner import idmapping

        idmapping.give_back(container)
    for point in (container.rootfs, container.path("layers")):
        try:
            if point != container.rootfs:  # what is shared with the host would be unmounted there, too
                linux.mount("none", point, "none", linux.MS_REC | linux.MS_PRIVATE)
            linux.umount(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError:
            continue  # never mounted, or in another namespace that is gone
    return found


def _is_unnoted(container: Container) -> bool:
    try:
        return bool(container.asked.get("outcome")) and not os.path.getsize(container.asked["outcome"])
    except OSError:
        return False


def _note_outcome(container: Container, found: dict[str, int]) -> None:
    """--outcome; before the cgroups go: whoever finds them gone finds it.  In its place: some have it open."""
    if container.asked.get("outcome"):
        try:
            atomic.overwrite(container.asked["outcome"], json.dumps(found).encode() + b"\n")
        except OSError:
            pass  # whoever wanted it has removed it


def settle(container: Container, code: int | None, *, error: str = "", **more: Any) -> None:
    """Note that it has ended, and with what; None: nobody knows.  With --rm, or if nobody wants its files, remove it."""
    if container.has("rm") or (error and container.asked.get("is_volatile")):
        containers.event(container, "die", exit_code=code)
        create.discard(container)
        containers.event(container, "destroy")
        return
    remove_tree(container.path("work"))
    os.makedirs(container.path("work"), exist_ok=True)
    for name in ("stdin", "stdout", "stderr", "taking", "attach", "console", "pid"):
        atomic.unlink_quietly(container.path(name))
    container.note(status=containers.EXITED, exit_code=code, finished_ns=time.time_ns(), error=error, restarting=False, **more)
    containers.event(container, "die", exit_code=code)


def release(container: Container, *, is_sudden: bool = False) -> None:
    """Give back the mount of its image, and let nobody watch it any more; in the host's mount namespace."""
    # A killed crun may not have given up its own hold yet: its pipe is closed before the last of its files is.
    lower.release(starting.lower_key(container), _DYING_S if is_sudden else 0)
    alive.forget(container.id)


def _is_unread(container: Container, state: dict[str, Any]) -> bool:
    """Whether it has ended, and what it has written may still be in its pipes."""
    return state["status"] == containers.RUNNING and holding.is_held(container)


def discard_unfinished(identity: str, lock: int) -> None:
    """Remove what there is of a container whose making, or removal, was cut off."""
    container = containers.Container(identity, {"flags": {}, "mounts": [], "digest": ""}, lock)
    cgroups.kill(cgroups.path_for(container, identity))
    create.discard(container)


def tidy() -> None:
    """See to containers whose watchers were killed: those in the background go on, all others are ended."""
    for identity, lock in alive.abandoned():
        container = containers.load(identity)
        if container is None:
            discard_unfinished(identity, lock)
            continue
        container.lock = lock
        state = container.state()
        pidfd = containers.open_process(state)
        if pidfd is not None:
            os.close(pidfd)
        if not container.asked["foreground"] and (pidfd is not None or _is_unread(container, state)):
            from runner import launching

            ready = launching.succeed(container)
            deadline = time.monotonic() + (_READ_S if pidfd is None else 0)
            select.select([ready], [], [], _READ_S)  # so that `logs` finds what was unread
            os.close(ready)
            while alive.is_watched(identity) and time.monotonic() < deadline:
                time.sleep(0.01)  # it has only to read what is left
            continue
        is_new = state["status"] == containers.CREATED and not container.asked["foreground"] and not container.has("detach")
        is_over = state["status"] == containers.EXITED and not container.has("rm")
        # One that is to be started some time, or has ended: a start may have been cut off after the runtime's.
        more = take_down(container, has_ended=pidfd is None and not (is_new or is_over))
        if not (is_new or is_over):
            settle(container, KILLED if pidfd is not None else None, error="its watcher was killed", **more)
        release(container)
        if container.lock >= 0:
            os.close(container.lock)
            container.lock = -1
