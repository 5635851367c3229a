"""A connection to the router: calls over it, and going on over another one when the router has ended."""

from __future__ import annotations

import os
import socket
import time

from cafs import stopping
from cafs.errors import NotFound, RemoteError
from pool import sockets
from pool.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PIECE = 1 << 18
_AGAIN_S, _DEAF_S = 10.0, 0.1
BEGIN_S = 5.0
"""How long a router that is being started is waited for."""


def connect(directory: str, wait_s: float) -> socket.socket:
    """To the router of a pool; if a controller runs, it is waited for.  Raises RemoteError."""
    place = f"{directory}/router"
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return sockets.connect(place)
        except OSError:
            try:
                sockets.connect(directory).close()
            except OSError:
                raise RemoteError("no controller runs for this pool", hint="cpool serve &") from None
            if time.monotonic() > deadline:
                raise RemoteError("the router does not answer", hint="is a function deployed? cpool fn ls") from None
        stopping.wait(seconds=0.02)


class Connection:
    """To the router, for one thread.  Raises RemoteError."""

    def __init__(self, directory: str, *, as_text: bool = False) -> None:
        self._directory, self._pid = directory, os.getpid()
        self.session = Session(as_text=as_text)
        self._socket = connect(directory, BEGIN_S)
        self._opened: dict[tuple[str, str], int] = {}
        self.owners: dict[tuple[str, str], str] = {}
        """Whose the functions are that were opened."""

        self._is_renewing = self._has_heard = self._is_deaf = False
        self._renewed = 0

    @property
    def is_own(self) -> bool:
        """Whether this process has made it: one that was forked from that has only the same descriptor."""
        return self._pid == os.getpid()

    def close(self) -> None:
        """What has no answer goes on."""
        self._socket.close()

    def _renew(self) -> None:
        """The router has ended; another one takes up what the one before had begun.  Raises RemoteError."""
        if not self._has_heard:
            if self._is_deaf:
                raise RemoteError("the router has ended the connection", hint="may this user use the pool?")
            self._is_deaf = True  # once it may have been one that was about to end
            stopping.wait(seconds=_DEAF_S)
        before, deadline = self._opened, time.monotonic() + _AGAIN_S
        self._is_renewing, self._has_heard = True, False
        self._renewed += 1
        try:
            while True:
                self._socket.close()
                self._socket = connect(self._directory, max(deadline - time.monotonic(), 0))
                self.session.renew()
                self._opened = {}
                try:
                    self.session.again({number: self.open(*key) for key, number in before.items()})
                    return
                except OSError as error:  # that was still the one before
                    if time.monotonic() > deadline:
                        raise RemoteError("the router has ended") from error
                    stopping.wait(seconds=0.02)
        finally:
            self._is_renewing = False

    def open(self, tenant: str, name: str) -> int:
        """The router's number of a function.  Raises NotFound."""
        while (tenant, name) not in self._opened:
            found = self.reply(self.session.ask("open", name=name, tenant=tenant))
            if found is None:
                continue
            if found["is"] == "error":
                raise NotFound(str(found["message"]), hint="cpool fn ls")
            self._opened[tenant, name] = int(found["number"])
            self.owners[tenant, name] = str(found["tenant"])
        return self._opened[tenant, name]

    def reply(self, tag: int) -> dict[str, Any] | None:
        """To a control; None if it is to be asked again, as the router has ended."""
        renewed = self._renewed
        while tag not in self.session.replies:
            self.turn()
            if self._renewed != renewed:
                return None
        return self.session.replies.pop(tag)

    def turn(self, beside: int = -1) -> list[bytes]:
        """Send what is to be sent, wait for something; the calls that are done by it.  beside: or until that can be read."""
        if not self.is_own:
            raise RemoteError("the connection to the router is of the process that has forked this one")
        try:
            if self.session.out:
                out, self.session.out = self.session.out, bytearray()
                self._socket.sendall(out)
            if self._socket not in stopping.wait(self._socket, *([beside] if beside >= 0 else [])):
                return []
            data = self._socket.recv(_PIECE)
            if not data:
                raise ConnectionResetError
            self._has_heard, self._is_deaf = True, False
        except OSError:
            if self._is_renewing:
                raise
            self._renew()
            return []
        return self.session.feed(data)

    def wait(self, call: bytes) -> Any:
        """The answer.  Raises CallError."""
        try:
            one = self.session.pending[call]
            while not one.is_done:
                self.turn()
        except BaseException:  # Ctrl-C, most likely
            self.abandon(call)
            raise
        return self.session.take(call)

    def abandon(self, call: bytes) -> None:
        self.session.pending.pop(call, None)
        self.session.cancel(call)
        if not self.is_own:
            return  # they are its parent's calls
        try:
            self._socket.sendall(self.session.out)
            self.session.out = bytearray()
        except OSError:
            pass  # then nobody is there to hear it
