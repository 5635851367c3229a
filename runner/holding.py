"""A process that only waits, and has a background container's pipes or terminal open: a killed monitor then loses nothing.

It keeps sockets on the published ports, too.

Pipes keep what was written to them, also by a container that has ended, as long as somebody has them open; the terminal goes to
the next monitor by pidfd_getfd(2).
"""

from __future__ import annotations

import os
import select
import signal

from cafs import linux, paths
from runner import alive, containers, programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runner.containers import Container

_DYING_S = 2
_FIRST = 9
"""Its descriptors come after that."""


def hold(container: Container, fds: dict[str, int]) -> None:
    """Start one for a container that has just been started, and note it.  fds: stdout, stderr, terminal."""
    let_go(container)
    program = programs.find("sleep", "/bin", "/usr/bin")
    wanted = {name: fd for name, fd in fds.items() if name in ("stdout", "stderr", "terminal")}
    wanted |= {f"port{number}": fd for number, fd in enumerate(container.ports)}
    if program is None or not wanted:
        return
    first = max(_FIRST, *wanted.values()) + 1  # none of them is overwritten before it was copied
    places = {name: first + number for number, name in enumerate(sorted(wanted))}
    actions = [(os.POSIX_SPAWN_DUP2, wanted[name], place) for name, place in places.items()]
    pid = os.posix_spawn(program, [_name(container.id), "infinity"], _environment(), file_actions=actions)
    container.note(holder={**containers.identify(pid), **places})


def _name(container: str) -> str:
    return f"cafs-holder {container}"


def _environment() -> dict[str, str]:
    """By which those of this state directory are known."""
    return {"CAFS_STATE": paths.state()}


def free_stale() -> None:
    """End those that no container has: who started them was killed before it could note that, or their container is gone."""
    ours = b"CAFS_STATE=" + os.fsencode(paths.state()) + b"\0"
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            name = containers.read_proc(pid, "cmdline").partition(b"\0")[0].decode()
            identity = name.removeprefix(_name(""))
            if identity == name or containers.read_proc(pid, "environ") != ours or alive.is_watched(identity):
                continue
            one = containers.load(identity)
            if one is None or (one.state().get("holder") or {}).get("pid") != pid:
                os.kill(pid, signal.SIGKILL)
        except (OSError, UnicodeDecodeError):
            continue


def _pidfd(container: Container) -> int | None:
    """Of the process, None if it does not live."""
    return containers.open_process(container.state().get("holder") or {})


def is_held(container: Container) -> bool:
    """Whether there may be something left that nobody has read."""
    pidfd = _pidfd(container)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def recover(container: Container) -> dict[str, int]:
    """The terminal, by its name, if one is held."""
    place = (container.state().get("holder") or {}).get("terminal")
    pidfd = _pidfd(container)
    if pidfd is None:
        return {}
    try:
        return {"terminal": linux.pidfd_getfd(pidfd, place)} if isinstance(place, int) else {}
    except OSError:
        return {}
    finally:
        os.close(pidfd)


def let_go(container: Container) -> None:
    """End it."""
    pidfd = _pidfd(container)
    if pidfd is not None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], _DYING_S)  # its ports are free then
        os.close(pidfd)
