"""A small HTTP proxy in front of one server: it counts requests, can be slow, and can go wrong in every way we know of.

Bounded: it listens on loopback, lives as long as its `with` block, and a stall ends with it.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "stall", "short", "error-page", "wrong-range", "403", "404", "416", "429", "503", "reset", "trickle", "redirect",
    "redirect-loop", "no-ranges",
)  # fmt: skip


class Proxy:
    """log: (method, path, bytes sent by the client, bytes of the answer).  fault: of a request, a name of FAULTS or None.

    knows_conditions: false to answer conditional writes as an old S3 server does.
    """

    def __init__(self, upstream: tuple[str, int], delay_s: float = 0) -> None:
        self.upstream = upstream
        self.delay_s = delay_s
        self.log: list[tuple[str, str, int, int]] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.knows_conditions = True
        self.ended = threading.Event()
        outer = self

        class Handler(_Handler):
            proxy = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str) -> int:
        """How many requests of a method there were."""
        return sum(one[0] == method for one in self.log)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            pass  # BaseHTTPRequestHandler has answered
        body = self._body()
        time.sleep(self.proxy.delay_s)
        fault = self.proxy.fault(self.command, self.path)
        if not self.proxy.knows_conditions and self.command == "PUT" and {"If-Match", "If-None-Match"} & set(self.headers):
            fault = "501"
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding", "expect")}
        if fault == "no-ranges":
            headers = {k: v for k, v in headers.items() if k.lower() != "range"}
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        self.proxy.log.append((self.command, self.path, len(body), len(data)))
        if fault is None or fault == "no-ranges":
            self._answer(answer.status, dict(answer.getheaders()), data)
        else:
            self._go_wrong(fault, answer, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "keep-alive"):
                self.send_header(name, value)
        size = len(data) if length is None else length
        if self.command == "HEAD":
            size = int(headers.get("Content-Length") or headers.get("content-length") or 0)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _go_wrong(self, fault: str, answer: http.client.HTTPResponse, data: bytes) -> None:
        headers = dict(answer.getheaders())
        if fault.isdigit():
            self._answer(int(fault), {"Retry-After": "1"} if fault in ("429", "503") else {}, b"no")
        elif fault == "error-page":
            self._answer(200, {"Content-Type": "text/html"}, b"<html>Please log in to the network.</html>")
        elif fault == "wrong-range":
            total = re.sub(".*/", "", headers.get("Content-Range", f"/{len(data)}"))
            self._answer(206, {"Content-Range": f"bytes 1-{len(data)}/{total}"}, data[1:] + b"x")
        elif fault == "redirect":
            host, port = self.proxy.upstream
            self._answer(302, {"Location": f"http://{host}:{port}{self.path}"}, b"")
        elif fault == "redirect-loop":
            self._answer(302, {"Location": f"{self.proxy.url}{self.path}"}, b"")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            self._answer(answer.status, headers, data[: len(data) // 2], length=len(data))
            self.close_connection = True
            if fault == "stall":
                self.wfile.flush()
                self.proxy.ended.wait(60)
            for byte in data[len(data) // 2 :] if fault == "trickle" else b"":
                if self.proxy.ended.wait(0.3):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            pass


def free_port() -> int:
    """A port that nobody listens on, below those that connections get (ip_local_port_range), so that none takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 18_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":  # usage: faultproxy.py UPSTREAM_PORT DELAY_S    prints its port, ends with its standard input
    import sys

    with Proxy(("127.0.0.1", int(sys.argv[1])), float(sys.argv[2])) as running:
        print(running.port, flush=True)
        sys.stdin.read()
