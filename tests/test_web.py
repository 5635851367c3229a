"""A store behind a web server: lazily read, and whatever the network does, right bytes or a clear error in bounded time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cafs import web
from cafs.errors import CafsError
from cafs.indexing import Exclusion, Options, create_image
from cafs.store import Store
from tests.conftest import Run
from tests.faultproxy import FAULTS, Proxy, free_port
from tests.waiting import SLOW, wait_until

pytestmark = pytest.mark.needs("busybox")


@pytest.fixture
def served(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before a plain web server before a store with the image w:1; limits of seconds, not minutes."""
    for name, seconds in (("DEADLINE_S", 6.0 * SLOW), ("_READ_S", 1.0 * SLOW), ("_WAIT_S", 0.02)):
        monkeypatch.setattr(web, name, seconds)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "b"):
        (tree / name).write_bytes(name.encode() + os.urandom(4000))
    (tree / "large").write_bytes(os.urandom(5 << 20))
    create_image(Options(str(tree)), str(tmp_path / "origin"), "w:1")
    port = free_port()
    with subprocess.Popen(["busybox", "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(tmp_path)]) as server:
        try:
            wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            with Proxy(("127.0.0.1", port)) as proxy:
                monkeypatch.setenv("CAFS_STORE", f"{proxy.url}/origin")
                yield proxy
        finally:
            server.terminate()


def test_every_reading_command_works_over_http(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-index", "ls", "w:1").stdout.split() == [b"/", b"/a", b"/b", b"/large"]
    for name in ("a", "large"):
        assert cmd("cafs-index", "cat", "w:1", f"/{name}").stdout == (tmp_path / "tree" / name).read_bytes()
    assert cmd("cafs-index", "verify", "w:1").returncode == 0
    assert cmd("cafs-index", "verify", "w:1", tmp_path / "tree").stdout == b""
    digest = cmd("cafs-store", "push", "w:1", tmp_path / "copy", "--json").stdout
    assert b'"packs":1' in digest and cmd("cafs-store", "fsck", "--store", tmp_path / "copy").stdout == b""
    for arguments, code, said in (
        (["cafs-store", "ls"], 8, b"cannot be listed"),
        (["cafs-store", "tag", "w:1", "x:1"], 8, b"read-only"),
        (["cafs-index", "create", tmp_path / "tree"], 8, b"read-only"),
        (["cafs-index", "ls", "nothing:1"], 4, b"no image 'nothing:1'"),
    ):
        done = cmd(*arguments)
        assert done.returncode == code and said in done.stderr, done.stderr


def test_info_of_a_web_server_says_what_can_be_known(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    done = cmd("cafs-store", "info", "--json")
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    origin = json.loads(cmd("cafs-store", "info", "--json", "--store", tmp_path / "origin").stdout)
    assert (known["refs"], known["images"]) == (None, None) and (origin["refs"], origin["images"]) == (1, 1)
    for name in ("packs", "objects", "stored_bytes", "cache", "cache_bytes", "cache_hits"):
        assert known[name] == origin[name], name
    assert b"refs\t-\n" in cmd("cafs-store", "info").stdout


@pytest.mark.needs("root", "fuse", "fusermount3", "busybox")
def test_an_image_is_mounted_lazily_from_a_web_server(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    assert cmd("cafs-mount", "w:1", point).returncode == 0
    asked = [path for _, path, _, _ in served.log]
    assert not [path for path in asked if "/packs/" in path], "nothing is pulled, and no footer read"
    assert len(asked) <= 7, (
        "format, ref, image, index or metadata, locator, and where a profile may be: of the image, of its layer"
    )
    size = sum(one[3] for one in served.log)
    assert (point / "a").read_bytes() == (tmp_path / "tree" / "a").read_bytes()
    after = [one[1].split("/")[2] for one in served.log[len(asked) :]]
    assert [one for one in after if one != "profiles"] == ["packs"], "that is looked for beside the mount, or after it"
    assert sum(one[3] for one in served.log) - size < 10_000
    assert (point / "large").read_bytes() == (tmp_path / "tree" / "large").read_bytes()
    assert cmd("cafs-mount", "--unmount", point).returncode == 0


def test_a_ref_is_asked_for_by_its_etag_and_meta_is_kept(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    os.utime(tmp_path / "origin" / "refs" / "w" / "1", (1_000_000_000, 1_000_000_000))
    assert cmd("cafs-index", "ls", "w:1").returncode == 0
    before = len(served.log)
    assert cmd("cafs-index", "ls", "w:1").returncode == 0
    second = served.log[before:]
    assert [path.split("/")[2] for _, path, _, _ in second] == ["cafs-store.json", "refs"]
    assert second[1][3] == 0, "304 has no body"
    create_image(Options(str(tmp_path / "tree"), exclude=Exclusion(("/b",))), str(tmp_path / "origin"), "w:1")
    assert b"/b" not in cmd("cafs-index", "ls", "w:1").stdout, "a changed ref is seen at once"
    create_image(Options(str(tmp_path / "tree"), exclude=Exclusion(("/a",))), str(tmp_path / "origin"), "w:1")
    assert b"/a" not in cmd("cafs-index", "ls", "w:1").stdout, "also when it changed twice in the second of its ETag"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("how", ["once", "always"])
def test_whatever_the_network_does_it_ends_in_right_bytes_or_a_clear_error(
    served: Proxy, tmp_path: Path, fault: str, how: str
) -> None:
    content = {name: (tmp_path / "tree" / name).read_bytes() for name in ("a", "b")}
    store = Store(f"{served.url}/origin")
    store.refresh()
    digests = {name: store.hash(data) for name, data in content.items()}
    done = []

    def wrong(method: str, path: str) -> str | None:
        if "/packs/" in path and (how == "always" or not done):
            done.append(path)
            return fault
        return None

    served.fault = wrong
    begin = time.monotonic()
    try:
        assert store.read_object(digests["a"]) == content["a"]
        outcome = "right"
    except CafsError as error:
        outcome = "error"
        assert "Traceback" not in str(error) and error.exit_code in (4, 5, 7), error
    assert time.monotonic() - begin < 30 * SLOW and done
    if fault in ("redirect", "no-ranges") or (how == "once" and fault not in ("403", "404", "redirect-loop")):
        assert outcome == "right", "what passes is tried again"
    elif how == "always":
        assert outcome == "error"
    served.fault = lambda method, path: None
    assert store.read_object(digests["b"]) == content["b"], "and afterwards all is well"


@pytest.mark.parametrize("fault", ["error-page", "404"])
@pytest.mark.parametrize("what", ["cafs-store.json", "refs", "image", "index"])
def test_a_broken_document_is_a_clear_error(served: Proxy, tmp_path: Path, cmd: Run, what: str, fault: str) -> None:
    served.fault = lambda method, path: fault if what in path else None
    done = cmd("cafs-index", "ls", "w:1")
    assert done.returncode in (4, 5, 7) and b"Traceback" not in done.stderr and done.stdout == b"", done.stderr
    served.fault = lambda method, path: None
    assert cmd("cafs-index", "ls", "w:1").returncode == 0


def test_a_password_in_an_address_is_sent_and_never_shown(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    url = served.url.replace("http://", "http://joe:s3cret@")
    assert cmd("cafs-index", "ls", "w:1", "--store", f"{url}/origin").returncode == 0
    done = cmd("cafs-index", "ls", "w:1", "--store", f"{url}/nowhere")
    assert done.returncode == 4 and b"s3cret" not in done.stderr, done.stderr
    done = cmd("cafs-store", "tag", "w:1", "x:1", "--store", f"{url}/origin")
    assert b"read-only" in done.stderr and b"s3cret" not in done.stderr


def test_a_proxy_of_the_environment_is_used(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    environment = os.environ | {"http_proxy": served.url, "no_proxy": ""}
    done = cmd("cafs-index", "ls", "w:1", "--store", "http://images.example/origin", env=environment)
    assert done.returncode != 0 and any(path.startswith("http://images.example/") for _, path, _, _ in served.log)


def test_pulling_without_a_url_fills_the_cache(served: Proxy, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-store", "pull", "w:1").returncode == 0
    before = len(served.log)
    assert cmd("cafs-store", "pull", "w:1").returncode == 0
    assert not [path for _, path, _, _ in served.log[before:] if "/packs/" in path]
    shutil.rmtree(tmp_path / "cache")
    assert cmd("cafs-store", "pull", "w:1", f"{served.url}/origin", "--store", tmp_path / "mine").returncode == 0
    assert cmd("cafs-store", "ls", "-q", "--store", tmp_path / "mine").stdout == b"w:1\n"


def test_an_answer_that_says_it_is_endless_is_refused_at_once(home: Path, tmp_path: Path, cmd: Run) -> None:
    import threading

    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\nx")

    threading.Thread(target=serve, daemon=True).start()
    begin = time.monotonic()
    done = cmd("cafs-store", "ls", "--store", f"http://127.0.0.1:{listener.getsockname()[1]}/x")
    assert done.returncode == 1 and b"larger than 65536 bytes" in done.stderr and time.monotonic() - begin < 10 * SLOW
    listener.close()


@pytest.mark.parametrize("proxy", ["http://u:s3cret@127.0.0.1:99999", "socks5://127.0.0.1:1", "http://[bad"])
def test_a_proxy_that_is_none_is_said_without_its_password(home: Path, cmd: Run, proxy: str) -> None:
    environment = os.environ | {"http_proxy": proxy, "no_proxy": ""}
    done = cmd("cafs-store", "ls", "--store", "http://images.example/x", env=environment)
    assert done.returncode == 2 and b"s3cret" not in done.stderr and b"internal" not in done.stderr, done.stderr


@pytest.mark.parametrize("url", ["http://[bad/", "s3://[bad/", "http:///x", "http://h/x?y=1"])
def test_an_address_that_is_none_is_a_usage_error(home: Path, cmd: Run, url: str) -> None:
    done = cmd("cafs-store", "ls", "--store", url)
    assert done.returncode == 2 and b"internal" not in done.stderr, done.stderr


def test_verify_tells_a_network_that_fails_from_damage(served: Proxy, cmd: Run) -> None:
    served.fault = lambda method, path: "403" if "/packs/" in path and "list" not in path else None
    assert cmd("cafs-index", "verify", "w:1").returncode == 7
