"""The Dockerfile and the context that cbuild's arguments name."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import contextmanager
from typing import BinaryIO, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.context import Context
    from builder.lexer import Dockerfile
    from cafs.writer import Writer

_HEAD = 262
_NAMES = ("Dockerfile", "dockerfile", "Containerfile")


def dockerfile_of(context: str) -> str:
    """Path of the Dockerfile in a directory.  Raises NotFound."""
    from cafs.errors import NotFound, quote

    if not os.path.isdir(context):
        raise NotFound(f"no directory {quote(context)}")
    for name in _NAMES:
        path = os.path.join(context, name)
        if os.path.lexists(path):
            return os.path.normpath(path)
    raise NotFound(f"no Dockerfile in {quote(context)}", hint="-f FILE names another")


@contextmanager
def opened(context: str, file: str | None, writer: Writer) -> Iterator[tuple[Dockerfile, Context | None]]:
    """Both.  Raises CafsError."""
    from builder import fetch
    from builder.build import read_dockerfile
    from builder.context import open_context
    from builder.lexer import parse
    from cafs.errors import UsageError

    if context == "-" and file == "-":
        raise UsageError("the context and the Dockerfile cannot both be on stdin")
    if context == "-":
        with tempfile.TemporaryDirectory(prefix="cafs-context-") as directory:
            data = _head()
            if _is_archive(data):
                _unpack(cast(BinaryIO, io.BufferedReader(_Joined(data))), os.path.join(directory, "context"), writer)
                yield _inside(os.path.join(directory, "context"), file, writer)
            else:
                yield parse(data + _Joined(b"").readall(), "Dockerfile"), None
        return
    if fetch.GIT.fullmatch(context) or fetch.URL.fullmatch(context):
        with tempfile.TemporaryDirectory(prefix="cafs-context-") as directory:
            yield _fetched(context, file, directory, writer)
        return
    if file == "-":
        yield parse(sys.stdin.buffer.read(), "Dockerfile"), open_context(context, None, writer)
        return
    name = file or dockerfile_of(context)
    found = open_context(context, name, writer)
    yield read_dockerfile(name), found


def _head() -> bytes:
    """What tells an archive from a Dockerfile; a pipe may give a byte at a time."""
    data = b""
    while len(data) < _HEAD and (more := os.read(0, _HEAD - len(data))):
        data += more
    return data


def _is_archive(head: bytes) -> bool:
    magics = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
    return head.startswith(magics) or head[257:262] == b"ustar"


def _inside(top: str, file: str | None, writer: Writer) -> tuple[Dockerfile, Context]:
    """A context that was unpacked for us, with its Dockerfile, which a link in it does not lead out of."""
    from builder.context import open_context
    from builder.lexer import FILE_MAX, parse
    from cafs import atomic, linux
    from cafs.errors import os_error, quote

    name = file or os.path.relpath(dockerfile_of(top), top)
    root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = linux.open_in_root(root, name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise os_error(f"cannot read {quote(name)}", error) from error
    finally:
        os.close(root)
    try:
        data = atomic.read_exactly(fd, FILE_MAX, 0)
    finally:
        os.close(fd)
    return parse(data, name), open_context(top, os.path.join(top, name), writer)


def _fetched(context: str, file: str | None, directory: str, writer: Writer) -> tuple[Dockerfile, Context | None]:
    """A git repository, an archive, or a Dockerfile, from elsewhere.  Raises CafsError."""
    from builder import fetch
    from builder.lexer import parse
    from cafs.errors import NotFound, UsageError, quote

    top = os.path.join(directory, "context")
    if fetch.GIT.fullmatch(context):
        os.mkdir(top)
        try:
            _, inner = fetch.clone(context, top, keeps=False)
        except ValueError as error:
            raise UsageError(str(error)) from None
        real = os.path.realpath(os.path.join(top, inner))
        if not os.path.isdir(real) or not (real + "/").startswith(os.path.realpath(top) + "/"):
            raise NotFound(f"no directory {quote(inner)} in {quote(context)}")
        return _inside(real, file, writer)
    path = os.path.join(directory, "fetched")
    fetch.download(context, path)
    with open(path, "rb") as stream:
        if not _is_archive(stream.read(_HEAD)):
            stream.seek(0)
            return parse(stream.read(), "Dockerfile"), None
        stream.seek(0)
        _unpack(stream, top, writer)
    return _inside(top, file, writer)


def _unpack(stream: BinaryIO, directory: str, writer: Writer) -> None:
    """Into a directory of ours: by our own reader of archives, and a check-out that follows no link of theirs."""
    from cafs import checkout
    from cafs.format import Header
    from cafs.index import load
    from cafs.tarindex import MemberReader, TreeIndexer, tar_tree

    reader = MemberReader(Header(writer.store.hash_name, writer.store.chunk_size), writer, os.cpu_count() or 1)
    data = TreeIndexer(reader, lambda reader: tar_tree(reader, stream)).run()
    writer.flush()
    checkout.checkout(load(io.BytesIO(data)), writer.store, directory)


class _Joined(io.RawIOBase):
    """What was read of stdin, and the rest of it."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data, self._head = self._head[: len(view)] or os.read(0, len(view)), self._head[len(view) :]
        view[: len(data)] = data
        return len(data)
