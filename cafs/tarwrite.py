"""Writing tar: an index and its content as a pax archive, the same bytes every time.

POSIX.1-2017 pax, "ustar Interchange Format"; xattrs as SCHILY.xattr. records, access control lists as SCHILY.acl. ones too, and
files with runs of zero chunks in GNU's sparse format 1.0 (GNU tar manual, "Storing Sparse Files"), which GNU tar, bsdtar and
Go's archive/tar read.  Whiteouts of a layer as the OCI image spec says (layer.md, "Whiteouts").
"""

from __future__ import annotations

from contextlib import suppress

from cafs import acl
from cafs import format as fmt
from cafs.content import pieces
from cafs.errors import UnsupportedError, quote
from cafs.format import Entry
from cafs.vtree import OPAQUE, WHITEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.index import Index
    from cafs.store import Store

    Records = list[tuple[bytes, bytes]]

BLOCK = 512
_FLAGS = {
    fmt.FILE: b"0", fmt.CHUNKED: b"0", fmt.HARDLINK: b"1", fmt.SYMLINK: b"2", fmt.CHAR_DEVICE: b"3",
    fmt.BLOCK_DEVICE: b"4", fmt.DIRECTORY: b"5", fmt.OPAQUE: b"5", fmt.FIFO: b"6",
}  # fmt: skip
_ACLS = {acl.ACCESS: b"SCHILY.acl.access", acl.DEFAULT: b"SCHILY.acl.default"}
_OCTAL7, _OCTAL11 = 0o7777777, 0o77777777777


def write(index: Index, store: Store, *, is_layer: bool = False) -> Iterator[bytes]:
    """The archive in pieces of at most a chunk.  Sockets are left out: no tar can hold one.  Raises CafsError.

    is_layer: of an image, in which a name that begins with '.wh.' would be taken for a whiteout.
    """
    for number in range(len(index)):
        entry = index.entry(number)
        path = entry.path.lstrip(b"/")
        if is_layer and path.rpartition(b"/")[2].startswith(WHITEOUT):
            raise UnsupportedError(f"{quote(entry.path)} cannot be in an image's layer: it would be a whiteout")
        if index.kind(index.inode(number)) == fmt.SOCKET:
            continue
        if entry.type in (fmt.FILE, fmt.CHUNKED):
            yield from _file(index, number, entry, path, store)
        elif entry.type == fmt.WHITEOUT:
            directory, slash, name = path.rpartition(b"/")
            yield _header(Entry(fmt.FILE, b""), directory + slash + WHITEOUT + name, 0)
        elif entry.type in (fmt.DIRECTORY, fmt.OPAQUE):
            yield _header(entry, (path or b".") + b"/", 0)
            if entry.type == fmt.OPAQUE:
                yield _header(Entry(fmt.FILE, b""), (path + b"/" if path else b"") + OPAQUE, 0)
        else:
            yield _header(entry, path, 0)
    yield bytes(2 * BLOCK)


def _file(index: Index, number: int, entry: Entry, path: bytes, store: Store) -> Iterator[bytes]:
    found = pieces(index, number, store)
    runs = found.runs
    if all(is_data for _, _, is_data in runs):
        yield _header(entry, path, entry.size)
        yield from found.data()
        yield bytes(-entry.size % BLOCK)
        return
    segments = [(offset, length) for offset, length, is_data in runs if is_data]
    if not runs[-1][2]:
        segments.append((entry.size, 0))  # GNU tar takes the length of the file from the last entry
    lines = b"".join(b"%d\n%d\n" % segment for segment in segments)
    table = b"%d\n" % len(segments) + lines
    table += bytes(-len(table) % BLOCK)
    stored = len(table) + sum(length for _, length in segments)
    records = [
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", path),
        (b"GNU.sparse.realsize", b"%d" % entry.size),
    ]
    directory, slash, name = path.rpartition(b"/")
    yield _header(entry, directory + slash + b"GNUSparseFile.0/" + name, stored, records)
    yield table
    yield from found.data()
    yield bytes(-stored % BLOCK)


def _header(entry: Entry, path: bytes, size: int, records: Records | None = None) -> bytes:
    """The member's header, behind a pax header if it needs one."""
    more = list(records or ())
    link = entry.target.lstrip(b"/") if entry.type == fmt.HARDLINK else entry.target
    for key, value in ((b"path", path), (b"linkpath", link)):
        if len(value) > 100:
            more.append((key, value))
            if not _is_utf8(value):
                more.insert(0, (b"hdrcharset", b"BINARY"))
    for key, number, limit in ((b"uid", entry.uid, _OCTAL7), (b"gid", entry.gid, _OCTAL7), (b"size", size, _OCTAL11)):
        if number > limit:
            more.append((key, b"%d" % number))
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    if nanoseconds or not 0 <= seconds <= _OCTAL11:
        more.append((b"mtime", _time(entry.mtime_ns)))
    for name, value in entry.xattrs:
        more.append((b"SCHILY.xattr." + name.replace(b"%", b"%25").replace(b"=", b"%3D"), value))
        if name in _ACLS:  # docker takes the xattr, tar and bsdtar the text
            with suppress(ValueError):
                more.append((_ACLS[name], acl.to_text(value)))
    head = b""
    if more:
        body = b"".join(_record(key, value) for key, value in more)
        head = _block(Entry(fmt.FILE, b"", 0o644), b"x", b"PaxHeaders/" + path[-80:], b"", len(body), 0)
        head += body + bytes(-len(body) % BLOCK)
    return head + _block(entry, _FLAGS[entry.type], path, link, size, seconds)


def _block(entry: Entry, flag: bytes, path: bytes, link: bytes, size: int, seconds: int) -> bytes:
    """A ustar header; what does not fit is 0 or cut here and stands in the pax header."""
    major, minor = entry.device
    block = bytearray(BLOCK)
    block[0:100] = path[:100].ljust(100, b"\0")
    block[100:108] = b"%07o\0" % entry.mode
    block[108:116] = b"%07o\0" % (entry.uid if entry.uid <= _OCTAL7 else 0)
    block[116:124] = b"%07o\0" % (entry.gid if entry.gid <= _OCTAL7 else 0)
    block[124:136] = b"%011o\0" % (size if size <= _OCTAL11 else 0)
    block[136:148] = b"%011o\0" % (seconds if 0 <= seconds <= _OCTAL11 else 0)
    block[156:157] = flag
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[329:345] = b"%07o\0%07o\0" % (major, minor)
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 0x20)
    return bytes(block)


def _record(key: bytes, value: bytes) -> bytes:
    """'LENGTH KEY=VALUE\\n', where LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _time(ns: int) -> bytes:
    seconds, nanoseconds = divmod(abs(ns), 1_000_000_000)
    text = b"%d.%09d" % (seconds, nanoseconds)
    return (b"-" if ns < 0 else b"") + text.rstrip(b"0").rstrip(b".")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
