"""Commands that are connected to the controller, at a socket in the pool's directory: a JSON object a line each way."""

from __future__ import annotations

import base64
import json
import os
import selectors
import socket
import struct

from cafs.errors import CafsError, UnsupportedError, UsageError, describe, quote
from pool import metrics, sockets, state
from pool.requests import FOR_ALL, HANDLERS
from pool.tenants import OWNER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.controller import Controller
    from pool.state import Job

_LINE_MAX = 64 << 20
_PIECE = 1 << 18
_CLIENTS_MAX = 64
"""Commands of one user who is not the owner, at once."""


def accept(controller: Controller, listener: socket.socket) -> None:
    """A command."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return  # too many files are open: it is tried again
    uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    tenant = OWNER if uid in (os.geteuid(), 0) else controller.tenants.of_user(uid)
    many = sum(one.uid == uid for one in controller.clients.values())
    if tenant is None or (tenant != OWNER and many >= _CLIENTS_MAX):
        connection.close()
        return
    connection.setblocking(False)
    Client(controller, connection, uid, tenant)


class Client:
    """A command that is connected.  tenant: whose jobs it sees; the owner's sees all."""

    def __init__(self, controller: Controller, connection: socket.socket, uid: int, tenant: str) -> None:
        self._controller = controller
        self.uid, self.tenant, self.is_owner = uid, tenant, tenant == OWNER
        self._socket = connection
        self._held, self._unsent = bytearray(), bytearray()
        self._waits: dict[int, bool] = {}
        self.attended: set[int] = set()
        """Jobs that are wanted while this is connected."""
        self.tag: object = None
        """Of the request that is being seen to; its answer bears it."""
        controller.clients[id(self)] = self
        controller.selector.register(connection, selectors.EVENT_READ, self._serve)

    def _serve(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ:
                data = self._socket.recv(_PIECE)
                if not data:
                    raise ConnectionResetError
                self._held += data
                while b"\n" in self._held:
                    line, _, rest = self._held.partition(b"\n")
                    self._held = rest
                    self._obey(bytes(line))
                if len(self._held) > _LINE_MAX:
                    raise ConnectionResetError
        except BlockingIOError:
            pass
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._controller.clients.pop(id(self), None):
            self._controller.selector.unregister(self._socket)
            self._socket.close()
            self._controller.left(self.attended)

    def answer(self, found: dict[str, Any], tag: object = None) -> None:
        """When what was decided is on disk.  tag: of a request before."""
        tag = self.tag if tag is None else tag
        self._controller.say(lambda: self._answer_now({**found, "tag": tag}))

    def _answer_now(self, found: dict[str, Any]) -> None:
        if id(self) in self._controller.clients:
            self._unsent += json.dumps(found, separators=(",", ":")).encode() + b"\n"
            try:
                self._flush()
            except OSError:
                self._drop()

    def _flush(self) -> None:
        sockets.send(self._controller.selector, self._socket, self._unsent)

    def _obey(self, line: bytes) -> None:
        if line.startswith(b"GET /metrics") and self.is_owner:
            return self._answer_http()
        try:
            self.tag = None
            said = json.loads(line)
            self.tag = said.get("tag")
            handler = HANDLERS.get(said["do"])
            if not self.is_owner and said["do"] not in FOR_ALL:
                raise UnsupportedError("only the pool's owner may do that")
            if handler is None:
                raise UsageError(f"unknown request {quote(str(said['do']))}", hint="is the controller of another release?")
            handler(self, self._controller, said)
        except state.WriteError:
            raise  # half of it may have been done
        except CafsError as error:
            self.answer({"error": str(error), "code": error.exit_code, "hint": error.hint})
        except OSError as error:  # of our disk: of its own connection no request hears
            self.answer({"error": describe(error), "code": 1, "hint": None})
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            self.answer({"error": f"bad request: {error!r}", "code": 2, "hint": None})

    def _answer_http(self) -> None:
        """For curl --unix-socket, and whatever scrapes so: one answer, then the end."""
        body = metrics.text(self._controller).encode()
        head = f"HTTP/1.0 200 OK\r\nContent-Type: {metrics.TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.setblocking(True)
        self._socket.settimeout(1)
        self._socket.sendall(head.encode() + body)
        raise ConnectionResetError

    def ended(self, job: Job) -> None:
        """A job has; say so if it is waited for."""
        self.attended.discard(job.id)
        with_output = self._waits.pop(job.id, None)
        if with_output is not None:
            self._controller.say(lambda: self._answer_now({"job": job.shown(), **(self._output(job) if with_output else {})}))

    def tell(self, found: dict[str, Any]) -> None:
        """What it watches has changed."""
        self._controller.say(lambda: self._answer_now(found))

    def _output(self, job: Job) -> dict[str, Any]:
        kept = self._controller.state.output(job.id)
        return {name: base64.b64encode(data).decode() for name, data in zip(("out", "err"), kept, strict=True)} if kept else {}

    def wait_for(self, number: int, *, with_output: bool) -> None:
        """Have its end said, without a tag, once it comes."""
        self._waits[number] = with_output
