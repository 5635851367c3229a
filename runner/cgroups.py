"""Cgroups of a container, v1, v2 or both: limits for the runtime, and what can be read while they are there.

Sources: Documentation/admin-guide/cgroup-v1/, cgroup-v2.rst; config-linux.md of the OCI runtime specification.
"""

from __future__ import annotations

import os
import re
import signal
import time

from cafs import linux
from cafs.errors import UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container

_TOP = "/sys/fs/cgroup"
_PARENT = "/cafs"
_KILL_WAIT_S = 5
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_PERIOD_US = 100_000
_NEEDS = {
    "memory": ("memory", "memory-swap", "memory-reservation"),
    "cpu": ("cpus", "cpu-shares", "cpu-period", "cpu-quota"),
    "cpuset": ("cpuset-cpus", "cpuset-mems"),
    "pids": ("pids-limit",),
}


def path_for(options: Options | Container, container: str) -> str:
    """cgroupsPath of the runtime's configuration.  Raises UsageError."""
    parent = os.path.normpath("/" + (options.value("cgroup-parent") or _PARENT))
    if ".." in parent.split("/") or "\0" in parent:
        raise UsageError(f"{quote(parent)} is not the path of a cgroup")
    return os.path.join(parent, container)


def directories(cgroup: str) -> list[str]:
    """Where a cgroup is, in every hierarchy that has it."""
    places = [_TOP + cgroup, *(f"{_TOP}/{name}{cgroup}" for name in _hierarchies())]
    return [path for path in places if os.path.isdir(path)]


def _hierarchies() -> list[str]:
    return [] if is_v2() else sorted(name for name in os.listdir(_TOP) if not os.path.islink(f"{_TOP}/{name}"))


def is_v2() -> bool:
    """Whether there is one hierarchy for all controllers."""
    return os.path.exists(f"{_TOP}/cgroup.controllers")


def is_private(options: Options | Container) -> bool:
    """Whether a container sees its own cgroup as the top: where docker does, or as --cgroupns says.  Raises UsageError."""
    text = options.value("cgroupns") or ("private" if is_v2() and os.path.exists("/proc/self/ns/cgroup") else "host")
    if text not in ("private", "host"):
        raise UsageError(f"--cgroupns {quote(text)}", hint="private, or host")
    return text == "private"


def has_controller(name: str) -> bool:
    """Whether this host has a controller."""
    if is_v2():
        try:
            with open(f"{_TOP}/cgroup.controllers", encoding="ascii") as file:
                return name in file.read().split()
        except OSError:
            return False
    return os.path.isdir(f"{_TOP}/{name}")


