"""Functions over HTTP, by other users, and on workers behind SSH."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pool.calling import Function
from tests.faultproxy import free_port
from tests.functioning import NEEDS, answer, deploy, end_all, functions_at, shown, wait
from tests.pooling import BIN, cp, kill_all, ok, read_proc, serving
from tests.test_pool import servers  # noqa: F401  (fixture)
from tests.waiting import SLOW

pytestmark = pytest.mark.needs(*NEEDS)
TOML = '[tenants.a]\nusers = ["1234"]\ncalls = 2\n'


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """Not below pytest's own directory, which every run of it closes to others again."""
    with tempfile.TemporaryDirectory(prefix="cafs-fn-") as place, pytest.MonkeyPatch.context() as patch:
        os.chmod(place, 0o711)
        (Path(place) / "pool").mkdir()
        (Path(place) / "pool" / "pool.toml").write_text(TOML)
        with functions_at(Path(place), patch) as found:
            yield found


@contextmanager
def gateway(*more: object, port: int = 0) -> Iterator[int]:
    port = port or free_port()
    words = [str(word) for word in (BIN / "cpool", "fn", "serve", "--listen", f"127.0.0.1:{port}", *more)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr and "serving at http" in child.stderr.readline()
        try:
            yield port
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(10 * SLOW) == 143


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60 * SLOW)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    found = connection.getresponse()
    return found.status, found.read()


def test_functions_are_called_over_http_by_those_who_have_a_token(base: Path) -> None:
    for name in ("echo", "bad", "nap", "several"):
        deploy(name, f"python:h:{name}", "--cpus", "0.3", "--max", "1")
    refused = cp("fn", "serve", "--listen", "127.0.0.1:0")
    assert refused.returncode == 2 and "nobody has a token" in refused.stderr
    token = ok("fn", "token", "add", "ci").strip()
    assert token not in (base / "pool" / "tokens").read_text() and (base / "pool" / "tokens").stat().st_mode & 0o777 == 0o600
    assert cp("fn", "token", "add", "x", "--tenant", "a b").returncode == 4
    assert cp("fn", "token", "add", "ci").returncode == 6 and ok("fn", "token", "ls") == "ci\n"
    mine = {"Authorization": f"Bearer {token}"}
    with gateway() as port:
        assert ask(port, "GET", "/healthz") == (200, b'{"ok":true}')
        assert ask(port, "POST", "/echo", b'{"a": [1]}', **mine) == (200, b'{"a":[1]}')
        assert ask(port, "POST", "/echo", b"\0\xff", **mine, Content_Type="application/octet-stream") == (200, b"\0\xff")
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {token}"}):
            assert ask(port, "POST", "/echo", b"1", **wrong)[0] == 401
        status, body = ask(port, "POST", "/bad", b"1", **mine)
        assert status == 500 and json.loads(body)["error"]["type"] == "Odd"
        assert ask(port, "POST", "/none", b"1", **mine)[0] == ask(port, "POST", "/../state.db", b"1", **mine)[0] == 404
        assert ask(port, "POST", "/echo", b"{", **mine)[0] == 400
        assert ask(port, "POST", "/echo", None, **mine, Content_Length="999999999999")[0] == 413
        assert ask(port, "POST", "/nap", b"30", **mine, X_Timeout_S="0.5")[0] == 504
        assert ask(port, "POST", "/several", b"3", **mine, Accept="application/x-ndjson") == (200, b"0\n1\n2\n")
        assert ask(port, "POST", "/several", b"3", **mine) == (200, b"[0,1,2]")
        many = [shown("several")["calls"]]
        for _ in range(2):
            ask(port, "POST", "/several", b"3", **mine, Accept="application/x-ndjson", Idempotency_Key="x")
            many.append(shown("several")["calls"])
        assert many[2] == many[1] == many[0] + 1, "a key is a key here, too"
        status, body = ask(port, "POST", "/nap", b"0.5", **mine, Prefer="respond-async")
        call = json.loads(body)["id"]
        assert status == 202 and ask(port, "GET", f"/calls/{call}", **mine)[0] in (200, 202)
        wait(lambda: ask(port, "GET", f"/calls/{call}", **mine) == (200, b'"slept"'))
        assert ask(port, "GET", f"/calls/{'0' * 32}", **mine)[0] == 404
        before = shown("echo")["calls"]
        for length in ("1000", "\xb2", "9" * 5000):
            with socket.create_connection(("127.0.0.1", port)) as cut:
                head = f"POST /echo HTTP/1.1\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n"
                cut.sendall(head.encode("latin-1") + b'"whole in itself"')
                cut.shutdown(socket.SHUT_WR)
                assert cut.recv(1 << 16).startswith(b"HTTP/1.1 4")
        assert shown("echo")["calls"] == before, "what is cut off is not called"
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(b"POST /echo HTTP/1.1\r\nContent-Le")  # and no more: others do not wait for it
        assert ask(port, "POST", "/echo", b"2", **mine) == (200, b"2")
        slow.close()
        ok("fn", "token", "rm", "ci")
        wait(lambda: ask(port, "POST", "/echo", b"1", **mine)[0] == 401)


