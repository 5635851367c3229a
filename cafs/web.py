"""A store behind a web server, read-only: GET with ranges, over kept-alive connections, through whatever proxy is set.

Everything but refs and packs/list is immutable, so any cache on the way may keep it.  Refs are asked for with their last ETag
(RFC 9110, 8.8.3), kept in the cache.  Each request is tried again for a while (429, 5xx, broken connections; Retry-After is
kept to), and ends in bounded time.  The only module that imports urllib3, but for unixweb.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import quote as url_quote
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from cafs import atomic, paths
from cafs.backend import Backend
from cafs.errors import RemoteError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TRIES = 5
DEADLINE_S = 60.0
_CONNECT_S, _READ_S = 10.0, 20.0
_WAIT_S, _WAIT_MAX_S = 0.2, 10.0
_STEP = 1 << 18
_SLOWEST = 1 << 16  # bytes a second
_LARGEST = 64 << 20
UNIX = "http+unix://"
_AGAIN = (429, 500, 502, 503, 504)


class WebBackend(Backend):
    """url: http(s)://[user:password@]host[:port]/path of a store, shown without the password; or http+unix://DIRECTORY."""

    def __init__(self, url: str) -> None:
        timeout = urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "cafs-tools"}
        if url.startswith(UNIX):
            from cafs import unixweb

            super().__init__(url)
            self._base = ""
            self._pool: urllib3.PoolManager | urllib3.HTTPConnectionPool = unixweb.pool(url.removeprefix(UNIX), timeout)
            return
        try:
            parts = urlsplit(url)
            is_sound = bool(parts.hostname) and not parts.query and not parts.fragment and parts.port != 0
        except ValueError:
            is_sound = False
        if not is_sound or parts.hostname is None:
            raise UsageError("a store's address is http(s)://HOST[:PORT]/PATH")
        self._base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        super().__init__(self._base)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        proxy = None if proxy_bypass(parts.hostname) else getproxies().get(parts.scheme)
        self._pool = _through(proxy, timeout) if proxy else urllib3.PoolManager(timeout=timeout, maxsize=16)

    def read(self, name: str, limit: int) -> bytes:
        if name.startswith("refs/"):
            return self._read_ref(name, limit)
        return self._get(name, {}, lambda response: _whole(response, limit))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
        return self._get(name, wanted, lambda response: _part(response, offset, size))

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        total = 0

        def tail(response: urllib3.BaseHTTPResponse) -> bytes:
            nonlocal total
            start, total = _content_range(response)
            if response.status != 206:
                return _last(response, size)
            data = _whole(response, size)
            if start + len(data) != total:
                raise _Again("the server sent another range than it was asked for")
            return data

        return self._get(name, {"Range": f"bytes=-{size}"}, tail), total

    def exists(self, name: str) -> bool:
        try:
            self.read_range(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def _read_ref(self, name: str, limit: int) -> bytes:
        """A ref by its ETag: unchanged, it is not sent again."""
        path = os.path.join(paths.cache(), "refs", hashlib.sha256(f"{self.url}\0{name}".encode()).hexdigest()[:32])
        kept = _kept(path)
        tag = ""

        def take(response: urllib3.BaseHTTPResponse) -> bytes:
            nonlocal tag
            tag = "" if _is_racy(response) else response.headers.get("ETag", "")
            return kept[1] if kept and response.status == 304 else _whole(response, limit)

        data = self._get(name, {"If-None-Match": kept[0]} if kept else {}, take)
        if tag and (kept is None or kept[1] != data or kept[0] != tag):
            try:
                paths.make_private(paths.cache(), os.path.dirname(path))
                atomic.replace_hint(path, json.dumps([tag, data.decode("latin-1")]).encode(), 0o600)
            except OSError:
                pass
        return data

    def _get(self, name: str, headers: dict[str, str], take: Callable[[urllib3.BaseHTTPResponse], bytes]) -> bytes:
        """GET, as often as it makes sense.  Raises FileNotFoundError, RemoteError."""
        deadline = time.monotonic() + DEADLINE_S
        problem = ""
        for again in range(TRIES):
            wait_s = 0.0
            try:
                response = self._pool.request(
                    "GET",
                    f"{self._base}/{url_quote(name)}",
                    headers=self._headers | headers,
                    preload_content=False,
                    retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5, raise_on_redirect=True),
                )
                try:
                    if response.status in (200, 206, 304):
                        response.deadline = time.monotonic() + _limit_s(response)  # type: ignore[attr-defined]
                        data = take(response)
                        response.release_conn()
                        return data
                    problem = f"HTTP status {response.status}"
                    wait_s = _retry_after(response)
                finally:
                    if response.status not in (200, 206, 304):
                        response.drain_conn()
                    response.close() if problem else None
                if response.status == 416 and "Range" in headers:
                    return b""  # the file ends before it: whoever checks the bytes will see
                if response.status in (404, 410):
                    raise FileNotFoundError(2, "No such file or directory", name)
                if response.status not in _AGAIN:
                    break
            except (urllib3.exceptions.HTTPError, _Again) as error:
                problem = _reason(error)
            wait_s = max(wait_s, min(_WAIT_S * 2**again, _WAIT_MAX_S) * (0.5 + random.random()))
            if again + 1 == TRIES or time.monotonic() + wait_s > deadline:
                break
            time.sleep(wait_s)
        raise RemoteError(f"cannot read {quote(name)} of store {quote(self.url)}: {problem}")


