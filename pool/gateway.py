"""Functions over HTTP, for those who have a token: POST /NAME with a value, and its answer comes back.  cpool(1), FUNCTIONS.

RFC 9110 and 9112, as http.server has them; a thread for each connection.  By itself it listens on this machine alone.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from cafs import stopping
from cafs.errors import CafsError, UnsupportedError, UsageError, os_error, quote
from pool import tokens
from pool.calling import Function, result
from pool.session import CallError, Json, StateOfCall, as_json, id_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

BODY_MAX = 256 << 20
_CALLS, _FEW, _CONNECTIONS = 256, 16, 2048
"""At once: calls, and connections, most of which wait for their next request."""

_WAIT_S, _HEAD_S, _LINGER_S = 60.0, 20.0, 1.0
_READ_AGAIN_S = 1.0
_SLOWEST = 64 << 10
"""Bytes of a body that have to come in a second, beside the time for all of it."""

_STATUS = {
    "raised": 500, "died": 502, "protocol": 502, "start": 503, "cancelled": 499, "function": 404, "full": 429, "unknown": 502,
    "timeout": 504,
}  # fmt: skip
_LINE_MAX, _TRAILERS_MAX = 4096, 100
_FULL = b'{"error":{"kind":"full","message":"too many connections now"}}'
_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)
_LINES = "application/x-ndjson"
_BYTES = "application/octet-stream"


class Server(ThreadingHTTPServer):
    """directory: of the pool."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: str, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        self.directory = directory
        self._context = context
        self._room = threading.BoundedSemaphore(_CONNECTIONS)
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.until: dict[Handler, float] = {}
        """Connections of which a head or a body is being read, and until when."""

        self._functions: dict[tuple[str, str], Function] = {}
        self._tokens: list[tokens.Token] = []
        self._read_after = 0.0
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        threading.Thread(target=self._mind_slow, daemon=True).start()

    def take_place(self, tenant: str) -> bool:
        """For a call, if there is one: the last quarter of them is for tenants that have few."""
        with self._lock:
            total = self._calls.total()
            if total >= _CALLS or (total >= _CALLS * 3 // 4 and self._calls[tenant] >= _FEW):
                return False
            self._calls[tenant] += 1
            return True

    def give_back(self, tenant: str) -> None:
        with self._lock:
            self._calls[tenant] -= 1
            if not self._calls[tenant]:
                del self._calls[tenant]

    def _mind_slow(self) -> None:
        """Who sends slowly holds no place."""
        while True:
            time.sleep(1)
            now = time.monotonic()
            for handler, until in list(self.until.items()):
                if until < now:
                    handler.give_up()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is room for one more."""
        if self._room.acquire(blocking=False):
            return super().process_request(request, client_address)
        try:
            request.setblocking(False)
            if not self._context:
                request.send(_NO_ROOM)
        except OSError:
            pass  # it takes nothing, or has gone
        self.close_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """TLS is begun here, so that nobody else waits for it."""
        try:
            request.settimeout(_WAIT_S)
            if self._context:
                request = self._context.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError:
            self.shutdown_request(request)
        finally:
            self._room.release()

    def shutdown_request(self, request: Any) -> None:
        """What it still sends is read for a moment: a close before that resets the connection, and the answer is lost
        (RFC 9112, 9.6)."""
        try:
            request.shutdown(socket.SHUT_WR)
            request.settimeout(_LINGER_S)
            until = time.monotonic() + _LINGER_S
            while time.monotonic() < until and request.recv(1 << 16):
                pass
        except OSError:
            pass
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news."""

    def tenant_of(self, token: str) -> str | None:
        """Tokens that were made or taken back since are known within a second."""
        now = time.monotonic()
        if now >= self._read_after:
            self._tokens, self._read_after = tokens.read(self.directory), now + _READ_AGAIN_S
        return tokens.tenant_of(self._tokens, token)

    def function(self, tenant: str, name: str) -> Function:
        """One object for each, whose connections are used again."""
        if len(self._functions) > 1000:
            self._functions.clear()
        return self._functions.setdefault((tenant, name), Function(name, directory=self.directory, tenant=tenant, as_text=True))


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _call = b""
    """The id of the call that is asked for, once it has one."""

    _began, _wanted = 0.0, 0
    """Of the body that is being read: since when, and how many bytes of it."""

    server_version, sys_version = "cpool", ""
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing: what is called is the functions' log."""

    def _place(self) -> str:
        """The path that is asked for, without a query."""
        return urlsplit(self.path).path

    def do_GET(self) -> None:
        """/healthz, and /calls/ID for the answer of a call that was begun before."""
        if not self._is_framed():
            return
        if self._place() == "/healthz":
            return self._json(200, {"ok": True})
        tenant = self._tenant()
        if tenant is None:
            return
        match = re.fullmatch("/calls/([0-9a-f]{32})", self._place())
        if not match:
            return self._error(404, "function", "no such thing")
        try:
            self._answer(result(match[1], wait=False, directory=self.server.directory, tenant=tenant, as_text=True))
        except CallError as error:
            self._json(_STATUS.get(error.kind, 502), error.shown())
        except StateOfCall as error:
            self._json(404 if error.state == "unknown" else 202, {"state": error.state})
        except CafsError as error:
            self._error(503, "unknown", str(error))

    do_HEAD = do_GET

    def _refuse(self) -> None:
        """Another method."""
        self.close_connection = True  # it may have a body
        self._json(405, {"error": {"kind": "protocol", "message": f"no {self.command} here"}}, Allow="GET, HEAD, POST")

    do_OPTIONS = do_PUT = do_PATCH = do_DELETE = _refuse

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As http.server says it, but as all other errors are."""
        self.close_connection = True
        self._error(code, "protocol", message or self.responses.get(code, ("",))[0])

    def do_POST(self) -> None:
        """/NAME: a call, if there is room."""
        tenant = self._tenant()
        if tenant is None or not self._is_framed():
            return
        if not self.server.take_place(tenant):
            self.close_connection = True  # its body is not read
            return self._error(503, "full", "too many calls are under way")
        try:
            self._post(tenant)
        finally:
            self.server.give_back(tenant)

    def _post(self, tenant: str) -> None:
        match = re.fullmatch("/([A-Za-z0-9][A-Za-z0-9_.-]{0,62})", self._place())
        value = self._value() if match else None
        if not match:
            self.close_connection = True
            return self._error(404, "function", "no such thing")
        if value is None:
            return
        function = self.server.function(tenant, match[1])
        key = self.headers.get("Idempotency-Key")
        self._call = id_of(tenant, match[1], key) if key is not None else os.urandom(16)
        try:
            if "respond-async" in self.headers.get("Prefer", ""):
                return self._json(202, {"id": function.spawn(value[0], key=key, timeout_s=self._timeout(), call=self._call)})
            if self.headers.get("Accept") == _LINES:
                return self._stream(function, value[0], key)
            self._answer(function.call(value[0], key=key, timeout_s=self._timeout(), call=self._call))
        except CallError as error:
            self._json(_STATUS.get(error.kind, 502), error.shown())
        except CafsError as error:
            self._error(404 if error.exit_code == 4 else 503, "function" if error.exit_code == 4 else "unknown", str(error))

    def _tenant(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        found = self.server.tenant_of(token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            self.close_connection = True  # whatever it still sends is not read
            self._json(401, {"error": {"kind": "token", "message": "no such token"}}, **{"WWW-Authenticate": "Bearer"})
        return found

    def _is_framed(self) -> bool:
        """Whether it is certain where the request ends (RFC 9112, 6.3); else, after an answer, nothing more is read."""
        sizes = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        is_post = self.command == "POST"
        if len(sizes) + len(codings) <= 1 and (is_post or not sizes + codings) and codings in ([], ["chunked"]):
            return True
        self.close_connection = True
        self._error(400, "protocol", "a body has one Content-Length, or is chunked, and a GET has none")
        return False

    def _timeout(self) -> float | None:
        try:
            found = float(self.headers.get("X-Timeout-S", "0"))
        except ValueError:
            return None
        return found if 0 < found < 1e6 else None

    def handle_one_request(self) -> None:
        """As of http.server; from its first byte on there is a time for all of the head."""
        try:
            self.rfile.peek(1)  # type: ignore[attr-defined]
        except OSError:
            self.close_connection = True
            return
        self.server.until[self] = time.monotonic() + _HEAD_S
        try:
            super().handle_one_request()
        finally:
            self.server.until.pop(self, None)

    def parse_request(self) -> bool:
        """As of http.server, but that what is no header is refused."""
        self._call = b""
        try:
            if not super().parse_request():
                return False
            if self.headers.defects:  # what follows a line that is no header was dropped, Content-Length too
                self.send_error(400, "malformed header line")
            return not self.headers.defects
        finally:
            self.server.until.pop(self, None)

    def give_up(self) -> None:
        """What it sends has not come in time."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _value(self) -> tuple[Any] | None:
        """The body; None, after an answer, if it cannot be taken."""
        self._began, self._wanted = time.monotonic(), 0
        self.server.until[self] = self._began + _WAIT_S
        try:
            data = self._body()
        except _Refused as refused:
            self.close_connection = True  # nobody knows where it ends
            self._error(refused.status, "protocol", str(refused))
            return None
        finally:
            self.server.until.pop(self, None)
        if self.headers.get("Content-Type", "") == _BYTES:
            return (data,)
        try:
            return (Json(data),)
        except ValueError as error:
            self._error(400, "protocol", f"the body is no JSON: {error}")
            return None

    def _body(self) -> bytes:
        """All of it.  Raises _Refused."""
        if "Transfer-Encoding" in self.headers:
            return b"".join(self._chunks())
        size = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", size):
            raise _Refused(411, "Content-Length is needed")
        return self._exactly(int(size), BODY_MAX)

    def _chunks(self) -> Iterator[bytes]:
        """RFC 9112, 7.1; extensions and trailers are not looked at.  Raises _Refused."""
        left = BODY_MAX
        while True:
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r\n", self._line())
            if not match:
                raise _Refused(400, "that is no chunk")
            size = int(match[1], 16)
            if not size:
                break
            yield self._exactly(size, left)
            left -= size
            if self._exactly(2, 2) != b"\r\n":
                raise _Refused(400, "that is no chunk")
        for _ in range(_TRAILERS_MAX):
            if self._line() == b"\r\n":
                return
        raise _Refused(400, "too many trailers")

    def _line(self) -> bytes:
        try:
            return self.rfile.readline(_LINE_MAX)
        except TimeoutError:
            raise _Refused(408, "the body does not come") from None

    def _exactly(self, size: int, most: int) -> bytes:
        """So many bytes: with less it is incomplete, and never called (RFC 9112, 6.3 and 8).  Raises _Refused."""
        if size > most:
            raise _Refused(413, f"a body has at most {BODY_MAX} bytes")
        self._wanted += size
        self.server.until[self] = self._began + _WAIT_S + self._wanted / _SLOWEST
        try:
            data = self.rfile.read(size)
        except TimeoutError:
            raise _Refused(408, "the body does not come") from None
        if len(data) < size:
            raise _Refused(400, "the body has ended before its time")
        return data

    def _answer(self, found: Any) -> None:
        if isinstance(found, bytes):
            return self._send(200, found, _BYTES)
        self._json(200, found)

    def _stream(self, function: Function, value: Any, key: str | None) -> None:
        """A line for each item, as it comes; an error is the last line."""
        items = function.stream(value, key=key, timeout_s=self._timeout(), call=self._call)
        first = next(items, _NOTHING)
        self.send_response(200)
        self.send_header("Call-Id", self._call.hex())
        self.send_header("Content-Type", _LINES)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while first is not _NOTHING:
                self._chunk(first)
                first = next(items, _NOTHING)
        except CallError as error:
            self._chunk(error.shown())
        except CafsError as error:
            self.close_connection = True  # in the midst of it
            return self._chunk({"error": {"kind": "unknown", "message": str(error)}})
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, item: Any) -> None:
        line = as_json(item) + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _error(self, status: int, kind: str, message: str) -> None:
        self._json(status, {"error": {"kind": kind, "message": message}})

    def _json(self, status: int, found: Any, **headers: str) -> None:
        more = {"Retry-After": "1"} if status in (429, 503) else {}
        data = as_json(found)
        self._send(status, data, "application/json", **more, **headers)

    def _send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        if self._call:
            self.send_header("Call-Id", self._call.hex())
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Refused(Exception):
    """A body that is not taken.  status: of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_NOTHING = object()


def serve(directory: str, address: str, *, is_public: bool, cert: str | None, key: str | None, is_quiet: bool) -> None:
    """Until SIGTERM or Ctrl-C.  Raises CafsError."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535 or not host:
        raise UsageError(f"{quote(address)} is not HOST:PORT")
    if (cert is None) != (key is None):
        raise UsageError("--cert and --key belong together")
    if not _is_local(host) and not (is_public and cert):
        raise UnsupportedError(f"{host} is reached by others", hint="--public --cert FILE --key FILE, or 127.0.0.1")
    if not tokens.read(directory):
        raise UsageError("nobody has a token", hint="cpool fn token add NAME")
    context = None
    try:
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
        server = Server(directory, (host, int(port)), context)
    except OSError as error:
        raise os_error(f"cannot serve at {quote(address)}", error) from error
    if not is_quiet:
        place = server.server_address
        sys.stderr.write(f"cpool: serving at http{'s' if cert else ''}://{host}:{place[1]}\n")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        stopping.wait()
    finally:
        server.shutdown()
        server.server_close()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