def size(text: str) -> int:
    """Bytes of 512m, 1g, 1.5G, 1024.  Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([bkmgt]?)i?b?", text.lower())
    if not found:
        raise UsageError(f"{quote(text)} is not a size", hint="512m, 1g")
    return int(float(found[1]) * _UNITS[found[2]])


def resources(options: Options | Container) -> dict[str, Any]:
    """The limits that were asked for, as linux.resources.  Raises UsageError, UnsupportedError."""
    for controller, flags in _NEEDS.items():
        asked = [flag for flag in flags if options.value(flag) not in (None, "-1", "0")]
        if asked and linux.in_user_namespace():
            raise UnsupportedError(f"cannot set --{asked[0]} without root")
        if asked and not has_controller(controller):
            raise UnsupportedError(f"cannot set --{asked[0]}: this host has no {controller} controller of cgroups")
    found = {"memory": _memory(options), "cpu": _cpu(options)}
    limit = _number(options, "pids-limit")
    if limit is not None and limit > 0:
        found["pids"] = {"limit": limit}
    return {name: what for name, what in found.items() if what}


def _memory(options: Options | Container) -> dict[str, Any]:
    found: dict[str, Any] = {}
    limit, swap, low = (options.value(name) for name in ("memory", "memory-swap", "memory-reservation"))
    if limit is not None and size(limit):
        found["limit"] = size(limit)
        if found["limit"] < 6 << 20:
            raise UsageError("--memory must be at least 6m")
        if is_v2() or os.path.exists(f"{_TOP}/memory/memory.memsw.limit_in_bytes"):
            found["swap"] = 2 * found["limit"]
    if swap is not None and (swap == "-1" or size(swap)):
        if swap != "-1" and "limit" not in found:
            raise UsageError("--memory-swap needs --memory", hint="it is the sum of both")
        found["swap"] = -1 if swap == "-1" else size(swap)
        if 0 <= found["swap"] < found.get("limit", 0):
            raise UsageError("--memory-swap is less than --memory", hint="it is the sum of both")
    if low is not None and size(low):
        found["reservation"] = size(low)
    return found


def _cpu(options: Options | Container) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cpus = options.value("cpus")
    if cpus is not None:
        if not re.fullmatch(r"(?=.*[0-9])[0-9]{0,5}(\.[0-9]*)?", cpus) or (0 < float(cpus) < 0.01):
            raise UsageError(f"{quote(cpus)} is not a number of processors")
        if float(cpus) > (os.cpu_count() or 1):
            raise UsageError(f"--cpus {cpus} is more than this host has ({os.cpu_count()})")
        if options.value("cpu-quota") or options.value("cpu-period"):
            raise UsageError("--cpus goes without --cpu-quota and --cpu-period")
        if float(cpus):
            found = {"period": _PERIOD_US, "quota": int(float(cpus) * _PERIOD_US)}
    for flag, key in (("cpu-shares", "shares"), ("cpu-period", "period"), ("cpu-quota", "quota")):
        number = _number(options, flag)
        if number:
            found[key] = number
    for flag, key in (("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")):
        text = options.value(flag)
        if text:
            if not re.fullmatch("[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
                raise UsageError(f"{quote(text)} is not a list like 0-2,4")
            found[key] = text
    return found


def _number(options: Options | Container, flag: str) -> int | None:
    text = options.value(flag)
    if text is None:
        return None
    if not re.fullmatch("-?[0-9]{1,12}", text):
        raise UsageError(f"--{flag} is a number, not {quote(text)}")
    return int(text)


def is_frozen(container: Container) -> bool:
    """Whether it is paused."""
    if linux.in_user_namespace():
        from runner import pidspace

        return pidspace.is_stopped(container)
    return any(
        _read(path, "freezer.state") in ("FROZEN", "FREEZING") or _read(path, "cgroup.freeze") == "1" for path in _of(container)
    )


def freeze(container: Container, *, is_on: bool) -> None:
    """Let all its processes stand still, or go on.  Raises CafsError."""
    if linux.in_user_namespace() and not container.value("pid"):
        from runner import pidspace

        return pidspace.stop(container) if is_on else pidspace.go_on(container)
    for path in _of(container):
        for name, value in (("freezer.state", "FROZEN" if is_on else "THAWED"), ("cgroup.freeze", str(int(is_on)))):
            if os.path.exists(os.path.join(path, name)):
                with open(os.path.join(path, name), "w", encoding="ascii") as file:
                    file.write(value)
                return
    raise UnsupportedError("this host has no freezer of cgroups")


def oom_kills(cgroup: str) -> int | None:
    """How many of its processes the kernel has killed for want of memory; None if nobody counts, or it has gone.

    The kernel counts before it kills: once a process was reaped, the count has it.
    """
    for path in directories(cgroup):
        for name in ("memory.oom_control", "memory.events"):
            for line in _read(path, name).splitlines():
                word, _, count = line.partition(" ")
                if word == "oom_kill":
                    return int(count)
    return None


def usage(cgroup: str) -> dict[str, int]:
    """memory, memory_max, memory_limit (bytes), cpu_ns, pids; what cannot be read is not there."""
    found: dict[str, int] = {}
    names = {
        "memory": ("memory.usage_in_bytes", "memory.current"),
        "memory_max": ("memory.max_usage_in_bytes", "memory.peak"),
        "memory_limit": ("memory.limit_in_bytes", "memory.max"),
        "cpu_ns": ("cpuacct.usage",),
        "pids": ("pids.current",),
    }
    for path in directories(cgroup):
        for key, files in names.items():
            for text in (_read(path, name) for name in files):
                if text.isdigit():
                    found[key] = int(text)
        for line in _read(path, "cpu.stat").splitlines():
            if line.startswith("usage_usec "):
                found["cpu_ns"] = 1000 * int(line.split()[1])
    return found


def processes(cgroup: str) -> list[int]:
    """Pids of the host, in all its cgroups."""
    return sorted({int(pid) for path in directories(cgroup) for pid in _read(path, "cgroup.procs").split()})


def kill_processes(cgroup: str) -> None:
    """Send KILL to all that is in it."""
    for pid in processes(cgroup):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill(cgroup: str) -> None:
    """Kill all that is in it, and remove it."""
    for path in directories(cgroup):
        deadline = time.monotonic() + _KILL_WAIT_S
        while time.monotonic() < deadline:
            try:
                kill_processes(cgroup)
                if os.path.exists(os.path.join(path, "freezer.state")):
                    with open(os.path.join(path, "freezer.state"), "w", encoding="ascii") as file:
                        file.write("THAWED")
                os.rmdir(path)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.01)  # EBUSY: they are dying


def _of(container: Container) -> list[str]:
    return directories(path_for(container, container.id))


def _read(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
