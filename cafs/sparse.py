"""Where the data of a sparse tar member is: the four formats of GNU tar ("Storing Sparse Files" in its manual).

Old GNU keeps the map in the header and blocks after it; pax 0.0 and 0.1 in records; pax 1.0 at the start of the content.
Problems are ValueErrors; tar.py says where.
"""

from __future__ import annotations

import re

from cafs.tarfields import SIZE_MAX, parse_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Segment = tuple[int, int]
    Map = tuple[int, tuple[Segment, ...]]

BLOCK = 512
MAP_MAX = 1 << 20
"""Bytes of a map (CVE-2025-58183: readers without a limit)."""

_ENTRIES_MAX = MAP_MAX // 24


def check(segments: tuple[Segment, ...], size: int, stored: int) -> None:
    """Raise ValueError unless the segments are in order, inside the file, and account for all stored bytes."""
    end = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise ValueError("sparse map out of order")
        end = offset + length
    if end > size:
        raise ValueError("sparse map goes beyond the file")
    if sum(length for _, length in segments) != stored:
        raise ValueError("sparse map does not account for the stored bytes")


def pieces(segments: tuple[Segment, ...], size: int, step: int, read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """The file in steps: (1, bytes) or (N, b'') for N steps without data.  read: the next N stored bytes."""
    waiting = [segment for segment in segments if segment[1]][::-1]
    at = 0
    while at < size:
        start = waiting[-1][0] if waiting else size
        holes = -(-(size - at) // step) if start >= size else (start - at) // step
        if holes > 0:
            yield holes, b""
            at += holes * step
            continue
        length = min(step, size - at)
        parts, filled = [], 0
        while waiting and waiting[-1][0] < at + length:
            offset, left = waiting.pop()
            parts.append(bytes(offset - at - filled))
            take = min(left, at + length - offset)
            parts.append(read(take))
            filled = offset + take - at
            if left > take:
                waiting.append((offset + take, left - take))
        parts.append(bytes(length - filled))
        yield 1, b"".join(parts)
        at += length


def from_header(block: bytes, more: Callable[[], bytes]) -> Map:
    """Old GNU: four entries and the real size in the header, 21 in each block that follows while the last says so."""
    numbers = _structs(block[386:482])
    size = _number(block[483:495])
    is_extended = bool(block[482])
    while is_extended:
        if len(numbers) > 2 * _ENTRIES_MAX:
            raise ValueError("sparse map is too long")
        extension = more()
        numbers += _structs(extension[:504])
        is_extended = bool(extension[504])
    return size, _pairs(numbers)


def _structs(data: bytes) -> list[int]:
    found = []
    for at in range(0, len(data), 24):
        if not data[at]:
            break
        found += [_number(data[at : at + 12]), _number(data[at + 12 : at + 24])]
    return found


def _number(field: bytes) -> int:
    number = parse_number(field)
    if number is None or number < 0:
        raise ValueError("sparse map with a bad number")
    return number


def from_records(records: list[tuple[bytes, bytes]], stored: int, read: Callable[[int], bytes]) -> Map | None:
    """pax 0.0, 0.1 and 1.0; None if the member is not sparse.  read: takes the map of 1.0 off the content."""
    pax = dict(records)
    if pax.get(b"GNU.sparse.major") == b"1" and pax.get(b"GNU.sparse.minor") == b"0":
        return _decimal(pax.get(b"GNU.sparse.realsize", b"")), _from_content(stored, read)
    if b"GNU.sparse.map" in pax:
        text = pax[b"GNU.sparse.map"]
        numbers = list(map(_decimal, text.split(b","))) if text else []
    else:
        numbers = [_decimal(value) for key, value in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        keys = [key for key, _ in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        if keys != [b"GNU.sparse.offset", b"GNU.sparse.numbytes"] * (len(keys) // 2):
            raise ValueError("sparse map of odd length")
    if b"GNU.sparse.size" not in pax and b"GNU.sparse.realsize" not in pax:
        return None
    size = _decimal(pax.get(b"GNU.sparse.size") or pax.get(b"GNU.sparse.realsize") or b"")
    if int(pax.get(b"GNU.sparse.numblocks") or len(numbers) // 2) != len(numbers) // 2:
        raise ValueError("sparse map of another length than it says")
    return size, _pairs(numbers)


def _from_content(stored: int, read: Callable[[int], bytes]) -> tuple[Segment, ...]:
    data, taken = b"", 0

    def line() -> int:
        nonlocal data, taken
        while b"\n" not in data:
            if taken + BLOCK > min(stored, MAP_MAX):
                raise ValueError("sparse map is too long")
            data += read(BLOCK)
            taken += BLOCK
        text, _, data = data.partition(b"\n")
        return _decimal(text)

    count = line()
    if count > _ENTRIES_MAX:
        raise ValueError("sparse map is too long")
    return _pairs([line() for _ in range(2 * count)])


def _decimal(text: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", text) or int(text) > SIZE_MAX:
        raise ValueError("sparse map with a bad number")
    return int(text)


def _pairs(numbers: list[int]) -> tuple[Segment, ...]:
    if len(numbers) % 2:
        raise ValueError("sparse map of odd length")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
