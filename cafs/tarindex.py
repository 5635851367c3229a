"""From a tar stream to an index: members in, objects put as they come, the tree's lines at the end.  Nothing is extracted."""

from __future__ import annotations

from dataclasses import dataclass, field

from cafs import format as fmt
from cafs.decompress import decompressed
from cafs.errors import FormatError, quote
from cafs.format import Header
from cafs.objects import Made, ObjectMaker, is_zero
from cafs.ordered import ordered_map
from cafs.tar import Member, Reader
from cafs.vtree import Inode, VirtualTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from cafs.writer import Writer

    Members = list[tuple[bytes, Inode]]

_BATCH_FILES = 128
_BATCH_BYTES = 1 << 21


@dataclass(slots=True)
class _Piece:
    """Some content of a file: DATA, or COUNT chunks of zeros.  is_last: of the file."""

    inode: Inode
    count: int
    data: bytes
    is_last: bool
    name: bytes


@dataclass
class MemberReader:
    """Reads the members of archives and puts their content.  progress: called with (members, bytes) now and then."""

    header: Header
    writer: Writer | None = None
    threads: int = 2
    progress: Callable[[int, int], None] | None = None
    bytes_seen: int = 0
    files_read: int = 0
    left_out: int = 0
    members: int = 0
    _runs: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._maker = ObjectMaker(self.header, self.writer)

    def read(self, stream: BinaryIO) -> Members:
        """All members of one plain archive, in order, read to the end.  Raises CorruptError."""
        found: Members = []
        self._runs = []  # an archive before this one may have ended in the middle of a file
        batches = self._batches(self._pieces(stream, found))
        for batch in ordered_map(self._do_batch, batches, self.threads, window=4 * self.threads):
            for piece, made in batch:
                self._keep(piece, made)
        return found

    def _batches(self, pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
        batch: list[_Piece] = []
        size = 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece.data)
            if len(batch) >= _BATCH_FILES or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _pieces(self, stream: BinaryIO, found: Members) -> Iterator[_Piece]:
        """Note every member, and yield what it holds."""
        reader = Reader(stream)
        for member in reader:
            if max(len(member.name), len(member.link)) > 2 * fmt.PATH_MAX:
                raise FormatError(f"name {quote(member.name[:64])}... is too long")
            self.members += 1
            inode = self._inode(member)
            found.append((member.name, inode))
            if self.progress and self.members % 500 == 0:
                self.progress(self.members, self.bytes_seen)
            yield from self._content(reader, member, inode)
        if not found and not reader.ended:
            raise FormatError("not a tar archive, it is empty")

    def _content(self, reader: Reader, member: Member, inode: Inode) -> Iterator[_Piece]:
        done = 0
        step = self.header.chunk_size
        for count, data in reader.pieces(step):
            done += count * step
            if not data and member.size <= step:
                data = bytes(member.size)  # only chunks of larger files are runs of zeros
            yield _Piece(inode, count, data, done >= member.size, member.name)

    def _inode(self, member: Member) -> Inode:
        mode = 0o777 if member.kind == fmt.SYMLINK else member.mode
        inode = Inode(member.kind, mode, member.uid, member.gid, member.mtime_ns)
        inode.size = member.size
        inode.target = member.link
        inode.device = member.device
        inode.xattrs = tuple(pair for pair in member.xattrs if fmt.xattr_allowed(pair[0]))
        fmt.check_xattrs(inode.xattrs)
        self.left_out += len(member.xattrs) - len(inode.xattrs)
        if member.kind == fmt.FILE and member.size > self.header.chunk_size:
            inode.kind = fmt.CHUNKED
        return inode

    def _do_batch(self, batch: list[_Piece]) -> list[tuple[_Piece, Made | None]]:
        """On a thread."""
        results: list[tuple[_Piece, Made | None]] = [(piece, None) for piece in batch]
        wanted = [
            at for at, piece in enumerate(batch) if piece.data and not (piece.inode.kind == fmt.CHUNKED and is_zero(piece.data))
        ]
        for at, made in zip(wanted, self._maker.make_all([batch[at].data for at in wanted]), strict=True):
            results[at] = batch[at], made
            batch[at].data = b""
        return results

    def _keep(self, piece: _Piece, made: Made | None) -> None:
        """Put an object, or one more chunk of a file."""
        if made:
            self._maker.put(made)
        inode = piece.inode
        if inode.kind == fmt.CHUNKED:
            self._runs.append((piece.count, made.digest if made else b""))
            if not piece.is_last:
                return
            made, self._runs = self._maker.make_list(inode.size, self._runs, piece.name), []
            self._maker.put(made)
        if made:
            inode.digest = made.digest
            self.bytes_seen += inode.size
            self.files_read += 1


@dataclass
class TreeIndexer:
    """One indexing run over archives.  The counterpart of create.Indexer, with the same results.

    build: reads the archives with `reader` and returns the finished tree.
    """

    reader: MemberReader
    build: Callable[[MemberReader], VirtualTree]
    exclude: Callable[[bytes], bool] | None = None
    skipped: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def bytes_seen(self) -> int:
        """Size of all files read."""
        return self.reader.bytes_seen

    @property
    def files_read(self) -> int:
        """Number of files read."""
        return self.reader.files_read

    @property
    def left_out(self) -> int:
        """Number of xattrs that an index does not list."""
        return self.reader.left_out

    def run(self) -> bytes:
        """The whole index file.  Raises CorruptError on what is not sound, or what no index can say."""
        lines = [self.reader.header.encode()]
        for entry in self.build(self.reader).entries(self.exclude):
            try:
                fmt.check_limits(entry)
            except FormatError as error:
                raise FormatError(f"{quote(entry.path)}: {error}") from error
            lines.append(entry.encode())
        lines.append(fmt.encode_trailer(len(lines) - 1))
        return b"".join(lines)


def tar_tree(reader: MemberReader, stream: BinaryIO) -> VirtualTree:
    """The tree in one archive, compressed or not; no name in it has a special meaning.  Raises CorruptError."""
    tree = VirtualTree()
    for name, inode in reader.read(decompressed(stream)):
        tree.put(name, inode)
    tree.finish()
    return tree
