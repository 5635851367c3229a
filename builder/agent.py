"""RUN --mount=type=ssh: a socket of the owner and mode that the mount asks for, behind which is the caller's agent.

A process of ours passes on what comes: the agent's own socket is for its user alone, who a command need not be.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
from contextlib import contextmanager

from cafs import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.mounts import Mount

_PIECE = 1 << 16
_WAITING = 16


@contextmanager
def passed_on(agent: str, path: str, mount: Mount) -> Iterator[None]:
    """Serve a new socket at PATH.  agent: path of the other."""
    here = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{here}/{os.path.basename(path)}")  # however long the path is
        os.close(here)
        os.chown(path, mount.uid, mount.gid)
        os.chmod(path, mount.mode)
        listener.listen(_WAITING)
        child = os.fork()
        if not child:
            _be_child(listener, agent)
        try:
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _be_child(listener: socket.socket, agent: str) -> None:
    """Never returns."""
    try:
        linux.die_with_parent()
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        _accept(listener, agent, selector)
                    elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed with the other just now
                        _pass(key.fileobj, key.data, selector)  # type: ignore[arg-type]
    finally:
        os._exit(1)


def _accept(listener: socket.socket, agent: str, selector: selectors.BaseSelector) -> None:
    here, _ = listener.accept()
    there = socket.socket(socket.AF_UNIX)
    try:
        there.connect(agent)
    except OSError:
        here.close()
        there.close()
        return
    selector.register(here, selectors.EVENT_READ, there)
    selector.register(there, selectors.EVENT_READ, here)


def _pass(source: socket.socket, target: socket.socket, selector: selectors.BaseSelector) -> None:
    """One piece; with the end of either side both are closed, as questions and answers come by turns."""
    try:
        data = source.recv(_PIECE)
        if data:
            return target.sendall(data)
    except OSError:
        pass
    for one in (source, target):
        selector.unregister(one)
        one.close()
