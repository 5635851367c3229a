"""Frames and packs: bytes <-> records.  cafs-store(5), FRAMES and PACKS.

A frame is one object, raw or zstd, behind a small header with a checksum.  A pack is a magic, frames, and a footer that
says where each object is.
"""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from bisect import bisect_left

from cafs.digest import DIGEST_SIZES, checksum
from cafs.errors import CorruptError, FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

FRAME = struct.Struct("<4sBBHII8s")
"""magic, codec, kind, zero, stored size, raw size, first 8 bytes of the payload's XXH3-128."""

FRAME_MAGIC = b"CAFR"
RAW, ZSTD = 0, 1
RAW_MAX = 1 << 26
"""No frame holds more than this: the largest chunk, and the largest chunk list.  Checked before allocation."""

PACK_MAGIC = b"\x89CAFSPK1"
PACK_TARGET = 64 << 20
FOOTER = struct.Struct("<16s8sIHH16s8s")
"""hash name, zero, record count, record size, version, XXH3-128 of records and the 32 bytes before, magic."""

FOOTER_MAGIC = b"CAFSPKF1"
_BATCH = 32 << 20
_TAIL = struct.Struct("<BQII")
_LOCAL = threading.local()


def encode_frame(raw: bytes, kind: int, payload: bytes | None) -> bytes:
    """A frame.  payload: what zstd made of RAW, or None to store it as it is."""
    body = raw if payload is None else payload
    codec = RAW if payload is None else ZSTD
    return FRAME.pack(FRAME_MAGIC, codec, kind, 0, len(body), len(raw), checksum(body)[:8]) + body


def frame_raw_size(frame: Buffer) -> int:
    """Size of the object in a whole or partial frame."""
    return int(FRAME.unpack_from(frame)[5])


def frame_size(head: bytes) -> int:
    """Size of the whole frame that begins with these FRAME.size bytes; 0 if they begin none."""
    if len(head) < FRAME.size or not head.startswith(FRAME_MAGIC):
        return 0
    stored = int(FRAME.unpack(head)[4])
    return FRAME.size + stored if stored <= RAW_MAX else 0


def decode_frame(frame: Buffer) -> tuple[bytes | memoryview, int]:
    """The object's bytes, those of the frame itself if they are not compressed, and its kind.

    Raises CorruptError on anything that does not fit, before allocating for it.
    """
    codec, kind, raw_size, body = _opened(memoryview(frame))
    return body if codec == RAW else _decompress(body, raw_size), kind


def decode_frames(frames: Iterable[Buffer]) -> Iterator[tuple[memoryview, int] | CorruptError]:
    """`decode_frame` of each, or why not.  Many are decompressed in one call: the interpreter is waited for once.

    The objects are not copied: one that is kept keeps the memory of its neighbours, some 32 MiB.
    """
    batch: list[tuple[int, int, int, memoryview] | CorruptError] = []
    size = 0
    for frame in frames:
        try:
            batch.append(one := _opened(memoryview(frame)))
            size += one[2]
        except CorruptError as error:
            batch.append(error)
        if size > _BATCH:
            yield from _decode_batch(batch)
            batch, size = [], 0
    yield from _decode_batch(batch)


def _decode_batch(
    batch: list[tuple[int, int, int, memoryview] | CorruptError],
) -> Iterator[tuple[memoryview, int] | CorruptError]:
    compressed = [one for one in batch if not isinstance(one, CorruptError) and one[0] == ZSTD]
    unpacked = iter(_decompress_all([one[3] for one in compressed], [one[2] for one in compressed]))
    for one in batch:
        if isinstance(one, CorruptError):
            yield one
        elif one[0] == RAW:
            yield one[3], one[1]
        else:
            raw = next(unpacked)
            yield raw if isinstance(raw, CorruptError) else (raw, one[1])


def _opened(frame: memoryview) -> tuple[int, int, int, memoryview]:
    """(codec, kind, raw size, payload) of a frame, checked as far as that goes without decompressing."""
    if len(frame) < FRAME.size:
        raise CorruptError("frame is cut off")
    magic, codec, kind, zero, stored, raw_size, check = FRAME.unpack_from(frame)
    body = frame[FRAME.size :]
    if magic != FRAME_MAGIC or zero or codec not in (RAW, ZSTD) or kind not in (0, 1) or raw_size > RAW_MAX:
        raise CorruptError("frame has a bad header")
    if len(body) != stored or checksum(body)[:8] != check:
        raise CorruptError("frame has a bad checksum")
    if codec == RAW and stored != raw_size:
        raise CorruptError("raw frame of two sizes")
    return codec, kind, raw_size, body


def _decompress_all(bodies: list[memoryview], raw_sizes: list[int]) -> list[memoryview | CorruptError]:
    import zstandard

    # python-zstandard 0.25 overruns its memory if a frame of size 0 is among them, so those go one by one.
    if len(bodies) > 1 and all(raw_sizes) and hasattr(zstandard.ZstdDecompressor, "multi_decompress_to_buffer"):
        views: list[bytes | bytearray | memoryview] = [*bodies]
        sizes = array("Q", raw_sizes)
        try:
            if list(map(zstandard.frame_content_size, bodies)) == raw_sizes:
                found = zstandard.ZstdDecompressor().multi_decompress_to_buffer(views, decompressed_sizes=sizes.tobytes())
                return [memoryview(found[at]) for at in range(len(bodies))]  # type: ignore[arg-type]
        except (zstandard.ZstdError, ValueError):
            pass  # one by one shows which
    return [_decompressed(body, raw_size) for body, raw_size in zip(bodies, raw_sizes, strict=True)]


