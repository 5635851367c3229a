"""Which pool a worker belongs to, its address, and the greeting of its agent."""

from __future__ import annotations

import time

from cafs.errors import RemoteError
from pool import frames

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
