"""Streams that may be compressed: gzip, bzip2, xz or zstd, several frames in a row, or nothing, told by their first bytes."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from cafs.errors import CorruptError

_READ = 1 << 20
_MAGIC_MAX = 10
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
"""What follows BZh and a digit: a block, or the end.  A tar begins with the name of a file, so three letters prove nothing."""

_WINDOW_MAX = 1 << 27
"""Memory for a window or dictionary, in bytes: what `xz -9` and `zstd --ultra` use fits."""

_PIECE = 1024
"""What zstd is given at once: four bytes can stand for 128 KiB, so this much for 32 MiB."""


def decompressed(stream: BinaryIO) -> BinaryIO:
    """The plain bytes of a stream that need not be seekable.  Reading raises CorruptError where it is damaged or cut off."""
    head = b""
    while len(head) < _MAGIC_MAX and (more := stream.read(_MAGIC_MAX - len(head))):  # a pipe may give a byte at a time
        head += more
    buffered = io.BufferedReader(_Rewound(head, stream), _READ)
    opened: BinaryIO
    if head.startswith(b"\x1f\x8b\x08"):
        import gzip

        opened = cast(BinaryIO, gzip.GzipFile(fileobj=buffered))
    elif head.startswith(b"BZh") and head[4:] in _BZIP2_BLOCKS:
        import bz2

        opened = cast(BinaryIO, bz2.BZ2File(buffered))
    elif head.startswith(b"\xfd7zXZ\0"):
        opened = cast(BinaryIO, io.BufferedReader(_Xz(buffered), _READ))
    elif head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        opened = cast(BinaryIO, io.BufferedReader(_Zstd(buffered), _READ))
    else:
        return cast(BinaryIO, buffered)
    return cast(BinaryIO, _Checked(opened))


class _Checked:
    """Turns what the decompressors raise into CorruptError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        import lzma
        import zlib

        try:
            return self._stream.read(size)
        except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise CorruptError(f"compressed data is damaged or cut off: {error}") from error
        except OSError as error:
            if error.errno is None:  # gzip.BadGzipFile, and bz2's way to say it
                raise CorruptError(f"compressed data is damaged: {error}") from error
            raise


class _Rewound(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data, self._head = self._head[: len(view)] or self._stream.read(len(view)), self._head[len(view) :]
        view[: len(data)] = data
        return len(data)


class _Pieces(io.RawIOBase):
    """What `more` makes, a piece at a time; an empty one is no end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._in_frame = False
        self._ready = memoryview(b"")

    def _more(self) -> bool:
        """Make the next piece; False at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            if not self._ready and not self._more():
                break
            size = min(len(view) - done, len(self._ready))
            view[done : done + size] = self._ready[:size]
            self._ready = self._ready[size:]
            done += size
        return done


class _Zstd(_Pieces):
    """Frames in a row.  The library's own reader takes the end of the input in a frame for the end of the data."""

    def __init__(self, stream: BinaryIO) -> None:
        import zstandard

        super().__init__(stream)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()

    def _more(self) -> bool:
        data = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame, self._in_frame = self._decompressor.decompressobj(), False
        data = data or self._stream.read(_PIECE)
        if not data:
            if self._in_frame:
                raise EOFError("end of the input in a zstd frame")
            return False
        try:
            self._ready, self._in_frame = memoryview(self._frame.decompress(data)), True
        except self._error as error:
            raise ValueError(str(error)) from error
        return True


class _Xz(_Pieces):
    """Streams in a row, with padding between (the .xz file format, 2.2), and a limit of memory, which LZMAFile has not."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self._streams = 0
        self._begin()

    def _begin(self) -> None:
        import lzma

        self._frame = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * _WINDOW_MAX)
        self._in_frame = False
        self._streams += 1

    def _more(self) -> bool:
        data = b""
        if self._frame.eof:
            data = self._frame.unused_data.lstrip(b"\0")
            self._begin()
        if not data and self._frame.needs_input:
            data = self._stream.read(_READ >> 4)
            if not data and self._in_frame:
                raise EOFError("end of the input in an xz stream")
            if not data:
                return False
            if not self._in_frame and self._streams > 1:
                data = data.lstrip(b"\0")
        self._ready = memoryview(b"")
        if data or not self._frame.needs_input:
            self._ready, self._in_frame = memoryview(self._frame.decompress(data, _READ)), True
        return True