def _through(proxy: str, timeout: urllib3.Timeout) -> urllib3.PoolManager:
    """Connections through a proxy of the environment; its password is sent to it alone.  Raises UsageError."""
    address = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
        place = f"{parts.scheme}://{parts.hostname}:{parts.port or 80}"
    except ValueError:
        raise UsageError("the proxy that http_proxy or https_proxy names is not http://HOST:PORT") from None
    headers = {}
    if parts.username is not None:
        headers = urllib3.make_headers(proxy_basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    return urllib3.ProxyManager(place, timeout=timeout, maxsize=16, proxy_headers=headers)


class _Again(Exception):
    """An answer that is no answer to what was asked; it may be right the next time."""


def _whole(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """The body.  Raises OSError if it is over LIMIT bytes."""
    length = _length(response) or 0
    if length > limit:
        response.close()
        raise OSError(27, f"larger than {limit} bytes")
    if _STEP < length <= _LARGEST:
        return _at_once(response, length)
    parts, size = [], 0
    while part := _read(response, _STEP):
        size += len(part)
        if size > limit:
            response.close()
            raise OSError(27, f"larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _at_once(response: urllib3.BaseHTTPResponse, length: int) -> bytes:
    """A long body into one piece of memory: in steps it would be copied twice.  The time limit then takes a thread."""
    left_s = response.deadline - time.monotonic()  # type: ignore[attr-defined]
    timer = threading.Timer(left_s, _cut, (response,))
    timer.daemon = True
    timer.start()
    try:
        data = response.read(length, decode_content=False)
        while len(data) < length:  # it was cut off: asked again, urllib3 says so
            data += response.read(length - len(data), decode_content=False)
        return data
    finally:
        timer.cancel()


def _cut(response: urllib3.BaseHTTPResponse) -> None:
    """End the connection under whoever reads from it."""
    try:
        with socket.socket(fileno=os.dup(response.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    except (OSError, ValueError):
        pass  # it has ended


def _part(response: urllib3.BaseHTTPResponse, offset: int, size: int) -> bytes:
    """SIZE bytes at OFFSET, also of a server that knows no ranges and sends all."""
    if response.status == 206:
        if _content_range(response)[0] != offset:
            raise _Again("the server sent another range than it was asked for")
        return _whole(response, size)
    at = 0
    parts: list[bytes] = []
    while at < offset + size and (data := _read(response, _STEP)):
        parts.append(data[max(offset - at, 0) : offset + size - at])
        at += len(data)
    response.close()  # the rest is not wanted
    return b"".join(parts)


def _last(response: urllib3.BaseHTTPResponse, size: int) -> bytes:
    """The last SIZE bytes of all that a server sends that knows no ranges; no more is kept."""
    data = b""
    while part := _read(response, _STEP):
        data = (data + part)[-size:]
    return data


def _read(response: urllib3.BaseHTTPResponse, size: int) -> bytes:
    if time.monotonic() > response.deadline:  # type: ignore[attr-defined]
        raise _Again("the answer comes too slowly")
    return response.read1(size) if hasattr(response, "read1") else response.read(size)


def _content_range(response: urllib3.BaseHTTPResponse) -> tuple[int, int]:
    """(first byte, size of the file) of an answer."""
    if response.status == 200:
        length = _length(response)
        if length is None:
            raise _Again("the server does not say how long the file is")
        return 0, length
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", response.headers.get("Content-Range", ""))
    if not match:
        raise _Again("the server sent a range without saying which")
    return int(match[1]), int(match[2])


def _limit_s(response: urllib3.BaseHTTPResponse) -> float:
    """How long an answer may take: a third of the time for all tries, and what a slow but steady line needs."""
    return DEADLINE_S / 3 + min(_length(response) or 0, _LARGEST) / _SLOWEST


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch("[0-9]{1,4}", text) else 0.0


def _is_racy(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether the file may change again within the second that its ETag, on many servers, is made of (RFC 9110, 8.8.2.2)."""
    if "Last-Modified" not in response.headers:
        return False
    try:
        changed, now = (parsedate_to_datetime(response.headers.get(name, "")) for name in ("Last-Modified", "Date"))
        return (now - changed).total_seconds() < 2
    except (ValueError, TypeError):
        return True


def _kept(path: str) -> tuple[str, bytes] | None:
    try:
        tag, data = json.loads(atomic.read_file(path, 65536))
        return str(tag), data.encode("latin-1")
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _reason(error: Exception) -> str:
    """The innermost reason, without addresses of objects."""
    inner = getattr(error, "reason", None) or error
    text = str(inner)
    return text.partition(">: ")[2] or text or type(inner).__name__
