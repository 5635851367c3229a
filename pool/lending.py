"""On the controller: its store, read by workers over their connections, as a web server would give it: GET and ranges.

A thread for the channel, and one for each stream that is open (RFC 9110, 14).
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler

from cafs import linux
from pool import streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PIECE = 1 << 18
_WAIT_S = 60.0
_KEPT_MAX = 1 << 18


class Stream(io.RawIOBase):
    """One reader on the worker, as a file that is read and written."""

    def __init__(self, number: int, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._number, self._send = number, send
        self._there = threading.Condition()
        self._received = bytearray()
        self._credit = streams.WINDOW
        self._is_over = False

    def readable(self) -> bool:
        """As of io.RawIOBase."""
        return True

    def writable(self) -> bool:
        """As of io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of io.RawIOBase: what there is; 0 when the reader has left."""
        with self._there:
            self._there.wait_for(lambda: self._received or self._is_over)
            size = min(len(buffer), len(self._received))
            buffer[:size] = self._received[:size]
            del self._received[:size]
            return size

    def write(self, data: Any) -> int:
        """As of io.RawIOBase: a piece of it, when the reader takes some.  Raises OSError."""
        with self._there:
            if not self._there.wait_for(lambda: self._credit or self._is_over, _WAIT_S) or self._is_over:
                raise BrokenPipeError("the reader takes nothing")
            piece = bytes(data[: min(self._credit, streams.PIECE)])
            self._credit -= len(piece)
        self._send(streams.frame(self._number, streams.DATA, piece))
        return len(piece)

    def came(self, data: bytes) -> None:
        """The reader has asked for something."""
        with self._there:
            if not self._is_over:
                self._received += data
            self._is_over = self._is_over or len(self._received) > _KEPT_MAX  # nobody asks for so much
            self._there.notify_all()

    def may_send(self, size: int) -> None:
        """The reader has taken so many bytes."""
        with self._there:
            self._credit = min(self._credit + size, streams.WINDOW)
            self._there.notify_all()

    def end(self) -> None:
        """The reader has left."""
        with self._there:
            self._is_over = True
            self._there.notify_all()


class Lender:
    """root: of the store.  receive, send: of the channel to a worker."""

    def __init__(self, root: str, receive: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
        self._root, self._receive, self._send_all = root, receive, send
        self._lock = threading.Lock()
        self._open: dict[int, Stream] = {}

    def run(self) -> None:
        """Until the channel ends.  What a worker says is a stranger's until it is checked."""
        reader = streams.Reader()
        try:
            while data := self._receive(_PIECE):
                for number, kind, body, size in reader.feed(data):
                    self._heed(number, kind, body, size)
        except (OSError, ValueError):
            pass
        finally:
            for one in list(self._open.values()):
                one.end()

    def _heed(self, number: int, kind: int, body: bytes, size: int) -> None:
        if kind == streams.OPEN:
            if number in self._open or len(self._open) > 2 * streams.MANY:
                raise ValueError("too many streams")
            self._open[number] = Stream(number, self._send)
            threading.Thread(target=self._serve, args=(number,), daemon=True).start()
        elif number in self._open:
            one = self._open[number]
            if kind == streams.DATA:
                one.came(body)
            elif kind == streams.CREDIT:
                one.may_send(size)
            else:
                one.end()

    def _send(self, data: bytes) -> None:
        with self._lock:
            self._send_all(data)

    def _serve(self, number: int) -> None:
        """In a thread."""
        stream = self._open[number]
        try:
            _Handler(self._root, stream)
        except (OSError, ValueError):
            pass  # the reader has left, or the file was not what it was
        try:
            self._send(streams.frame(number, streams.CLOSE))
        except OSError:
            pass  # the channel has ended
        finally:
            self._open.pop(number, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: str, stream: Stream) -> None:
        self._root, self._stream = root, stream
        super().__init__(None, ("worker", 0), None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Instead of a socket, the stream."""
        self.rfile = io.BufferedReader(self._stream)
        self.wfile = io.BufferedWriter(self._stream, streams.PIECE)

    def finish(self) -> None:
        """There is no socket to close."""
        try:
            self.wfile.flush()
        except OSError:
            self.wfile.raw.end()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        """A file of the store, or a part of it."""
        fd = self._file()
        if fd is None:
            return self._empty(404)
        with open(fd, "rb", buffering=0) as file:
            size, mtime_ns = os.fstat(fd).st_size, os.fstat(fd).st_mtime_ns
            tag = f'"{mtime_ns:x}-{size:x}"'
            if self.headers.get("If-None-Match") == tag:
                return self._empty(304, ETag=tag)
            wanted = _range(self.headers.get("Range", ""), size)
            if wanted is None:
                return self._empty(416, **{"Content-Range": f"bytes */{size}"})
            start, end = wanted
            is_part = "Range" in self.headers
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", formatdate(mtime_ns / 1e9, usegmt=True))
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            while start < end:
                data = os.pread(fd, min(_PIECE, end - start), start)
                if not data:
                    raise BrokenPipeError("the file has become shorter")
                self.wfile.write(data)
                start += len(data)
            del file

    def _file(self) -> int | None:
        """Never outside of the store, and nothing but a file."""
        if not re.fullmatch(r"/[0-9A-Za-z._/@:%+-]{1,400}", self.path) or "%" in self.path:
            return None
        try:
            root = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fd = linux.open_in_root(root, self.path[1:], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            finally:
                os.close(root)
        except OSError:
            return None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _range(text: str, size: int) -> tuple[int, int] | None:
    """(first byte, that after the last) of bytes=A-B, bytes=A- or bytes=-N; all without; None if there is none such."""
    match = re.fullmatch("bytes=([0-9]{0,18})-([0-9]{0,18})", text)
    if not text or not match or not (match[1] or match[2]):
        return 0, size
    if not match[1]:
        return (max(size - int(match[2]), 0), size) if size and int(match[2]) else None
    start, end = int(match[1]), min(int(match[2] or size), size - 1) + 1
    return (start, end) if start < end else None
