"""Leave the cgroups of whoever made a mount: the servers serve others too, and must not end or be limited with it.

systemd kills what is left in the cgroup of a service that it stops, and a service's memory limit would count ours.  With
systemd a transient scope takes the servers (org.freedesktop.systemd1, StartTransientUnit); else a cgroup of our own, in each
hierarchy where one can be made; else the root of the hierarchy.
"""

from __future__ import annotations

import os

_TOP = "/sys/fs/cgroup"
_NAME = "cafs-mounts"
_SYSTEMD = "/run/systemd/system"


def leave_cgroups(pids: list[int]) -> None:
    """Move processes out of the cgroups that they inherited, where this user may; what cannot be moved stays."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split(":", 2) for line in file.read().splitlines()]
    except OSError:
        return
    inherited = [(controllers, path) for _, controllers, path in lines if path != "/" and not path.endswith(f"/{_NAME}")]
    if not inherited or (os.path.isdir(_SYSTEMD) and _make_scope(pids)):
        return
    for controllers, _ in inherited:
        top = os.path.join(_TOP, controllers.removeprefix("name=") or ("unified" if os.path.isdir(f"{_TOP}/unified") else ""))
        _move(os.path.join(top, _NAME), pids) or _move(top, pids)


def _make_scope(pids: list[int]) -> bool:
    """Ask systemd, or the user's, for a scope with these processes.  False if it does not make one."""
    name = f"{_NAME}-{os.getpid()}-{os.urandom(4).hex()}.scope"
    whose = ["--user"] if os.geteuid() else []
    target = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "StartTransientUnit"]
    properties = ["2", "PIDs", "au", str(len(pids)), *map(str, pids), "CollectMode", "s", "inactive-or-failed"]
    command = ["busctl", *whose, "--quiet", "call", *target, "ssa(sv)a(sa(sv))", name, "fail", *properties, "0"]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, one) for one in (0, 1, 2)]
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
        return os.waitpid(child, 0)[1] == 0
    except OSError:
        return False  # no busctl
    finally:
        os.close(null)


def _move(cgroup: str, pids: list[int]) -> bool:
    """Put processes into a cgroup, made if there is none.  False if it cannot take them, as a cpuset without processors."""
    try:
        os.makedirs(cgroup, exist_ok=True)
        for pid in pids:
            with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as file:
                file.write(str(pid))
    except ProcessLookupError:
        return True  # it ended; its successor is forked from one that has moved
    except OSError:
        return False
    return True