def test_a_request_has_one_end_and_places_are_shared_by_tenants(base: Path) -> None:
    from pool.gateway import Server

    ok("fn", "token", "add", "framed")
    with gateway() as port, socket.create_connection(("127.0.0.1", port), timeout=20 * SLOW) as one:
        hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
        said = b"".join(iter(lambda: one.recv(1 << 16), b""))
        assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1 ") == 1
        with socket.create_connection(("127.0.0.1", port), timeout=20 * SLOW) as other:
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nno header\r\nContent-Length: 5\r\n\r\nhello")
            said = b"".join(iter(lambda: other.recv(1 << 16), b""))
            assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1 ") == 1
    with Server(str(base / "pool"), ("127.0.0.1", 0), None) as server:
        while server.take_place("greedy"):
            pass
        assert [server.take_place("modest") for _ in range(17)] == [True] * 16 + [False]
        server.give_back("greedy")
        assert not server.take_place("greedy") and server.take_place("third")
    ok("fn", "token", "rm", "framed")


def test_a_gateway_is_for_this_machine_unless_it_is_told_otherwise_and_has_tls(base: Path, tmp_path: Path) -> None:
    done = cp("fn", "serve", "--listen", "0.0.0.0:0")
    assert done.returncode == 8 and "is reached by others" in done.stderr
    assert cp("fn", "serve", "--listen", "0.0.0.0:0", "--public").returncode == 8
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)
    token = ok("fn", "token", "add", "tls").strip()
    deploy("echo", "python:h:echo", "--cpus", "0.3")
    with gateway("--public", "--cert", tmp_path / "cert.pem", "--key", tmp_path / "key.pem") as port:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20 * SLOW, context=context)
        connection.request("POST", "/echo", b"1", {"Authorization": f"Bearer {token}"})
        assert connection.getresponse().read() == b"1"


