"""The router's connections to function hosts: directly on this machine, over SSH elsewhere, made anew when they break."""

from __future__ import annotations

import errno
import math
import os
import queue
import socket
import threading
import time

from pool import calls, sockets
from pool.address import LOCAL
from pool.loop import Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.routed import Instance
    from pool.router import Router

_AGAIN_S, _AGAIN_LOCAL_S = 1.0, 0.005


class HostLink:
    """To the host of a worker.

    wire: None while there is no connection.  name: what the host process calls itself.  used: when it was needed last.
    """

    def __init__(self, router: Router, worker: str, address: str) -> None:
        self._router, self.worker, self.address = router, worker, address
        self.wire: Wire | None = None
        self.name = ""
        self.instances: dict[int, Instance] = {}
        self.known: dict[bytes, tuple[str, int, str]] = {}
        """Calls that it had when it greeted: state, and number and identity of the instance."""

        self._coming: dict[bytes, tuple[str, int, str]] = {}
        self.has_greeted = self.has_ever_greeted = False
        self.is_wanted = True
        self._greeted_at = 0.0
        self._is_opening = False
        self._tries = 0
        self.used = self._lost_at = time.monotonic()
        self._opened: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self.open()

    def open(self) -> None:
        """Try to connect; again and again, as long as an instance is there or on its way."""
        if self.wire or self._is_opening or not self.is_wanted:
            return
        if self.address == LOCAL:
            pool = self._router.pool
            place = os.path.join(pool.directory, "agents", f"{pool.id}.{self.worker}", "calls")
            try:
                return self._connected(sockets.connect(place))
            except OSError as error:
                if self.name and error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                    self._give_up()  # nobody listens any more: it has ended, and what it knew is gone
                self._tries += 1
                return self._router.loop.at(time.monotonic() + min(_AGAIN_LOCAL_S * self._tries, _AGAIN_S), self.open)
        self._is_opening = True
        threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        """In a thread."""
        from pool import ssh

        try:
            self._opened.put(ssh.open_calls(self._router.pool, self.worker, self.address))
        except Exception:  # whatever a library raises: it is tried again
            self._opened.put(None)
        self._router.wake()

    def take_opened(self) -> None:
        """What the thread has brought."""
        while not self._opened.empty():
            found = self._opened.get()
            self._is_opening = False
            if found is not None:
                self._connected(found)
                continue
            if self.name and time.monotonic() > self._lost_at + self._router.callers.lost_s:
                self._give_up()
            self._router.loop.at(time.monotonic() + _AGAIN_S, self.open)

    def _connected(self, connection: socket.socket) -> None:
        self.has_greeted, self._coming, self._tries = False, {}, 0
        self.wire = Wire(self._router.loop, connection, self._heed, self._lost, is_shared=True)
        self.wire.say(calls.control("hello", protocol=calls.PROTOCOL))

    def _heed(self, kind: int, flags: int, call: bytes, a: int, b: int, body: bytes) -> None:
        if kind == calls.ANSWER:
            self._router.answered(self, flags, call, a, body)
        elif kind == calls.CONTROL:
            said = calls.said(body)
            if said["is"] == "calls":
                for one, state, number, identity in said["calls"]:
                    self._coming[bytes.fromhex(one)] = str(state), int(number), str(identity)
            elif said["is"] == "hello":
                self._greeted(str(said["host"]))
            else:
                self._router.instances.heed_host(self, said)
        else:
            self._router.heed_call(self, kind, flags, call, a, body)

    def _greeted(self, name: str) -> None:
        if self.name and name != self.name:
            self._give_up()  # another process: what the one before has begun, nobody knows
        self.name, self.has_greeted, self.known = name, True, self._coming
        self.has_ever_greeted, self._greeted_at = True, time.monotonic()
        self._router.greeted(self)
        for one in list(self.instances.values()):
            for call in list(one.calls.values()):
                if call.id not in self.known:
                    self._router.again(call)  # it has never arrived
                elif self.known[call.id][0] == "done":
                    self.say(calls.frame(calls.ASK, call.id))

    def say(self, frame: bytes) -> None:
        """If there is a connection."""
        if self.wire:
            self.wire.say(frame)

    def _lost(self, _: str) -> None:
        self.wire, self.has_greeted = None, False
        self._lost_at = time.monotonic()
        self.open()

    def _give_up(self) -> None:
        """The host that there was is no more, nor are its instances."""
        self.name, self.known = "", {}
        gone, self.instances = list(self.instances.values()), {}
        for one in gone:  # all of them, before a call looks for another
            self._router.instances.lost(one)
        for one in gone:
            for call in list(one.calls.values()):
                self._router.lost(call)
        self._router.lost_link(self)

    def mind(self) -> None:
        """Once a second."""
        if self.wire is None and self.name and time.monotonic() > self._lost_at + self._router.callers.lost_s:
            self._give_up()
        if self.known and time.monotonic() > self._greeted_at + calls.KEPT_S:
            self._greeted_at = math.inf
            self.known = {call: about for call, about in self.known.items() if about[0] == "running"}

    def give_up(self) -> None:
        """Its worker is another machine now."""
        self._give_up()
        self.close()

    def close(self) -> None:
        """It is not needed any more."""
        self.is_wanted = False
        if self.wire:
            self.wire.close(is_quiet=True)
            self.wire = None
