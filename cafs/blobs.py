"""Where the documents and layers of a saved image are: in a directory, or in an archive that is read once, front to back."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

from cafs import linux
from cafs.decompress import decompressed
from cafs.errors import CafsError, CorruptError, FormatError, NotFound, os_error, quote
from cafs.oci import JSON_MAX
from cafs.tar import Reader, is_header
from cafs.tarindex import MemberReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cafs.vtree import Inode

_BLOCK = 1 << 20
_AHEAD = 8
_HELD_MAX = 64 << 20
_EACH = 256
_COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


@dataclass(slots=True)
class Layer:
    """A layer that was read.  digests, diff_ids: ALGORITHM:HEX of the blob as it is stored, and uncompressed.  size: stored."""

    members: list[tuple[bytes, Inode]]
    digests: set[str]
    diff_ids: set[str]
    size: int


class _Hashing:
    """A stream that hashes what is read."""

    def __init__(self, stream: BinaryIO, algorithms: tuple[str, ...]) -> None:
        self._stream = stream
        self._hashes = [hashlib.new(name) for name in algorithms]
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.size += len(data)
        for one in self._hashes:
            one.update(data)
        return data

    def digests(self) -> set[str]:
        """Of what was read."""
        return {f"{one.name}:{one.hexdigest()}" for one in self._hashes}


class LayerStream:
    """The plain bytes of a layer, read, hashed and decompressed on a thread of its own, some megabytes ahead.

    name: of the blob; one of SHA-512 has its layer hashed so, too.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._algorithms = ("sha256", "sha512") if name.startswith("blobs/sha512/") else ("sha256",)
        self._blocks: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
        self._stopped = False
        self._block = b""
        self._ended = False
        self._raw = _Hashing(stream, self._algorithms)
        self._plain: _Hashing
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self, size: int = -1) -> bytes:
        """At most SIZE bytes; none at the end.  Raises what reading the blob raised."""
        while not self._block and not self._ended:
            found = self._blocks.get()
            if isinstance(found, Exception):
                self._ended = True
                raise found
            self._block, self._ended = found, not found
        data, self._block = self._block[:size], self._block[size:]
        return data

    def close(self) -> tuple[set[str], set[str], int]:
        """Stop reading.  Returns (digests, diff_ids, size), right only if all was read."""
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._blocks.get(timeout=0.1)
            except queue.Empty:
                continue
        return self._raw.digests(), self._plain.digests(), self._raw.size

    def _run(self) -> None:
        self._plain = _Hashing(cast(BinaryIO, self._raw), self._algorithms)
        try:
            self._plain = _Hashing(decompressed(cast(BinaryIO, self._raw)), self._algorithms)
            while (data := self._plain.read(_BLOCK)) and not self._stopped:
                self._blocks.put(data)
            while self._raw.read(_BLOCK) and not self._stopped:
                pass  # what follows a compressed stream is part of the blob
            self._blocks.put(b"")
        except Exception as error:  # for the thread that reads
            self._blocks.put(error)


def read_layer(reader: MemberReader, stream: LayerStream) -> Layer:
    """Read it all.  Raises CorruptError."""
    members = None
    try:
        members = reader.read(cast(BinaryIO, stream))
    finally:
        said = stream.close()
    return Layer(members, *said)


