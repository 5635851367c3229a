"""A store in an S3 bucket: s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME].  The only module that imports boto3.

A pack is one PUT.  Refs and packs/list are changed by conditional writes (If-Match, If-None-Match), so that two writers
cannot lose an update; a server that does not know them (501) is written to all the same, with a warning.  Credentials come
from where boto3 looks for them and are never part of a URL or a message.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from cafs import atomic, paths
from cafs.backend import Backend, Listed
from cafs.errors import BusyError, RemoteError, UsageError, quote
from cafs.extras import extra

with extra("s3"):
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")
READ_S = 30.0
_SLOWEST = 1 << 16  # bytes a second
_STEP = 1 << 20
_TRIES = 4
_SWAPS = 30
_PART = 128 << 20
_CONDITION = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NotImplemented", "501")
_log = logging.getLogger(__name__)


class S3Backend(Backend):
    """One bucket and prefix."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise UsageError(f"{quote(url)} is not s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]") from None
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        endpoint, region = options.pop("endpoint", None), options.pop("region", None)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc) or options or parts.fragment:
            raise UsageError(f"{quote(url)} is not s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise UsageError(f"endpoint {quote(endpoint)} is not an address")
        super().__init__(url)
        self.bucket = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self.identity = f"s3://{self.bucket}/{self._prefix}?{endpoint or ''}"
        self._warned = False
        config = Config(
            connect_timeout=10,
            read_timeout=READ_S,
            max_pool_connections=16,
            retries={"mode": "standard", "max_attempts": _TRIES},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            self._client: Any = boto3.client("s3", endpoint_url=endpoint, region_name=region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise RemoteError(f"cannot use store {quote(url)}: {error}") from None

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _call(self, what: str, name: str, call: Callable[[], Result], *, is_conditional: bool = False) -> Result:
        """Do it, again if an answer broke off.  Raises FileNotFoundError, RemoteError.

        is_conditional: let a ClientError out that says that a condition did not hold, or is not known.
        """
        problem: Exception | None = None
        for again in range(_TRIES):
            try:
                return call()
            except ClientError as error:
                if _code(error) in ("NoSuchKey", "404"):
                    raise FileNotFoundError(2, "No such file or directory", name) from None
                if is_conditional and _code(error) in _CONDITION:
                    raise
                hint = "is there such a bucket?" if _code(error) == "NoSuchBucket" else None
                raise RemoteError(f"cannot {what} {quote(name)} in {quote(self.url)}: {_said(error)}", hint=hint) from None
            except NoCredentialsError:
                raise RemoteError(
                    f"cannot {what} {quote(name)} in {quote(self.url)}: no credentials",
                    hint="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
                ) from None
            except (BotoCoreError, OSError) as error:
                problem = error
            time.sleep(0.1 * 2**again * (0.5 + random.random()))
        raise RemoteError(f"cannot {what} {quote(name)} in {quote(self.url)}: {problem}") from None

    def _get(self, name: str, limit: int, **options: Any) -> tuple[bytes, dict[str, Any]]:
        def get() -> tuple[bytes, dict[str, Any]]:
            found = self._client.get_object(Bucket=self.bucket, Key=self._key(name), **options)
            body = found["Body"]  # not as a context: that gives the stream below it, with errors of its own
            try:
                if found["ContentLength"] > limit:
                    raise RemoteError(f"{quote(name)} in {quote(self.url)} is over {limit} bytes")
                data = _whole(body, found["ContentLength"])
            finally:
                body.close()
            if len(data) != found["ContentLength"]:
                raise OSError(5, "the answer broke off")
            return data, found

        return self._call("read", name, get)

    def read(self, name: str, limit: int) -> bytes:
        return self._get(name, limit)[0]

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            data, found = self._get(name, size, Range=f"bytes={offset}-{offset + size - 1}")
        except RemoteError as error:
            if "InvalidRange" in str(error):
                return b""
            raise
        start, total = _range(data, found)
        if start != offset or len(data) != min(size, total - offset):
            raise RemoteError(
                f"cannot read {quote(name)} in {quote(self.url)}: the server sent another range than it was asked for"
            )
        return data

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        data, found = self._get(name, size, Range=f"bytes=-{size}")
        start, total = _range(data, found)
        if start + len(data) != total or len(data) != min(size, total):  # it does not know ranges from the end
            data = self.read_range(name, max(total - size, 0), size)
        return data, total

    def exists(self, name: str) -> bool:
        try:
            self._call("read", name, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)))
        except FileNotFoundError:
            return False
        return True

    def list(self, directory: str) -> list[Listed]:
        prefix = self._key(directory + "/")

        def pages() -> list[Listed]:
            found = []
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for one in page.get("Contents", []):
                    found.append(Listed(one["Key"][len(prefix) :], one["Size"], one["LastModified"].timestamp()))
            return sorted(found, key=lambda one: one.name)

        return self._call("list", directory, pages)

    def _put(self, name: str, data: bytes, **conditions: str) -> bool:
        """Whether the conditions held.  A server that knows none is told so once."""

        def put(**options: str) -> None:
            self._call(
                "write",
                name,
                lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **options),
                is_conditional=bool(options),
            )

        try:
            put(**conditions)
            return True
        except ClientError as error:
            if _code(error) not in ("NotImplemented", "501"):
                return False
        if not self._warned:
            self._warned = True
            _log.warning("%s knows no conditional writes: two writers at once may lose an update", self.url)
        put()
        return True

    def create(self, name: str, data: bytes) -> bool:
        return self._put(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes) -> None:
        self._put(name, data)

    def swap(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        for again in range(_SWAPS):
            try:
                before, found = self._get(name, 1 << 28)
                condition = {"IfMatch": found["ETag"]}
            except FileNotFoundError:
                before, condition = None, {"IfNoneMatch": "*"}
            if self._put(name, change(before), **condition):
                return
            time.sleep(0.02 * again * random.random())
        raise BusyError(f"cannot write {quote(name)} in {quote(self.url)}: others write it all the time")

    def remove(self, name: str) -> None:
        if not self.exists(name):
            raise FileNotFoundError(2, "No such file or directory", name)
        self._call("remove", name, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(name)))

    def touch(self, name: str) -> None:
        self.replace(name, self.read(name, 1 << 20))

    def scratch(self) -> str:
        path = os.path.join(paths.cache(), "upload")
        paths.make_private(paths.cache(), "upload")
        return path

    def publish(self, temporary: str, name: str) -> None:
        def upload() -> None:
            if os.path.getsize(temporary) <= _PART:
                with open(temporary, "rb") as file:
                    self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=file)
            else:
                parts = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART // 2)
                self._client.upload_file(temporary, self.bucket, self._key(name), Config=parts)

        self._call("write", name, upload)
        atomic.unlink_quietly(temporary)

    def prepare(self) -> None:
        """Nothing: an object needs no directory."""

    def is_free(self) -> bool:
        query = {"Bucket": self.bucket, "Prefix": self._prefix, "Delimiter": "/", "MaxKeys": 2}
        found = self._call("list", "", lambda: self._client.list_objects_v2(**query))
        scopes = [one for one in found.get("CommonPrefixes", []) if one["Prefix"] == f"{self._prefix}scopes/"]
        return bool(found.get("KeyCount", 0) == len(scopes))


def _whole(body: Any, size: int) -> bytes:
    """An answer's body.  Raises OSError if it takes longer than a slow but steady line would."""
    deadline = time.monotonic() + READ_S + size / _SLOWEST
    parts = []
    stream = getattr(body, "_raw_stream", body)  # botocore's own read() returns only when all has come
    try:
        while part := stream.read1(_STEP) if hasattr(stream, "read1") else stream.read(_STEP):
            parts.append(part)
            if time.monotonic() > deadline:
                raise OSError(5, "the answer comes too slowly")
    except Exception as error:  # whatever the layers below botocore raise
        raise error if isinstance(error, OSError) else OSError(5, "the answer broke off") from error
    return b"".join(parts)


def _range(data: bytes, answer: dict[str, Any]) -> tuple[int, int]:
    """Where what was sent begins in the file, and the size of that (RFC 9110, Content-Range)."""
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", str(answer.get("ContentRange", "")))
    return (int(found[1]), int(found[2])) if found else (0, len(data))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _said(error: ClientError) -> str:
    """The server's code and first line; a message may quote keys only, never secrets."""
    message = str(error.response.get("Error", {}).get("Message", "")).partition("\n")[0][:200]
    return f"{_code(error)}: {message}" if message else _code(error)
