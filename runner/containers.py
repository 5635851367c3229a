"""Containers on disk, state/containers/ID: what was asked for, what became of it, and what it is called.  cafs-container(5).

container.json is written once (and when it is renamed); state.json only by who watches the container (alive.py).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time

from cafs import atomic, linux, paths
from cafs.errors import BusyError, CafsError, NotFound, UsageError, quote
from cafs.lease import boot_id
from runner import alive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cafs.options import Options

CREATED, RUNNING, EXITED = "created", "running", "exited"
BRIDGE = "bridge"
_LEFT = "amber bold brisk calm clear cosy crisp eager fair fleet fond gentle glad keen lucid mild neat quick quiet wise"
_RIGHT = "alder aspen birch cedar elm fern finch heron ibis larch linden lynx marten otter plover robin rowan tern wren yew"
_JSON_MAX = 1 << 24


class Container:
    """One container.  asked: container.json.  lock: descriptor by which we watch it, -1 if we do not.

    ports: sockets of ours on the ports of the host that are published: no program of the host takes one and gets nothing.
    """

    __slots__ = ("asked", "directory", "id", "lock", "ports")

    def __init__(self, identity: str, asked: dict[str, Any], lock: int = -1) -> None:
        self.id = identity
        self.directory = os.path.join(root(), identity)
        self.asked = asked
        self.lock = lock
        self.ports: list[int] = []

    @property
    def name(self) -> str:
        return str(self.asked["name"])

    @property
    def network(self) -> str:
        """none, host, container:X, or the name of a network."""
        return network_of(self)

    @property
    def is_on_bridge(self) -> bool:
        """Whether it is on a network of ours."""
        return is_bridge(self.network)

    @property
    def rootfs(self) -> str:
        """Where its root is mounted, in the mount namespace of who starts it."""
        if self.value("userns") == "auto":
            from runner.idmapping import ROOT

            return ROOT
        return self.path("rootfs")

    def path(self, name: str) -> str:
        """Of a file or directory of its own."""
        return os.path.join(self.directory, name)

    def all(self, name: str) -> list[str]:
        """Every value of a flag that it was made with."""
        return list(self.asked["flags"].get(name, []))

    def value(self, name: str) -> str | None:
        """The last value of a flag that it was made with."""
        found = self.all(name)
        return found[-1] if found else None

    def has(self, name: str) -> bool:
        """Whether it was made with a switch."""
        return (self.value(name) or "false") != "false"

    def state(self) -> dict[str, Any]:
        """state.json; of a container whose watcher was killed it may be out of date."""
        try:
            found = json.loads(atomic.read_file(self.path("state.json"), _JSON_MAX))
        except (OSError, ValueError):
            found = {}
        return found if isinstance(found, dict) and "status" in found else {"status": CREATED}

    def note(self, **changes: object) -> dict[str, Any]:
        """Change state.json; only its watcher does."""
        found = self.state() | changes
        data = json.dumps(found, sort_keys=True).encode()
        try:
            atomic.replace_hint(self.path("state.json"), data, 0o600)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            atomic.overwrite(self.path("state.json"), data)  # which needs no room: it may be what this container has used up
        return found

    def save(self, *, is_durable: bool = True) -> None:
        """Write container.json.  is_durable: so that it outlives a crash of the machine."""
        data = json.dumps(self.asked, sort_keys=True).encode("utf-8", "surrogateescape")
        write = atomic.replace_file if is_durable else atomic.replace_hint
        write(self.path("container.json"), data, 0o600)

    def pidfd(self) -> int | None:
        """A descriptor of its process 1, None if it does not run (any more)."""
        return open_process(self.state())

    def process(self) -> int:
        """The same; raises CafsError if it does not run."""
        fd = self.pidfd()
        if fd is None:
            raise CafsError(f"container {quote(self.name)} does not run", hint=f"crun start {self.name}")
        return fd

    def is_running(self) -> bool:
        """Whether its process 1 lives."""
        fd = self.pidfd()
        if fd is not None:
            os.close(fd)
        return fd is not None

    def status(self) -> str:
        """created, running, paused, restarting, exited, as docker says it."""
        found = self.state()
        if found["status"] != RUNNING:
            return "restarting" if found.get("restarting") and alive.is_watched(self.id) else str(found["status"])
        fd = open_process(found)
        if fd is None:
            return EXITED
        os.close(fd)
        from runner import cgroups

        return "paused" if cgroups.is_frozen(self) else RUNNING


def network_of(options: Options | Container) -> str:
    """What --network means."""
    return options.value("network") or ("none" if linux.in_user_namespace() else BRIDGE)


def is_bridge(network: str) -> bool:
    """Whether that is a network of ours, and not one of somebody else."""
    return network not in ("none", "host") and not network.startswith("container:")


def root() -> str:
    """Where containers are kept."""
    return os.path.join(paths.state(), "containers")


def load(identity: str) -> Container | None:
    """A container by its whole id; None if it is not there, or was never made completely."""
    try:
        asked = json.loads(atomic.read_file(os.path.join(root(), identity, "container.json"), _JSON_MAX))
        return Container(identity, asked) if asked["name"] and isinstance(asked["flags"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def every() -> list[Container]:
    """All containers, the newest first."""
    found = [one for one in map(load, paths.listed(root())) if one]
    return sorted(found, key=lambda one: (-int(one.asked["created_ns"]), one.id))


def find(text: str) -> Container:
    """By name, or by how its id begins.  Raises NotFound, UsageError."""
    try:
        named = load(os.readlink(_name_path(text))) if is_name(text) else None
    except OSError:
        named = None
    if named:
        return named
    ids = [one for one in paths.listed(root()) if text and one.startswith(text)]
    if len(ids) > 1 and text not in ids:
        raise UsageError(f"{quote(text)} is the beginning of {len(ids)} containers' ids")
    found = load(ids[0]) if ids else None
    if found is None:
        raise NotFound(f"no container {quote(text)}", hint="crun ps -a")
    return found


def is_name(text: str, *, least: int = 2, most: int = 128) -> bool:
    """Whether a container may be called so; with other lengths, a volume or a network."""
    is_plain = text.isascii() and all(c.isalnum() or c in "_.-" for c in text)
    return is_plain and text[:1].isalnum() and least <= len(text) <= most


def take_name(name: str | None, identity: str) -> str:
    """Give a container a name, one that is free if none is asked for.  Raises UsageError, BusyError."""
    if name is not None and not is_name(name):
        raise UsageError(f"{quote(name)} is not a container name", hint="letters, digits, _ . and -, at least two")
    paths.make_private(os.path.dirname(_name_path("x")))
    for again in range(100):
        number = int.from_bytes(os.urandom(4), "big")
        chosen = name or f"{_LEFT.split()[number % 20]}_{_RIGHT.split()[number // 20 % 20]}" + (
            str(number // 400 % 1000) if again > 3 else ""
        )
        with alive.changing() as directory:
            try:
                os.symlink(identity, _name_path(chosen))
                return chosen
            except FileExistsError:
                pass
            holder = os.readlink(_name_path(chosen))
            if not os.path.isdir(os.path.join(root(), holder)) and not os.path.lexists(f"/proc/self/fd/{directory}/{holder}"):
                os.unlink(_name_path(chosen))
                os.symlink(identity, _name_path(chosen))
                return chosen
        if name is not None:
            raise BusyError(f"the name {quote(name)} is in use by container {holder[:12]}", hint=f"crun rm {name}")
    raise CafsError("no name is free")


def drop_name(name: str | None, identity: str) -> None:
    """Take a name away, if it is still this container's; without one, whatever name it has."""
    with alive.changing():
        for one in paths.listed(os.path.dirname(_name_path("x"))) if name is None else [name]:
            try:
                if os.readlink(_name_path(one)) == identity:
                    os.unlink(_name_path(one))
            except OSError:
                continue