def as_user(uid: int, code: str) -> str:
    """What our client, loaded by root, prints as another user: this Python may be in a directory of root's."""
    before = "import os, sys, encodings.idna\nfrom pool.client import Function, CallError\nFunction('x')\n"
    before += f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
    done = subprocess.run([BIN / "python", "-c", before + code], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else done.stdout


def test_a_tenant_has_functions_of_its_own_and_a_quota_of_calls(base: Path) -> None:
    deploy("mine", "python:h:echo", "--cpus", "0.3")
    deploy("theirs", "python:h:nap", "--cpus", "0.3", "--tenant", "a", "--max", "1")
    assert as_user(1234, "print(Function('theirs').call(0))") == "slept\n"
    about = as_user(1234, "from pool.client import Client; print(Client(os.environ['CAFS_POOL']).ask('about')['tenant'])")
    assert about == "a\n", "its own commands reach the controller"
    assert "no function 'mine'" in as_user(1234, "Function('mine').call(0)")
    assert "no function 'mine'" in as_user(1234, "Function('mine', tenant='').call(0)")
    assert cp("fn", "call", "theirs", input="0").returncode == 4, "the owner has none of that name"
    assert ok("fn", "call", "theirs", "--tenant", "a", input="0") == '"slept"\n'
    code = "print([getattr(one, 'kind', one) for one in Function('theirs').map([1, 1, 1, 1], parallel=4, return_errors=True)])"
    assert as_user(1234, code) == "['slept', 'slept', 'full', 'full']\n"
    stranger = as_user(999, "Function('theirs').call(0)")
    assert "the router has ended the connection" in stranger, stranger


@pytest.mark.needs("sshd", "ssh-keygen")
def test_functions_run_on_a_worker_behind_ssh_and_a_lost_one_is_not_asked_twice(
    base: Path,
    servers: list[int],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slow, since what runs images is brought to it first, and a worker is lost only after 4 s of silence."""
    monkeypatch.setenv("CAFS_POOL", str(tmp_path / "pool"))
    ok("init")
    (tmp_path / "pool" / "pool.toml").write_text("[pool]\nlost_s = 4\n")
    ok("host", "add", "w0", f"root@127.0.0.1:{servers[0]}", "--identity", tmp_path / "key", "--yes")
    try:
        with serving() as controller:
            deploy("who", "python:h:who")
            deploy("size", "python:h:size")
            deploy("mark", "python:h:mark", "--max", "1")
            assert answer("who", 1)[0] == "w0"  # type: ignore[index]
            with Function("size") as size:
                assert size.call(b"x" * 5_000_000) == ["bytes", 5_000_000]
                assert list(size.map(["y" * number for number in range(200)])) == [["str", number] for number in range(200)]
            call = ok("fn", "spawn", "mark", input='{"name":"a","s":4}').strip()
            wait(lambda: "begun a" in ok("fn", "logs", "mark"))
            kill_all(sessions(tmp_path / "server0"))  # the connections; the worker lives
            assert ok("fn", "result", "--wait", call) == '"a"\n'
            assert ok("fn", "logs", "mark").count("begun a") == 1
            words = [BIN / "cpool", "fn", "call", "mark"]
            with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
                assert child.stdin and child.stderr
                child.stdin.write('{"name":"b","s":600}')
                child.stdin.close()
                wait(lambda: "begun b" in ok("fn", "logs", "mark"))
                began = time.monotonic()
                lose(tmp_path / "server0")
                assert child.wait(60 * SLOW) == 7 and 3 < time.monotonic() - began < 20 * SLOW
                assert "outcome unknown" in child.stderr.read()
            controller.kill()
    finally:
        end_all(tmp_path)
        end_containers(tmp_path)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if f"{tmp_path}/" in line:
                subprocess.run(["umount", "-l", line.split(" ")[4]], check=False)


def end_containers(place: Path) -> None:
    """Of jobs whose worker was lost: nobody else does."""

    def left() -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            words = read_proc(name, "cmdline").split(b"\0")
            if os.fsencode(place) in b" ".join(words) and b"run" in words and any(one.endswith(b"cafs-run") for one in words):
                found.append(int(name))
        return found

    kill_all(pid for pid in left() if read_proc(pid, "comm") != b"cafs-guard\n")  # that one cleans up
    wait(lambda: not left())


def listener(place: Path) -> int:
    """The sshd of a directory."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        title = read_proc(name, "cmdline")
        if title.startswith((b"sshd:", b"/usr/sbin/sshd")) and os.fsencode(place / "config") in title:
            return int(name)
    raise AssertionError(place)


def below(pid: int) -> list[int]:
    """Its children."""
    return [int(one) for one in read_proc(pid, f"task/{pid}/children").split()]


def sessions(place: Path) -> list[int]:
    return below(listener(place))


def lose(place: Path) -> None:
    """Nobody answers there any more."""
    pid = listener(place)
    children = below(pid)
    kill_all([pid, *children])
