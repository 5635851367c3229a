"""The process of the function host: begun when there is none, told to end, and not begun twice.  cpool-function(7).

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

from pool import calls, single, sockets
from pool.hosted import PLACE
from pool.hosting import Host

_BEGIN_S = 5.0
_SET_CHILD_SUBREAPER = 36


def daemon(directory: str) -> None:
    """Be the function host of an agent's directory, if there is none."""
    place = os.path.join(directory, PLACE)
    if not single.be(place):
        return
    Host(directory).run()
    for path in (os.path.join(place, "socket"), os.path.join(place, "in", "socket")):
        os.unlink(path)


def leave(directory: str) -> None:
    """Have the one that there is end, when it has no instances."""
    try:
        connection = sockets.connect(os.path.join(directory, PLACE))
    except OSError:
        return
    with connection:
        connection.sendall(calls.control("leave"))


def _stays(place: str) -> bool:
    """Whether the one that lives goes on living for a while; not before it listens, or when it has decided to end."""
    try:
        with sockets.connect(place) as connection:
            connection.settimeout(1)
            connection.sendall(calls.control("stay"))
            return bool(connection.recv(64))
    except OSError:
        return False


def ensure(directory: str) -> None:
    """Start one if there is none.  Raises OSError."""
    place = os.path.join(directory, PLACE)
    deadline = time.monotonic() + _BEGIN_S
    while single.is_there(place):
        if _stays(place) or time.monotonic() > deadline:
            return
        time.sleep(0.01)  # it is about to end

    def run() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        os.closerange(3, 4096)
        daemon(directory)

    single.begin_apart("function host", run)