def _name_path(name: str) -> str:
    return os.path.join(paths.state(), "names", name)


def identify(pid: int) -> dict[str, Any]:
    """What has to be the same for a pid to mean the same process."""
    return {"pid": pid, "pid_start": start_time(pid), "boot_id": boot_id()}


def start_time(pid: int) -> int:
    """When a process started, in ticks since boot (proc_pid_stat(5), field 22); -1 if it is gone, or a zombie."""
    try:
        fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    except OSError:
        return -1
    return int(fields[19]) if fields[0] not in (b"Z", b"X") else -1


def read_proc(pid: int, name: str) -> bytes:
    """A file of proc(5) about a process.  Raises OSError."""
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read(1 << 16)


def open_process(state: dict[str, Any]) -> int | None:
    """A pidfd of the process that a state names, None if that has ended: the pid may be another's by now."""
    pid, started = state.get("pid", 0), state.get("pid_start", -1)
    if not pid or state.get("boot_id") != boot_id():
        return None
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    if started < 0 or start_time(pid) != started:
        os.close(fd)
        return None
    return fd


def signal_number(text: str) -> int:
    """9, KILL or SIGKILL.  Raises UsageError."""
    name = text.upper().removeprefix("SIG")
    if name.isdigit() and 0 < int(name) <= signal.SIGRTMAX:
        return int(name)
    if name.startswith(("RTMIN+", "RTMAX-")) and name[6:].isdigit():
        number = signal.SIGRTMIN + int(name[6:]) if name[3:5] == "IN" else signal.SIGRTMAX - int(name[6:])
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise UsageError(f"unknown signal {quote(text)}") from None


def event(container: Container, what: str, **more: object) -> None:
    """Note that something has happened; for crun events."""
    row = {"time_ns": time.time_ns(), "event": what, "id": container.id, "name": container.name}
    row |= {"image": container.asked["image"], **more}
    try:
        fd = os.open(events_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(row, sort_keys=True).encode() + b"\n")
            if os.fstat(fd).st_size > 1 << 24:
                os.rename(events_path(), events_path() + ".1")
        finally:
            os.close(fd)
    except OSError:
        pass  # what is not noted has happened all the same


def events_path() -> str:
    """One JSON object a line; the older half is beside it, .1."""
    return os.path.join(paths.state(), "events")
