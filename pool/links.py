"""Ways to agents: a socket each, behind which somebody carries bytes to an agent's own.  Made in threads: it takes time."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys

from cafs import atomic
from pool import program
from pool.address import LOCAL, skip_greeting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.address import Pool


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