def _decompressed(body: memoryview, raw_size: int) -> memoryview | CorruptError:
    try:
        return memoryview(_decompress(body, raw_size))
    except CorruptError as error:
        return error


def _decompress(body: memoryview, raw_size: int) -> bytes:
    import zstandard

    try:
        declared = zstandard.frame_content_size(body)
        if declared != raw_size:
            raise CorruptError("zstd frame does not declare its size")
        if not hasattr(_LOCAL, "decompressor"):
            _LOCAL.decompressor = zstandard.ZstdDecompressor()  # its context costs more than a small object
        raw = bytes(_LOCAL.decompressor.decompress(body, max_output_size=raw_size, allow_extra_data=False))
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptError(f"zstd: {error}") from error
    if len(raw) != raw_size:
        raise CorruptError("zstd frame is shorter than it says")
    return raw


def prefixes(records: bytes, size: int) -> array[int]:
    """The first 8 bytes of each record as numbers: bisecting those runs in C, some ten times as fast as bisecting slices."""
    found = array("Q", b"".join([records[at : at + 8] for at in range(0, len(records), size)]))
    if sys.byteorder == "little":
        found.byteswap()
    return found


class Records:
    """The sorted records of a pack's footer: fixed size, digest and kind first, so that they can be bisected as bytes.

    A record: digest, kind (1 byte), offset (8), size of the whole frame (4), raw size (4), little-endian.
    """

    def __init__(self, hash_name: str, data: bytes = b"") -> None:
        self.hash_name = hash_name
        self.digest_size = DIGEST_SIZES[hash_name]
        self.size = self.digest_size + _TAIL.size
        self.data = data
        self._prefixes: array[int] | None = None

    def __len__(self) -> int:
        return len(self.data) // self.size

    @classmethod
    def build(cls, hash_name: str, rows: Iterable[tuple[bytes, int, int, int, int]]) -> Records:
        """Sort (digest, kind, offset, frame size, raw size) rows into records."""
        packed = sorted(digest + _TAIL.pack(kind, offset, stored, raw) for digest, kind, offset, stored, raw in rows)
        return cls(hash_name, b"".join(packed))

    def rows(self) -> Iterator[tuple[bytes, int, int, int, int]]:
        """(digest, kind, offset, frame size, raw size) in order."""
        split = self.digest_size
        for at in range(0, len(self.data), self.size):
            kind, offset, stored, raw = _TAIL.unpack_from(self.data, at + split)
            yield self.data[at : at + split], kind, offset, stored, raw

    def find(self, digest: bytes, kind: int) -> tuple[int, int] | None:
        """(offset, frame size) of an object, None if the pack does not have it."""
        if self._prefixes is None:
            self._prefixes = prefixes(self.data, self.size)
        key, size = digest + bytes([kind]), self.size
        at = bisect_left(self._prefixes, int.from_bytes(digest[:8], "big")) * size
        while (found := self.data[at : at + len(key)]) < key and found:
            at += size
        if found != key:
            return None
        _, offset, stored, _ = _TAIL.unpack_from(self.data, at + len(digest))
        return offset, stored

    def encode_footer(self) -> bytes:
        """Records and the fixed tail, as they end a pack."""
        head = struct.pack("<16s8sIHH", self.hash_name.encode(), b"", len(self), self.size, 1)
        return self.data + head + checksum(self.data + head) + FOOTER_MAGIC


class Filter:
    """Says at once that an object is in none of many packs: one bit of 2 MiB by the first three bytes of its digest."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, records: Records) -> None:
        """Take in the objects of a pack."""
        self._bits = self._bits or bytearray(1 << 21)
        for at in range(0, len(records.data), records.size):
            number = int.from_bytes(records.data[at : at + 3], "big")
            self._bits[number >> 3] |= 1 << (number & 7)

    def may_have(self, digest: bytes) -> bool:
        """False: no pack has it.  True: look."""
        number = int.from_bytes(digest[:3], "big")
        return bool(self._bits) and bool(self._bits[number >> 3] >> (number & 7) & 1)


def footer_size(tail: bytes) -> int:
    """Size of the whole footer, from the last FOOTER.size bytes of a pack."""
    if len(tail) != FOOTER.size or not tail.endswith(FOOTER_MAGIC):
        raise FormatError("pack has no footer")
    _, _, count, size, _, _, _ = FOOTER.unpack(tail)
    return int(count) * int(size) + FOOTER.size


def decode_footer(footer: bytes, pack_size: int) -> Records:
    """The records of a footer.  pack_size: bounds every offset.  Raises FormatError."""
    name, zero, _, size, version, check, _ = FOOTER.unpack(footer[-FOOTER.size :])
    hash_name = name.rstrip(b"\0").decode("latin-1")
    if version != 1 or zero.strip(b"\0") or hash_name not in DIGEST_SIZES:
        raise FormatError("pack of an unknown version or hash")
    records = Records(hash_name, footer[: -FOOTER.size])
    if size != records.size or checksum(footer[: -len(FOOTER_MAGIC) - 16]) != check:
        raise FormatError("pack footer has a bad checksum")
    end = pack_size - len(footer)
    for _, kind, offset, stored, raw in records.rows():
        if (
            kind > 1
            or offset < len(PACK_MAGIC)
            or offset + stored > end
            or raw > RAW_MAX
            or not FRAME.size <= stored <= FRAME.size + RAW_MAX
        ):
            raise FormatError("pack footer points outside the pack")
    return records
