"""A store in an S3 bucket, on moto's server: few requests, no lost update, resumed copies, no secret in what is said."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cafs import fsck, lease, s3
from cafs.errors import CafsError
from cafs.indexing import Options, create_image
from cafs.store import Store, open_or_init
from tests.conftest import Run
from tests.faultproxy import Proxy, free_port
from tests.waiting import SLOW

SECRET = "verysecretaccesskey"


class Bucket:
    """A bucket behind a counting proxy.  url: of a store in it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.url = f"s3://bucket/some/prefix?endpoint={proxy.url}&region=us-east-1"


@pytest.fixture
def bucket(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in (("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", SECRET)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        with Proxy(("127.0.0.1", port)) as proxy:
            client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
            client.create_bucket(Bucket="bucket")
            yield Bucket(proxy)
            for one in client.list_objects_v2(Bucket="bucket").get("Contents", []):
                client.delete_object(Bucket="bucket", Key=one["Key"])
            client.delete_bucket(Bucket="bucket")
    finally:
        server.stop()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Some 3 MB that do not compress, in 600 files and one large one."""
    root = tmp_path / "tree"
    (root / "many").mkdir(parents=True)
    for number in range(600):
        (root / "many" / f"{number}").write_bytes(os.urandom(3000))
    (root / "large").write_bytes(os.urandom(5 << 20))
    return root


def test_every_command_works_on_a_bucket(bucket: Bucket, tree: Path, tmp_path: Path, cmd: Run) -> None:
    made = cmd("cafs-index", "create", tree, "-t", "direct:1", "--store", bucket.url)
    assert made.returncode == 0, made.stderr
    assert cmd("cafs-index", "cat", "direct:1", "/many/7", "--store", bucket.url).stdout == (tree / "many" / "7").read_bytes()
    assert cmd("cafs-index", "verify", "direct:1", tree, "--store", bucket.url).stdout == b""
    assert cmd("cafs-index", "verify", "direct:1", "--store", bucket.url).returncode == 0
    assert cmd("cafs-store", "tag", "direct:1", "other:1", "--store", bucket.url).returncode == 0
    assert cmd("cafs-store", "ls", "-q", "--store", bucket.url).stdout == b"direct:1\nother:1\n"
    assert cmd("cafs-store", "untag", "other:1", "--store", bucket.url).returncode == 0
    assert cmd("cafs-store", "untag", "other:1", "--store", bucket.url).returncode == 4
    store = Store(bucket.url)
    record = json.loads(store.backend.read(lease.take(store.backend, "writer"), 4096)) | {"boot_id": "before"}
    store.backend.replace("leases/dead", json.dumps(record).encode())
    assert cmd("cafs-store", "fsck", "--store", bucket.url).stdout == b"dead-lease\tdead\n"
    assert cmd("cafs-store", "gc", "--store", bucket.url).returncode == 0
    assert cmd("cafs-store", "fsck", "--store", bucket.url).returncode == 0
    info = json.loads(cmd("cafs-store", "info", "--json", "--store", bucket.url).stdout)
    assert (info["images"], info["packs"], info["refs"]) == (1, 1, 1)
    assert cmd("cafs-store", "fsck", "--store", bucket.url).stdout == b""
    repair = cmd("cafs-store", "fsck", "--repair", "--store", bucket.url)
    assert repair.returncode == 8 and b"only a store in a directory" in repair.stderr
    assert cmd("cafs-store", "pull", "direct:1", bucket.url).returncode == 0
    assert cmd("cafs-index", "verify", "direct:1", tree).stdout == b""
    assert cmd("cafs-store", "fsck").stdout == b""


def test_pushing_takes_few_requests_and_again_next_to_none(bucket: Bucket, tree: Path, tmp_path: Path, cmd: Run) -> None:
    assert cmd("cafs-index", "create", tree, "-t", "a:1").returncode == 0
    first = cmd("cafs-store", "push", "a:1", bucket.url, "--json")
    assert first.returncode == 0 and json.loads(first.stdout)["packs"] == 1, first.stderr
    assert bucket.proxy.count("PUT") <= 12
    sent = sum(one[2] for one in bucket.proxy.log)
    before = len(bucket.proxy.log)
    assert cmd("cafs-store", "push", "a:1", bucket.url).returncode == 0
    again = bucket.proxy.log[before:]
    assert len(again) <= 8 and not [one for one in again if one[0] == "PUT"], again
    for number in range(540, 600):
        (tree / "many" / f"{number}").write_bytes(os.urandom(3000))
    assert cmd("cafs-index", "create", tree, "-t", "a:2").returncode == 0
    before = len(bucket.proxy.log)
    assert cmd("cafs-store", "push", "a:2", bucket.url).returncode == 0
    assert sum(one[2] for one in bucket.proxy.log[before:]) <= 0.12 * sent
    assert cmd("cafs-store", "fsck", "--store", bucket.url).stdout == b""


def test_two_writers_of_packs_list_lose_no_line_and_a_swap_no_update(bucket: Bucket, tmp_path: Path) -> None:
    stores = [open_or_init(bucket.url), Store(bucket.url)]

    def count(store: Store) -> None:
        for _ in range(10):
            store.backend.swap("counter", lambda before: b"%d" % (int(before or b"0") + 1))

    threads = [threading.Thread(target=count, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].backend.read("counter", 100) == b"20"
    assert not stores[0].backend.create("counter", b"x") and stores[0].backend.read("counter", 100) == b"20"


def test_a_server_without_conditional_writes_is_written_to_with_a_warning(
    bucket: Bucket, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.proxy.knows_conditions = False
    report = create_image(Options(str(tree)), bucket.url, "a:1")
    assert Store(bucket.url).get_ref("a:1") == bytes.fromhex(report.digest)
    assert "knows no conditional writes" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("fault", ["short", "reset", "503", "429", "stall", "trickle"])
def test_what_breaks_once_is_tried_again(
    bucket: Bucket, tree: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_S", 1.0 * SLOW)
    create_image(Options(str(tree)), bucket.url, "a:1")
    store = Store(bucket.url)
    done: list[str] = []

    def once(method: str, path: str) -> str | None:
        if "/packs/" in path and not done:
            done.append(path)
            return fault
        return None

    bucket.proxy.fault = once
    data = (tree / "many" / "5").read_bytes()
    store.refresh()
    assert store.read_object(store.hash(data)) == data and done


def test_an_interrupted_push_is_resumed(
    bucket: Bucket, tree: Path, tmp_path: Path, cmd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cafs.pack.PACK_TARGET", 1 << 20)
    create_image(Options(str(tree)), str(tmp_path / "store"), "a:1")
    packs = []

    def refuse(method: str, path: str) -> str | None:
        if method == "PUT" and "/packs/" in path and "list" not in path:
            packs.append(path)
            return "403" if len(packs) > 2 else None
        return None

    bucket.proxy.fault = refuse
    failed = cmd("cafs-store", "push", "a:1", bucket.url)
    assert failed.returncode == 7 and SECRET.encode() not in failed.stderr, failed.stderr
    assert b"AKIDEXAMPLE" not in failed.stderr and failed.stderr.count(b"\n") <= 2
    assert Store(bucket.url).get_ref("a:1") is None
    bucket.proxy.fault = lambda method, path: None
    before = len(bucket.proxy.log)
    assert cmd("cafs-store", "push", "a:1", bucket.url).returncode == 0
    sent = {path.split("?")[0] for method, path, _, _ in bucket.proxy.log[before:] if method == "PUT" and "/packs/" in path}
    assert not sent & {path.split("?")[0] for path in packs[:2]}, "what had arrived is not sent again"
    assert list(fsck.check(Store(bucket.url))) == []


def test_what_is_wrong_with_a_bucket_is_said(bucket: Bucket, tree: Path, cmd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = bucket.url.replace("s3://bucket/", "s3://nowhere/")
    done = cmd("cafs-store", "push", "a:1", nowhere)
    assert done.returncode in (4, 7)
    assert cmd("cafs-index", "create", tree, "-t", "a:1").returncode == 0
    done = cmd("cafs-store", "push", "a:1", nowhere)
    assert done.returncode == 7 and b"NoSuchBucket" in done.stderr
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    done = cmd("cafs-store", "ls", "--store", bucket.url)
    assert done.returncode == 7 and b"no credentials" in done.stderr
    for bad in ("s3://b", "s3://bucket/x?endpoint=ftp://x", "s3://bucket/x?nonsense=1"):
        with pytest.raises(CafsError, match="is not"):
            Store(bad)


def test_a_range_that_was_not_asked_for_is_not_taken_for_the_one_that_was(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = s3.S3Backend(bucket.url)
    backend.replace("x", b"0123456789")
    get = backend._client.get_object

    def from_the_front(Range: str = "", **options: object) -> object:
        size = int(Range[7:]) if Range.startswith("bytes=-") else 0
        return get(Range=f"bytes=0-{size - 1}" if size else Range, **options)

    monkeypatch.setattr(backend._client, "get_object", from_the_front)
    assert backend.read_tail("x", 4) == (b"6789", 10) and backend.read_tail("x", 40) == (b"0123456789", 10)
    assert backend.read_range("x", 3, 4) == b"3456" and backend.read_range("x", 8, 4) == b"89"
    monkeypatch.setattr(backend._client, "get_object", lambda Range="", **options: get(Range="bytes=0-3", **options))
    with pytest.raises(CafsError, match="another range"):
        backend.read_tail("x", 4)
