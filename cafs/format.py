"""The text of an index: header, entry lines, trailer.  Pure bytes <-> records; the authority is cafs-index(5).

Lines are recognised by one regular expression for speed; only when it does not match does `diagnose` look for the rule
that is broken.  What needs more than one line (order, parents, links) is checked by index.py.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from itertools import pairwise

from cafs.digest import CHUNK_MAX, CHUNK_MIN, CHUNK_SIZE, DIGEST_SIZES
from cafs.errors import FormatError, quote
from cafs.escape import escape, escape_xattr, is_canonical, unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"cafs-index "
VERSION = 1
NAME_MAX = 255
PATH_MAX = 4095
XATTR_NAME_MAX = 255
XATTR_VALUE_MAX = 65535
XATTR_COUNT_MAX = 1024
XATTRS_MAX = 196_608
LINE_MAX = 1 << 20
ENTRIES_MAX = 1 << 26
ID_MAX = 0xFFFF_FFFE
MAJOR_MAX, MINOR_MAX = 4095, (1 << 20) - 1
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

FILE, CHUNKED, DIRECTORY, SYMLINK, HARDLINK = b"f", b"F", b"d", b"l", b"h"
CHAR_DEVICE, BLOCK_DEVICE, FIFO, SOCKET, OPAQUE, WHITEOUT = b"c", b"b", b"p", b"s", b"o", b"w"
TYPES = b"fFdlhcbpsow"
TYPE_BITS = {
    ord("f"): stat.S_IFREG,
    ord("F"): stat.S_IFREG,
    ord("d"): stat.S_IFDIR,
    ord("l"): stat.S_IFLNK,
    ord("c"): stat.S_IFCHR,
    ord("b"): stat.S_IFBLK,
    ord("p"): stat.S_IFIFO,
    ord("s"): stat.S_IFSOCK,
}
"""st_mode's bits for a type."""

