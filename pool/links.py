"""Ways to agents: a socket each, behind which somebody carries bytes to an agent's own.  Made in threads: it takes time."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time

from cafs import atomic
from cafs.errors import RemoteError
from pool import frames, program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOCAL = ""
"""The address of this machine."""

_GREETING_S = 20.0


class Pool:
    """What is to be known of a pool to reach its workers.  lend: directory of the store that they read through us, or ''."""

    __slots__ = ("directory", "id", "lend")

    def __init__(self, directory: str, identity: str, lend: str = "") -> None:
        self.directory, self.id, self.lend = directory, identity, lend


def open_link(pool: Pool, name: str, address: str) -> socket.socket:
    """To the agent of a worker, which is started if need be.  Raises CafsError, OSError."""
    if address != LOCAL:
        from pool import ssh

        return ssh.open_link(pool, name, address)
    directory = pool.directory
    build, data = program.make()
    place = os.path.join(directory, "agents", f"{pool.id}.{name}")
    os.makedirs(place, mode=0o700, exist_ok=True)
    path = os.path.join(directory, "agents", f"{build}.pyz")
    if not os.path.exists(path):
        atomic.replace_file(path, data, 0o600)
    ours, theirs = socket.socketpair()
    with theirs, open(os.path.join(place, "log"), "ab+") as log:
        begin = log.seek(0, os.SEEK_END)
        environment = {**os.environ, "CPOOL_CRUN": os.path.join(os.path.dirname(sys.executable), "cafs-run")}
        subprocess.Popen(
            [sys.executable, path, "attach", place], stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=log, env=environment
        )
    try:
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        skip_greeting(ours.recv, lambda left_s: bool(poll.poll(left_s * 1000)), errors=lambda: _tail(place, begin))
        return ours
    except BaseException:
        ours.close()
        raise


def finish() -> None:
    """After all links were closed: wait until what was said last is on its way."""
    ssh = sys.modules.get("pool.ssh")
    if ssh:
        ssh.finish()


def _tail(place: str, begin: int) -> bytes:
    """Of the log of a local agent."""
    with open(os.path.join(place, "log"), "rb") as log:
        log.seek(begin)
        return log.read(1 << 16)


def skip_greeting(
    receive: Callable[[int], bytes],
    wait: Callable[[float], bool],
    greeting: bytes = frames.GREETING,
    errors: Callable[[], bytes] = bytes,
) -> None:
    """Read up to the line with which the protocol begins, a byte at a time: the rest is for others.

    errors: what came on standard error, asked if there is no such line.  Raises RemoteError.
    """
    said = b""
    deadline = time.monotonic() + _GREETING_S
    while not said.endswith(greeting):
        if not wait(max(deadline - time.monotonic(), 0)):
            raise RemoteError("the agent does not answer")
        data = receive(1)
        if not data:
            last = (said.strip() + b"\n" + errors()).decode(errors="replace").strip().splitlines()
            raise RemoteError(f"the agent has not begun: {last[-1] if last else 'it said nothing'}")
        said += data
        if len(said) > frames.GREETING_WITHIN:
            raise RemoteError("the agent's greeting does not come: the shell there says too much")
