"""cpool exec: a command beside a job that runs, with our standard streams; over a connection of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import termios
import tty

from cafs.errors import CafsError
from pool import program
from pool.address import LOCAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(directory: str, pool: str, address: str, job: dict[str, Any], words: list[str], flags: str) -> int:
    """directory, pool: as of address.Pool.  address: of the worker.  flags: i, t.  Returns its exit code.  Raises CafsError."""
    if job["state"] != "running":
        raise CafsError(f"job {job['id']} is {job['state']}")
    has_terminal = "t" in flags
    if has_terminal and not os.isatty(0):
        raise CafsError("standard input is not a terminal", hint="without -t")
    which = f"{job['id']}.{job['attempt']}"
    build = program.make()[0]
    if address == LOCAL:
        place = os.path.join(directory, "agents", f"{pool}.{job['worker']}")
        path = os.path.join(directory, "agents", f"{build}.pyz")
        environment = {**os.environ, "CPOOL_CRUN": os.path.join(os.path.dirname(sys.executable), "cafs-run")}
        command = [sys.executable, path, "enter", place, which, flags or "-", *words]
        given = None if "i" in flags else subprocess.DEVNULL
        return subprocess.run(command, stdin=given, env=environment, check=False).returncode
    from pool import ssh

    place = f".cache/cafs-agent/{pool}.{job['worker']}"
    rest = shlex.join([which, flags or "-", *words])
    command_line = f'exec python3 "$HOME/{place}/agent-{build}.pyz" enter "$HOME/{place}" {rest}'
    with ssh.connected(directory, job["worker"], address) as there:
        if not has_terminal:
            return there.become(command_line + ("" if "i" in flags else " </dev/null"), has_terminal=False)
        before = termios.tcgetattr(0)
        tty.setraw(0)
        try:
            return there.become(command_line, has_terminal=True)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