XATTR_NAMES = (b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")


@dataclass(frozen=True, slots=True)
class Header:
    """The first line of an index."""

    hash_name: str = "sha256"
    chunk_size: int = CHUNK_SIZE
    is_layer: bool = False

    def encode(self) -> bytes:
        """The header line with its LF."""
        layer = b" layer" if self.is_layer else b""
        return b"%s%d %s %d%s\n" % (MAGIC, VERSION, self.hash_name.encode(), self.chunk_size, layer)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, as it is written.

    path, target: raw bytes.  mode: permission bits.  device: (major, minor) of c and b.  xattrs: ordered by name.
    digest: raw bytes, empty where there is none.  For h and w every field but type, target and path is ignored.
    """

    type: bytes
    path: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    digest: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    target: bytes = b""
    device: tuple[int, int] = (0, 0)

    def encode(self) -> bytes:
        """The entry's line with its LF.  The caller vouches for limits and order: `check_limits`."""
        path = escape(self.path)
        if self.type in (HARDLINK, WHITEOUT):
            return b"%s - - - - - - - %s %s\n" % (self.type, escape(self.target) or b"-", path)
        size = b"-"
        if self.type in (FILE, CHUNKED):
            size = b"%d" % self.size
        elif self.type in (CHAR_DEVICE, BLOCK_DEVICE):
            size = b"%d:%d" % self.device
        return b"%s %o %d %d %d %s %s %s %s %s\n" % (
            self.type,
            self.mode,
            self.uid,
            self.gid,
            self.mtime_ns,
            size,
            self.digest.hex().encode() or b"-",
            encode_xattrs(self.xattrs),
            escape(self.target) if self.type == SYMLINK else b"-",
            path,
        )


def encode_trailer(count: int) -> bytes:
    """The last line."""
    return b"end %d\n" % count


def order_key(path: bytes) -> bytes:
    """Sort key of the ORDER section: component by component, a directory before its content."""
    return path.replace(b"/", b"\0")


def xattr_allowed(name: bytes) -> bool:
    """Whether an index lists this attribute; all others are left out when a tree is indexed."""
    return (name.startswith(b"user.") and len(name) > 5) or name in XATTR_NAMES


def encode_xattrs(xattrs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The XATTRS field.  xattrs: ordered by name."""
    return b",".join(escape_xattr(name) + b"=" + escape_xattr(value) for name, value in xattrs) or b"-"


def decode_xattrs(field: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The pairs of an XATTRS field.  Raises FormatError, without a line, if rules 16 or 22 do not hold."""
    if field == b"-":
        return ()
    pairs = []
    parts = field.split(b",", XATTR_COUNT_MAX)
    if len(parts) > XATTR_COUNT_MAX:
        raise FormatError("too many xattrs", rule=22)
    for part in parts:
        name, equals, value = part.partition(b"=")
        if not equals:
            raise FormatError("xattr without '='", rule=22)
        try:
            pair = unescape(name), unescape(value)
        except ValueError as error:
            raise FormatError(f"xattr: {error}", rule=16) from error
        if encode_xattrs([pair]) != part:
            raise FormatError("xattr is not in its one spelling", rule=16)
        pairs.append(pair)
    check_xattrs(pairs)
    return tuple(pairs)


def check_xattrs(pairs: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise FormatError unless names, order and limits of rule 22 hold."""
    if any(a[0] >= b[0] for a, b in pairwise(pairs)):
        raise FormatError("xattrs out of order", rule=22)
    for name, value in pairs:
        if not xattr_allowed(name) or len(name) > XATTR_NAME_MAX or b"\0" in name:
            raise FormatError(f"xattr {quote(name)} is not allowed", rule=22)
        if len(value) > XATTR_VALUE_MAX:
            raise FormatError(f"value of xattr {quote(name)} is over {XATTR_VALUE_MAX} bytes", rule=22)
    if len(pairs) > XATTR_COUNT_MAX or sum(len(n) + len(v) for n, v in pairs) > XATTRS_MAX:
        raise FormatError("too many or too large xattrs", rule=22)


def check_limits(entry: Entry) -> None:
    """Raise FormatError if a limit that a file system or an archive may exceed is broken: names, ids, times, sizes, xattrs.

    The directories above the entry have been checked as entries.
    """
    if len(entry.path) > PATH_MAX or len(entry.path) - entry.path.rfind(b"/") - 1 > NAME_MAX or b"\0" in entry.path:
        raise FormatError("path is too long or has a NUL", rule=17)
    if not (0 <= entry.uid <= ID_MAX and 0 <= entry.gid <= ID_MAX and INT64_MIN <= entry.mtime_ns <= INT64_MAX):
        raise FormatError("owner or mtime is out of range", rule=11)
    if not 0 <= entry.size <= INT64_MAX:
        raise FormatError("size is out of range", rule=11)
    if not (0 <= entry.device[0] <= MAJOR_MAX and 0 <= entry.device[1] <= MINOR_MAX):
        raise FormatError("device number is out of range", rule=11)
    if entry.type == SYMLINK and (not 1 <= len(entry.target) <= PATH_MAX or b"\0" in entry.target):
        raise FormatError("symbolic link target is empty or too long, or has a NUL", rule=15)
    if entry.xattrs:
        check_xattrs(entry.xattrs)


def parse_header(line: bytes) -> Header:
    """Decode the first line (without its LF), rules 1 to 5."""
    if not line.startswith(MAGIC):
        raise FormatError("not an index", line=1, rule=1)
    fields = line[len(MAGIC) :].split(b" ")
    if fields[0] != b"%d" % VERSION:
        raise FormatError(
            f"unknown index version {quote(fields[0])}", line=1, rule=2, hint="a newer release of these tools may read it"
        )
    hash_name = fields[1].decode("latin-1") if len(fields) > 1 else ""
    if hash_name not in DIGEST_SIZES:
        raise FormatError(f"unknown hash {quote(hash_name)}", line=1, rule=3)
    chunk = fields[2] if len(fields) > 2 else b""
    size = int(chunk) if re.fullmatch(rb"[1-9][0-9]{0,9}", chunk) else 0
    if not CHUNK_MIN <= size <= CHUNK_MAX or size & (size - 1):
        raise FormatError(f"chunk size {quote(chunk)} is not a power of two in range", line=1, rule=4)
    if fields[3:] not in ([], [b"layer"]):
        raise FormatError("unknown field in the header", line=1, rule=5)
    return Header(hash_name, size, bool(fields[3:]))


_NUMBER = rb"(?:0|[1-9][0-9]{0,9})"
_MODE = rb"(?:0|[1-7][0-7]{0,3})"
_TIME = rb"(?:0|-?[1-9][0-9]{0,18})"
_SIZE = rb"[1-9][0-9]{0,18}"
_OWNER = rb"%s %s %s" % (_NUMBER, _NUMBER, _TIME)
_STAT = rb"%s %s" % (_MODE, _OWNER)


def lines_pattern(hash_name: str) -> re.Pattern[bytes]:
    """The expression of any number of whole entry lines, each with the fields of its type.

    It captures nothing, and never goes back to a line that has matched: splitting what is known to be well-formed is
    faster than capturing ten groups a line.
    """
    digest = rb"[0-9a-f]{%d}" % (2 * DIGEST_SIZES[hash_name])
    content = rb"%s %s" % (_SIZE, digest)
    word = rb"[!-~\x80-\xff]+"
    lines = (
        rb"[fF] %s %s %s - " % (_STAT, content, word),
        rb"[dpso] %s - - %s - " % (_STAT, word),
        rb"l 777 %s - - %s %s " % (_OWNER, word, word),
        rb"f %s 0 - %s - " % (_STAT, word),
        rb"h - - - - - - - /[!-~\x80-\xff]* ",
        rb"[cb] %s %s:%s - %s - " % (_STAT, _NUMBER, _NUMBER, word),
        rb"w - - - - - - - - ",
    )
    return re.compile(rb"(?:(?:%s)/[!-~\x80-\xff]*\n)*+" % b"|".join(lines))


def diagnose(line: bytes, number: int, header: Header) -> FormatError:
    """Find the rule that a line (without its LF) breaks; the line is known to break one."""
    try:
        _diagnose(line, header)
    except FormatError as error:
        return FormatError(str(error).rsplit(" (rule", 1)[0], line=number, rule=error.rule)
    return FormatError("not an entry", line=number, rule=9)


def _diagnose(line: bytes, header: Header) -> None:
    fields = line.split(b" ")
    if len(fields) != 10 or not all(fields):
        raise FormatError("an entry has ten fields, separated by one space", rule=9)
    kind, mode, uid, gid, mtime, size, digest, xattrs, target, path = fields
    if len(kind) != 1 or kind not in TYPES:
        raise FormatError(f"unknown type {quote(kind)}", rule=10)
    wanted = _FIELDS_OF.get(kind, _STAT_FIELDS)
    for name, value in zip(_FIELD_NAMES, fields[1:9], strict=True):
        if name in wanted and value == b"-" and name not in ("digest", "xattrs") and kind != SYMLINK:
            raise FormatError(f"{name} is missing", rule=12)
        if name not in wanted and value != b"-":
            raise FormatError(f"type {quote(kind)} has no {name}", rule=12)
    if not is_canonical(target) or not is_canonical(path):
        raise FormatError("target or path is not in its one spelling", rule=16)
    if not path.startswith(b"/"):
        raise FormatError("path does not begin with a slash", rule=17)
    if kind == HARDLINK and not target.startswith(b"/"):
        raise FormatError("hard link target is not a path", rule=21)
    if kind == SYMLINK and mode != b"777":
        raise FormatError("symbolic link whose mode is not 777", rule=15)
    if kind not in (HARDLINK, WHITEOUT) and not re.fullmatch(_STAT, b" ".join((mode, uid, gid, mtime))):
        raise FormatError("mode, owner or mtime is not a number in its one spelling", rule=11)
    if kind in (CHAR_DEVICE, BLOCK_DEVICE) and not re.fullmatch(_NUMBER + b":" + _NUMBER, size):
        raise FormatError("device number is not MAJOR:MINOR", rule=11)
    if kind in (FILE, CHUNKED):
        _diagnose_file(kind, size, digest, header)
    decode_xattrs(xattrs)


def decode_entry(line: bytes) -> Entry:
    """The entry of a line, without its LF, of an index that was loaded before.  Raises FormatError where that cannot be."""
    fields = line.split(b" ")
    try:
        kind, mode, uid, gid, mtime, size, digest, xattrs, target, path = fields
        if kind in (HARDLINK, WHITEOUT):
            return Entry(kind, unescape(path), target=b"" if target == b"-" else unescape(target))
        is_device = kind in (CHAR_DEVICE, BLOCK_DEVICE)
        major, minor = map(int, size.split(b":")) if is_device else (0, 0)
        return Entry(
            type=kind,
            path=unescape(path),
            mode=int(mode, 8),
            uid=int(uid),
            gid=int(gid),
            mtime_ns=int(mtime),
            size=0 if is_device or size == b"-" else int(size),
            digest=b"" if digest == b"-" else bytes.fromhex(digest.decode()),
            xattrs=decode_xattrs(xattrs),
            target=unescape(target) if kind == SYMLINK else b"",
            device=(major, minor),
        )
    except ValueError as error:
        raise FormatError("not an entry", rule=9) from error


_FIELD_NAMES = ("mode", "uid", "gid", "mtime", "size", "digest", "xattrs", "target")
_STAT_FIELDS = {"mode", "uid", "gid", "mtime", "xattrs"}
_FIELDS_OF = {
    FILE: _STAT_FIELDS | {"size", "digest"},
    CHUNKED: _STAT_FIELDS | {"size", "digest"},
    CHAR_DEVICE: _STAT_FIELDS | {"size"},
    BLOCK_DEVICE: _STAT_FIELDS | {"size"},
    SYMLINK: _STAT_FIELDS | {"target"},
    HARDLINK: {"target"},
    WHITEOUT: set[str](),
}


def _diagnose_file(kind: bytes, size: bytes, digest: bytes, header: Header) -> None:
    if not re.fullmatch(rb"0|%s" % _SIZE, size):
        raise FormatError("size is not a number in its one spelling", rule=11)
    hex_size = 2 * DIGEST_SIZES[header.hash_name]
    if digest != b"-" and not re.fullmatch(rb"[0-9a-f]{%d}" % hex_size, digest):
        raise FormatError(f"digest is not {hex_size} lower-case hexadecimal digits", rule=13)
    if kind == CHUNKED and size == b"0":
        raise FormatError("a chunked file is larger than a chunk", rule=14)
    if (size == b"0") != (digest == b"-"):
        raise FormatError("a file has a digest exactly if it is not empty", rule=14)
