"""Reading tar: v7, ustar, star, GNU and pax members from a stream, never extracted.

Strict where being lax would give wrong content: sizes, checksums and pax records must be sound, and the end of the input in
the middle of a member is an error.  Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Interchange Format"; GNU
tar manual, "Basic Tar Format" and "Storing Sparse Files" (sparse.py has those).
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

from cafs import acl, sparse
from cafs import format as fmt
from cafs.errors import FormatError, quote
from cafs.tarfields import SIZE_MAX, parse_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from cafs.sparse import Map, Segment

BLOCK = 512
HEADER_MAX = 1 << 20
"""Largest long name, pax header or sparse map, in bytes; checked before it is read."""

_KINDS = {
    b"0": fmt.FILE, b"\0": fmt.FILE, b"7": fmt.FILE, b"S": fmt.FILE, b"1": fmt.HARDLINK, b"2": fmt.SYMLINK,
    b"3": fmt.CHAR_DEVICE, b"4": fmt.BLOCK_DEVICE, b"5": fmt.DIRECTORY, b"D": fmt.DIRECTORY, b"6": fmt.FIFO,
}  # fmt: skip
_GLOBAL_IGNORED = (b"path", b"linkpath", b"size")
_OTHERWISE = {
    b"SCHILY.acl.access": acl.ACCESS, b"SCHILY.acl.default": acl.DEFAULT,
    b"SCHILY.ace": b"system.nfs4_acl", b"RHT.security.selinux": b"security.selinux",
}  # fmt: skip
"""Keys of what are xattrs on a disk."""

_SKIP_STEP = 1 << 20
_RECORD = re.compile(rb"([1-9][0-9]{0,8}) ")

Records = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Member:
    """One member.  name, link: raw bytes as stored.  kind: a type letter of cafs-index(5).  mtime in ns.

    size: of the file, bytes, holes included.  segments: where its data is, (offset, length), in order.
    xattrs: all that were stored, by name.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    device: tuple[int, int]
    segments: tuple[Segment, ...] = ()
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class Reader:
    """The members of a tar stream, in turn.  The content of one is read with `pieces` before the next is asked for, or not.

    ended: after the last member, whether the end marker was there (GNU tar and Go's reader do without).
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.ended = False
        self._offset = 0
        self._left = 0  # bytes of the member's content and padding not read yet
        self._padding = 0
        self._held = b""
        self._members = 0
        self._member: Member | None = None

    def __iter__(self) -> Iterator[Member]:
        defaults: dict[bytes, bytes] = {}
        while (member := self._next(defaults)) is not None:
            self._member = member
            self._members += 1
            yield member

    def pieces(self, step: int) -> Iterator[tuple[int, bytes]]:
        """The content of the current member: (1, bytes of the next STEP) or (N, b'') for N steps without data."""
        assert self._member
        yield from sparse.pieces(self._member.segments, self._member.size, step, self._content)

    def _content(self, size: int) -> bytes:
        self._left -= size
        return self._read(size)

    def _read(self, size: int) -> bytes:
        """Exactly SIZE bytes.  Raises FormatError."""
        data = self._held[:size]
        self._held = self._held[size:]
        while len(data) < size:
            more = self.stream.read(size - len(data))
            if not more:
                raise self._error("the archive is cut off" if self._offset else "not a tar archive")
            data = data + more if data else more
        self._offset += size
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._read(min(size, _SKIP_STEP)))

    def _error(self, problem: str) -> FormatError:
        return FormatError(f"tar, at byte {self._offset}: {problem}")

    def _header(self) -> bytes | None:
        """The next header block; None at the end."""
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        if not self._held:
            self._held = self.stream.read(BLOCK)
            if not self._held:
                return None
        block = self._read(BLOCK)
        if not block.strip(b"\0"):
            self.ended = True
            self._drain()
            return None
        if not is_header(block):
            raise self._error("not a header: its checksum is wrong" if self._members else "not a tar archive")
        return block

    def _drain(self) -> None:
        """Read on after the end marker: a compressed stream is verified at its end only, and a writer wants to be read."""
        while self.stream.read(_SKIP_STEP):
            pass

    def _keep_defaults(self, defaults: dict[bytes, bytes], records: Records) -> None:
        """Global records: the last of a key counts, for all members that follow."""
        defaults.update((key, value) for key, value in records if key not in _GLOBAL_IGNORED)
        if sum(len(key) + len(value) for key, value in defaults.items()) > HEADER_MAX:
            raise self._error("global headers are too large")

    def _payload(self, block: bytes) -> bytes:
        """The content of a header that extends another."""
        size = self._number(block[124:136], "size")
        if size > HEADER_MAX:
            raise self._error(f"extended header of {size} bytes")
        data = self._read(size)
        self._skip(-size % BLOCK)
        return data

    def _number(self, field: bytes, what: str) -> int:
        number = parse_number(field)
        if number is None or (number < 0 and what in ("size", "device")):
            raise self._error(f"{what} is not a number")
        return number

    def _next(self, defaults: dict[bytes, bytes]) -> Member | None:
        long_name = long_link = b""
        records: Records = []
        while (block := self._header()) is not None:
            flag = block[156:157]
            if flag in b"xX":
                records = self._records(self._payload(block))
            elif flag == b"g":
                self._keep_defaults(defaults, self._records(self._payload(block)))
            elif flag == b"L":
                long_name = self._payload(block).partition(b"\0")[0]
            elif flag == b"K":
                long_link = self._payload(block).partition(b"\0")[0]
            elif flag == b"V":
                continue
            else:
                return self._build(block, [*defaults.items(), *records], long_name, long_link)
        if (records or long_name or long_link) and not self.ended:
            raise self._error("the archive is cut off after an extended header")
        return None

    def _records(self, data: bytes) -> Records:
        """'LENGTH KEY=VALUE\\n' records, in order."""
        found: Records = []
        at = 0
        while at < len(data):
            head = _RECORD.match(data, at)
            length = int(head[1]) if head else 0
            record = data[at : at + length]
            key, equals, value = record[head.end() - at : -1].partition(b"=") if head else (b"", b"", b"")
            if not head or len(record) != length or not record.endswith(b"\n") or not equals or not key or b"\0" in key:
                raise self._error("bad record in a pax header")
            if b"\0" in value and key in (b"path", b"linkpath", b"uname", b"gname", b"GNU.sparse.name"):
                raise self._error("pax path with a NUL")
            found.append((key, value))
            at += length
        return found

    def _build(self, block: bytes, records: Records, long_name: bytes, long_link: bytes) -> Member:
        kind = _KINDS.get(block[156:157])
        if kind is None:
            raise self._error(f"member of unknown type {block[156:157]!r}")
        pax = dict(records)
        name = pax.get(b"GNU.sparse.name") or long_name or pax.get(b"path") or self._name(block)
        stored = self._integer(pax, b"size", self._number(block[124:136], "size"))
        if kind == fmt.FILE and name.endswith(b"/"):
            kind = fmt.DIRECTORY
        has_device = kind in (fmt.CHAR_DEVICE, fmt.BLOCK_DEVICE)
        try:
            mode, xattrs = acl.settled(self._number(block[100:108], "mode") & 0o7777, _xattrs(records))
        except ValueError as error:
            raise self._error(f"{quote(name)}: {error}") from error
        member = Member(
            name=name,
            kind=kind,
            mode=mode,
            uid=self._integer(pax, b"uid", self._number(block[108:116], "uid")),
            gid=self._integer(pax, b"gid", self._number(block[116:124], "gid")),
            mtime_ns=self._time(pax, self._number(block[136:148], "mtime")),
            size=stored if kind == fmt.FILE else 0,
            link=(long_link or pax.get(b"linkpath") or _string(block[157:257])) if kind in b"hl" else b"",
            device=(self._number(block[329:337], "device"), self._number(block[337:345], "device")) if has_device else (0, 0),
            xattrs=xattrs,
        )
        self._set_left(block[156:157], kind, stored)
        return self._with_map(member, block, records) if kind == fmt.FILE else member

    def _set_left(self, flag: bytes, kind: bytes, stored: int) -> None:
        """How much content follows.  Links and directories have none whatever their size says, but see cpio's links."""
        if kind == fmt.HARDLINK and stored:
            self._held = self._held or self.stream.read(BLOCK)
            while 0 < len(self._held) < BLOCK and (more := self.stream.read(BLOCK - len(self._held))):
                self._held += more
            if not self._held or not self._held.strip(b"\0") or is_header(self._held):
                stored = 0
        elif kind != fmt.FILE and flag not in (b"D", b"0", b"\0", b"7"):
            stored = 0
        self._left, self._padding = stored, -stored % BLOCK

    def _with_map(self, member: Member, block: bytes, records: Records) -> Member:
        """A file's segments, from whichever sparse format it is in."""
        stored = self._left
        try:
            if block[156:157] == b"S":
                found: Map | None = sparse.from_header(block, lambda: self._read(BLOCK))
            else:
                found = sparse.from_records(records, stored, self._content)
            size, segments = found or (stored, ((0, stored),))
            sparse.check(segments, size, self._left)
        except ValueError as error:
            raise self._error(str(error)) from error
        return replace(member, size=size, segments=segments)

    def _integer(self, pax: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
        text = pax.get(key)
        if not text:
            return otherwise
        if not re.fullmatch(rb"[0-9]{1,40}", text) or int(text) > SIZE_MAX:
            raise self._error(f"pax {key.decode()} is not a number")
        return int(text)

    def _time(self, pax: dict[bytes, bytes], seconds: int) -> int:
        text = pax.get(b"mtime")
        if not text:
            return seconds * 1_000_000_000
        match = re.fullmatch(rb"(-?)([0-9]{1,12})(?:\.([0-9]*))?", text)
        if not match:
            raise self._error("pax mtime is not a time")
        fraction = (match[3] or b"").ljust(9, b"0")
        nanoseconds = int(match[2]) * 1_000_000_000 + int(fraction[:9])
        if not match[1]:
            return nanoseconds
        return -nanoseconds - bool(fraction[9:].strip(b"0"))  # downwards, like the floor of a positive time

    def _name(self, block: bytes) -> bytes:
        name, prefix = _string(block[:100]), b""
        if block[257:263] == b"ustar\0":
            prefix = _string(block[345:476] if block[508:512] == b"tar\0" else block[345:500])
        elif block[257:265] == b"ustar  \0" and block[156:157] != b"S":
            # GNU keeps times there; Go 1.7 wrote a prefix all the same (golang issue 12594).
            times = block[345:357], block[357:369]
            if any(parse_number(field) is None for field in times) and _string(block[345:500]).isascii():
                prefix = _string(block[345:500])
        return prefix + b"/" + name if prefix else name


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def is_header(block: bytes) -> bool:
    """Whether a block's checksum is right: the sum of all bytes, with spaces for itself; some old writers sum signed bytes."""
    wanted = parse_number(block[148:156]) if len(block) == BLOCK else None
    if wanted is None:
        return False
    blank = block[:148] + b" " * 8 + block[156:]
    return wanted == sum(blank) or wanted == sum(blank) - 256 * sum(byte > 127 for byte in blank)


def _xattrs(records: Records) -> tuple[tuple[bytes, bytes], ...]:
    """SCHILY's are as they are, but for what GNU tar encodes ('=' and '%'); LIBARCHIVE's have %-names and base64 values.

    Access control lists are text unless they are there as xattrs too.  Raises ValueError.
    """
    found: dict[bytes, bytes] = {}
    otherwise: dict[bytes, bytes] = {}
    for key, value in records:
        if key.startswith(b"SCHILY.xattr."):
            found[key[13:].replace(b"%3D", b"=").replace(b"%25", b"%")] = value
        elif key.startswith(b"LIBARCHIVE.xattr."):
            name = unquote_to_bytes(key[17:])
            try:
                found.setdefault(name, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True))
            except ValueError as error:
                raise FormatError(f"tar: xattr {name!r} is not base64") from error
        elif key in _OTHERWISE:
            otherwise[_OTHERWISE[key]] = value
    for name, value in otherwise.items():
        if name not in found and (text := acl.from_text(value) if name in (acl.ACCESS, acl.DEFAULT) else value):
            found[name] = text
    return tuple(sorted(found.items()))
