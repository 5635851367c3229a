"""An instance that is a fork of another's process: who asks for it, puts it into its own cgroups, and lives as long as it does.

Part of the agent's program: standard library only, Python 3.9.  It is forked from the agent, as a Python that is started for it
would take longer than all of the rest.  cpool-function(7), ZYGOTES.
"""

from __future__ import annotations

import os
import select
import signal
import sys

from pool import calls, cgroup, sockets
from pool.hosted import OUTCOME, PLACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_WAIT_S = 10.0


def make_cgroups(directory: str, asked: dict[str, Any]) -> None:
    """Where they may be made; what they are is noted in ASKED."""
    agent = os.path.basename(os.path.dirname(os.path.dirname(directory)))
    name = f"{agent}/{os.path.basename(directory)}"
    asked["cgroup"] = cgroup.make(name, int(asked["memory"]))
    asked["cgroup_cpu"] = cgroup.make_for_cpus(name, float(asked["cpus"]))


def start(directory: str, asked: dict[str, Any], instead: Callable[[], Any]) -> int:
    """The process that looks after it.  instead: become what starts a container, if there can be no fork.  Raises OSError."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        out, err = (os.open(os.path.join(directory, name), flags, 0o600) for name in ("out", "err"))
        for fd, to in ((null, 0), (out, 1), (err, 2)):
            os.dup2(fd, to)
        os.closerange(3, 4096)
        _look_after(directory, asked, instead)
    except BaseException as error:
        print(f"cpool-agent: {error!r}", file=sys.stderr, flush=True)
        os._exit(125)
    finally:
        os._exit(0)


def _look_after(directory: str, asked: dict[str, Any], instead: Callable[[], Any]) -> None:
    agent = os.path.dirname(os.path.dirname(directory))
    kills = cgroup.counter(asked["cgroup"])
    pid = _ask(os.path.join(agent, PLACE), asked["zygote_of"], os.path.basename(directory), kills)
    if not pid:
        _note_no_zygote(directory)
        instead()
    told, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)
    for place in (asked["cgroup"], asked["cgroup_cpu"]):
        if place:
            cgroup.put(place, pid)
    fd = os.pidfd_open(pid)
    while fd not in select.select([fd, told], [], [])[0]:
        os.read(told, 64)
        _send(pid, signal.SIGTERM)
    cgroup.note_kills(kills, os.path.join(directory, OUTCOME))
    with open(os.path.join(directory, "status"), "r+", encoding="ascii") as file:
        file.write("0  \n")


def _note_no_zygote(directory: str) -> None:
    """It is in a container of its own."""
    import json

    path = os.path.join(directory, "about.json")
    with open(path, encoding="utf-8") as file:
        about = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**about, "zygote_of": ""}, file)


def _ask(place: str, zygote: str, job: str, kills: str) -> int:
    """The host's number of the process that was forked, 0 if it cannot be.  kills: what counts in the cgroup that it gets."""
    try:
        with sockets.connect(place) as connection:
            connection.settimeout(_WAIT_S)
            connection.sendall(calls.control("fork", zygote=zygote, job=job, kills=kills))
            reader = calls.Reader()
            while data := connection.recv(4096):
                for kind, _, _, _, _, body in reader.feed(data):
                    said = calls.said(body) if kind == calls.CONTROL else {"is": ""}
                    if said["is"] in ("forked", "refused"):
                        return int(said.get("pid", 0))
    except (OSError, ValueError):
        pass
    return 0


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it has ended
