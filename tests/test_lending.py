"""A store that a controller lends to a worker: over one channel, to many readers, of whom none holds up another."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafs.backend import Backend
from cafs.errors import RemoteError
from cafs.opening import open_backend
from pool import frames, lent, streams
from pool.lending import Lender, Stream
from tests.waiting import SLOW


@pytest.fixture
def lent_store(tmp_path: Path) -> Iterator[tuple[Path, Backend, socket.socket]]:
    """(the store, a way to read it, the channel on the controller's side)."""
    store = tmp_path / "store"
    (store / "packs").mkdir(parents=True)
    (store / "packs" / "big").write_bytes(os.urandom(5_000_000))
    (store / "small").write_bytes(b"0123456789")
    (store / "empty").write_bytes(b"")
    (tmp_path / "secret").write_text("secret")
    (store / "link").symlink_to("../secret")
    os.mkfifo(store / "pipe")
    here, there = socket.socketpair()
    carrier = lent.Carrier(str(tmp_path / "agent"), there.fileno(), there.fileno())
    threading.Thread(target=carrier.run, daemon=True).start()
    assert here.recv(len(frames.GREETING), socket.MSG_WAITALL) == frames.GREETING
    threading.Thread(target=Lender(str(store), here.recv, here.sendall).run, daemon=True).start()
    yield store, open_backend(f"http+unix://{tmp_path}/agent"), here
    here.shutdown(socket.SHUT_RDWR)


def test_files_and_parts_of_them_are_read_by_many_at_once(lent_store: tuple[Path, Backend, socket.socket]) -> None:
    store, backend, _ = lent_store
    whole = (store / "packs" / "big").read_bytes()
    found: list[bool] = []

    def read(number: int) -> None:
        at = number * 250_000
        found.append(backend.read_range("packs/big", at, 700_000) == whole[at : at + 700_000])
        found.append(backend.read("packs/big", 1 << 30) == whole)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30 * SLOW)
    assert found == [True] * 24
    assert backend.read_tail("small", 4) == (b"6789", 10) and backend.read("empty", 9) == b""
    assert backend.read_range("small", 20, 5) == b"", "beyond its end"
    assert backend.exists("small") and not backend.exists("absent")


@pytest.mark.parametrize("name", ["../secret", "link", "pipe", "packs", "", "/etc/passwd", "packs/../../secret"])
def test_nothing_but_the_files_of_the_store_is_read(lent_store: tuple[Path, Backend, socket.socket], name: str) -> None:
    with pytest.raises((FileNotFoundError, RemoteError)):
        lent_store[1].read(name, 1 << 20)


def test_a_reader_that_takes_nothing_holds_up_no_other(lent_store: tuple[Path, Backend, socket.socket], tmp_path: Path) -> None:
    slow = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for one in slow:
        one.connect(str(tmp_path / "agent" / "socket"))
        one.sendall(b"GET /packs/big HTTP/1.1\r\nHost: x\r\n\r\n")
    assert len(lent_store[1].read("packs/big", 1 << 30)) == 5_000_000
    for one in slow:
        one.close()
    assert lent_store[1].read("small", 99) == b"0123456789"


def test_readers_see_an_error_when_the_controller_is_gone(
    lent_store: tuple[Path, Backend, socket.socket], tmp_path: Path
) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(tmp_path / "agent" / "socket"))
    connection.sendall(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.recv(12) == b"HTTP/1.1 200"
    lent_store[2].shutdown(socket.SHUT_RDWR)
    connection.settimeout(5 * SLOW)
    while connection.recv(4096):
        pass


def test_what_a_worker_should_not_send_ends_its_channel_and_takes_no_memory(tmp_path: Path) -> None:
    for said in (
        b"\xff" * 64,
        streams.frame(1, streams.OPEN) * 2,
        b"".join(streams.frame(n, streams.OPEN) for n in range(1, 400)),
    ):
        here, there = socket.socketpair()
        thread = threading.Thread(target=Lender(str(tmp_path), here.recv, here.sendall).run, daemon=True)
        thread.start()
        there.sendall(said)
        thread.join(10 * SLOW)
        assert not thread.is_alive()
    stream = Stream(1, lambda _: None)
    for _ in range(100):
        stream.came(b"x" * 65536)
    assert stream._is_over


@given(st.lists(st.tuples(st.integers(1, 9), st.binary(max_size=50)), max_size=9), st.lists(st.integers(1, 20), max_size=40))
def test_streams_come_back_however_they_are_cut(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(streams.frame(number, streams.DATA, body) for number, body in sent) + streams.frame(
        7, streams.CREDIT, number=9
    )
    reader, found = streams.Reader(), []
    for size in [*cuts, len(data) + 1]:
        piece, data = data[:size], data[size:]
        found += list(reader.feed(piece))
    assert found == [(number, streams.DATA, body, len(body)) for number, body in sent] + [(7, streams.CREDIT, b"", 9)]


def test_a_reader_that_leaves_while_data_is_on_its_way_leaves_the_others_alone(
    lent_store: tuple[Path, Backend, socket.socket], tmp_path: Path
) -> None:
    for _ in range(30):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(tmp_path / "agent" / "socket"))
        one.sendall(b"GET /packs/big HTTP/1.1\r\nHost: x\r\n\r\n")
        one.recv(4096)
        one.close()
    assert lent_store[1].read("small", 99) == b"0123456789"


def test_what_a_worker_sends_to_a_stream_that_is_over_is_not_kept() -> None:
    stream = Stream(1, lambda _: None)
    stream.end()
    for _ in range(100):
        stream.came(b"x" * 65536)
    assert len(stream._received) == 0
