"""The way to the agent of a directory: start it if there is none, then carry bytes between our standard streams and its socket.

The main program of the agent's file.  Standard library only, Python 3.9.  cpool-agent(7), AGENT.

usage: agent.pyz attach DIRECTORY | agent.pyz calls DIRECTORY | agent.pyz lend DIRECTORY |
       agent.pyz enter DIRECTORY ID.ATTEMPT FLAGS COMMAND...
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

from pool import calls, frames, single, sockets

_PIECE = 1 << 16
_BEGIN_S = 10.0


def main(build: str) -> int:
    """build: names this file."""
    if sys.argv[1:2] == ["enter"] and len(sys.argv) > 5:
        from pool import entering

        return entering.enter(os.path.expanduser(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    if sys.argv[1:2] == ["lines"] and len(sys.argv) > 5:
        from pool import lines

        return lines.main(sys.argv[2:])
    if len(sys.argv) != 3 or sys.argv[1] not in ("attach", "calls", "lend", "daemon"):
        print(__doc__, file=sys.stderr)
        return 2
    directory = os.path.expanduser(sys.argv[2])
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if sys.argv[1] == "daemon":  # in the place of an agent of another build
        from pool import agent

        agent.daemon(directory, build)
        return 0
    if sys.argv[1] == "lend":
        from pool import lent

        return lent.main(directory)
    greeting = calls.GREETING if sys.argv[1] == "calls" else frames.GREETING
    try:
        if sys.argv[1] == "calls":
            connection = sockets.connect_within(os.path.join(directory, "calls"), _BEGIN_S)
        else:
            connection = _reach(directory, build)
    except OSError as error:
        print(f"cpool-agent: cannot reach the agent: {error}", file=sys.stderr)
        return 7
    os.write(1, greeting)
    _carry(connection)
    return 0


def _reach(directory: str, build: str) -> socket.socket:
    """Raises OSError."""
    deadline = time.monotonic() + _BEGIN_S
    is_started = False
    while True:
        try:
            return sockets.connect(directory)
        except OSError:
            if time.monotonic() > deadline:
                raise
        if not is_started:
            is_started = True
            _start(directory, build)
        time.sleep(0.005)


def _start(directory: str, build: str) -> None:
    def run() -> None:
        from pool import agent, processes

        os.environ[processes.UMASK] = f"{os.umask(0o077):03o}"  # of the account, for its jobs
        log = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        os.chdir("/")
        for fd, to in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, to)
        os.closerange(3, 256)
        agent.daemon(directory, build)

    single.begin_apart("agent", run)


def _carry(connection: socket.socket) -> None:
    """Until either side ends."""
    there = connection.fileno()
    poll = select.poll()
    for fd in (0, there):
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            data = os.read(fd, _PIECE)
            if not data:
                return
            to = there if fd == 0 else 1
            while data:
                data = data[os.write(to, data) :]
