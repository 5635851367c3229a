"""The shim by itself, at a host of this test: what becomes of cancels, whenever they come."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pool import calls
from pool import shim as module
from tests.waiting import SLOW

HANDLERS = """
import asyncio, time
def nap(value):
    end = time.monotonic() + value
    while time.monotonic() < end:
        time.sleep(0.0005)
def several(value):
    end = time.monotonic() + value
    while time.monotonic() < end:
        yield 1
async def later(value):
    await asyncio.sleep(value)
"""
START = "import sys; sys.path.insert(0, {root!r}); from pool import shim; shim.PLACE = {place!r}; sys.exit(shim.main())"


class Peer:
    """Where the function host would be."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process, self._connection, self._reader, self._held = process, connection, calls.Reader(), []

    def say(self, *frames: bytes) -> None:
        self._connection.sendall(b"".join(frames))

    def next(self) -> tuple[int, int, bytes, bytes]:
        while not self._held:
            data = self._connection.recv(1 << 16)
            assert data, "it has ended"
            self._held += [(kind, flags, call, body) for kind, flags, call, _, _, body in self._reader.feed(data)]
        return self._held.pop(0)

    def answers(self, wanted: set[bytes]) -> list[int]:
        """The flags of one for each."""
        found = []
        while wanted:
            kind, flags, call, _ = self.next()
            if kind == calls.ITEM:
                self.say(calls.frame(calls.MORE, call, a=1))
            elif kind == calls.ANSWER:
                wanted.remove(call)
                found.append(flags & calls.ERROR)
        return found


@contextmanager
def served(handler: str, many: int) -> Iterator[Peer]:
    with tempfile.TemporaryDirectory() as place:  # pytest's own are too long for the name of a socket
        for name in ("host", "out"):
            os.mkdir(f"{place}/{name}")
        Path(place, "token").write_text("1.1 x\n")
        Path(place, "h.py").write_text(HANDLERS)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{place}/host/socket")
            listener.listen()
            listener.settimeout(20 * SLOW)
            code = START.format(root=str(Path(module.__file__).parents[1]), place=place)
            with subprocess.Popen([sys.executable, "-c", code, f"h:{handler}", str(many)], cwd=place) as process:
                connection = listener.accept()[0]
                connection.settimeout(5 * SLOW)
                peer = Peer(process, connection)
                try:
                    while json.loads(peer.next()[3])["is"] != "ready":
                        pass
                    yield peer
                finally:
                    process.kill()


@pytest.mark.parametrize("value_s", [0.001, 60])
@pytest.mark.parametrize(("handler", "many"), [("nap", 1), ("several", 1), ("nap", 4), ("several", 3), ("later", 3)])
def test_a_cancel_ends_its_call_whenever_it_comes_and_no_other(handler: str, many: int, value_s: float) -> None:
    draw = random.Random(1)
    with served(handler, many) as peer:
        for _ in range(50):
            ids = [os.urandom(16) for _ in range(many)]
            peer.say(*(calls.frame(calls.CALL, one, json.dumps(value_s).encode()) for one in ids))
            if draw.random() < 0.7:
                time.sleep(draw.random() * 0.002)
            peer.say(*(calls.frame(calls.CANCEL, one) for one in ids))
            if many == 1:
                peer.process.send_signal(signal.SIGUSR1)  # as the host does
            assert all(peer.answers(set(ids))) or value_s < 1
        for _ in range(2 * many):
            one = os.urandom(16)
            peer.say(calls.frame(calls.CALL, one, b"0.001"))
            assert peer.answers({one}) == [0], "what comes later is not cancelled"