class DirectoryBlobs:
    """Blobs in a directory, such as an OCI layout.  No name or link leads out of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error(f"cannot read {quote(path)}", error) from error

    def read(self, name: str) -> bytes:
        """A document.  Raises NotFound, FormatError if it is too large."""
        with self._open(name) as file:
            data = file.read(JSON_MAX + 1)
        if len(data) > JSON_MAX:
            raise FormatError(f"{quote(name)} is over {JSON_MAX} bytes")
        return data

    def layers(self, names: Sequence[str], reader: MemberReader) -> Iterator[Layer]:
        """The layers, in this order; as many as there are threads are read and decompressed at once."""
        waiting: list[LayerStream] = []
        rest = iter(names)
        try:
            for name in rest:
                waiting.append(LayerStream(self._open(name), name))
                if len(waiting) >= reader.threads:
                    yield read_layer(reader, waiting.pop(0))
            while waiting:
                yield read_layer(reader, waiting.pop(0))
        finally:
            for stream in waiting:
                stream.close()

    def _open(self, name: str) -> BinaryIO:
        try:
            return open(linux.open_in_root(self._fd, name, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        except FileNotFoundError:
            raise NotFound(f"{quote(self.path)} has no {quote(name)}") from None
        except OSError as error:
            raise os_error(f"cannot read {quote(os.path.join(self.path, name))}", error) from error


class ArchiveBlobs:
    """Blobs in a tar, read once, as it comes: layers are indexed on the way, before anybody knows which are wanted."""

    def __init__(self, stream: BinaryIO, reader: MemberReader) -> None:
        self._documents: dict[str, bytes] = {}
        self._layers: dict[str, Layer | CafsError] = {}
        self._links: dict[str, str] = {}
        self._held = 0
        archive = Reader(decompressed(stream))
        for member in archive:
            name = os.fsdecode(member.name).removeprefix("./")
            self._hold(len(name) + len(member.link) + _EACH)
            if member.kind in b"lh":
                near = os.path.dirname(name) if member.kind == b"l" else ""
                self._links[name] = os.path.normpath(os.path.join(near, os.fsdecode(member.link)))
            elif member.kind == b"f":
                if member.segments != ((0, member.size),):
                    raise FormatError(f"the archive's {quote(name)} is sparse")
                self._take(name, _Content(archive), member.size, reader)

    def _take(self, name: str, content: _Content, size: int, reader: MemberReader) -> None:
        head = content.peek(512)
        if size >= 512 and (is_header(head) or head.startswith(_COMPRESSED)):
            try:
                self._layers[name] = read_layer(reader, LayerStream(cast(BinaryIO, content), name))
            except CorruptError as error:
                self._layers[name] = error  # it matters only if an image needs it
        elif size <= JSON_MAX:
            self._documents[name] = content.read()
            self._hold(size)

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > _HELD_MAX:
            raise FormatError("the archive has too many members, or too large documents")

    def _resolve(self, name: str) -> str:
        """The member that a name stands for: old archives have links between layers."""
        return self._links.get(name, name)

    def read(self, name: str) -> bytes:
        """A document.  Raises NotFound."""
        found = self._documents.get(self._resolve(name))
        if found is None:
            raise NotFound(f"the archive has no {quote(name)}")
        return found

    def layers(self, names: Sequence[str], reader: MemberReader) -> Iterator[Layer]:
        """The layers, in this order."""
        for name in names:
            found = self._layers.get(self._resolve(name))
            if found is None and self._resolve(name) in self._documents:  # one that is too small to be told from a document
                import io

                found = read_layer(reader, LayerStream(io.BytesIO(self.read(name)), name))
            if found is None:
                raise NotFound(f"the archive has no layer {quote(name)}")
            if isinstance(found, CafsError):
                raise CorruptError(f"layer {quote(name)}: {found}")
            yield replace(found, members=[(member, inode.copy()) for member, inode in found.members])


class _Content:
    """The content of the archive's current member as a stream."""

    def __init__(self, archive: Reader) -> None:
        self._pieces = archive.pieces(_BLOCK)
        self._ready = b""

    def _more(self) -> bool:
        found = next(self._pieces, None)
        if found is None:
            return False
        count, data = found
        self._ready += data or bytes(count * _BLOCK)
        return True

    def peek(self, size: int) -> bytes:
        while len(self._ready) < size and self._more():
            pass
        return self._ready[:size]

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            while self._more():
                pass
            size = len(self._ready)
        elif not self._ready:
            self._more()
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


def blob_name(digest: str) -> str:
    """Where an OCI layout has a blob."""
    return f"blobs/{digest.replace(':', '/', 1)}"


def digest_in(name: str) -> str | None:
    """The digest that a name in a docker archive promises, None if it promises none."""
    match = re.fullmatch(r"(?:blobs/(sha256|sha512)/)?([0-9a-f]{64}|[0-9a-f]{128})(?:\.json)?", name)
    return f"{match[1] or 'sha256'}:{match[2]}" if match else None
