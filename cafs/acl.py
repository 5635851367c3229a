"""Access control lists: the value of the kernel's xattr, and the text that tar archives have.

With a list, the group bits of the mode are the list's mask: who leaves the list out must not keep them.  Sources: acl(5), LONG
TEXT FORM and SHORT TEXT FORM; include/uapi/linux/posix_acl_xattr.h; star(5), SCHILY.acl.access.
"""

from __future__ import annotations

import re
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Xattrs = tuple[tuple[bytes, bytes], ...]
    Row = tuple[int, int, int]  # tag, id, permissions

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
_VERSION = struct.pack("<I", 2)
_ROW = struct.Struct("<HHI")
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NOBODY = 0xFFFF_FFFF
_TAGS = {b"user": _OWNER, b"u": _OWNER, b"group": _OWNING_GROUP, b"g": _OWNING_GROUP}
_TAGS |= {b"mask": _MASK, b"m": _MASK, b"other": _OTHER, b"o": _OTHER}
_NAMES = {_OWNER: b"user", _USER: b"user", _OWNING_GROUP: b"group", _GROUP: b"group", _MASK: b"mask", _OTHER: b"other"}


def from_text(text: bytes) -> bytes:
    """The xattr's value for a list as GNU tar, star and libarchive write it.  Raises ValueError.

    A user or group that has no number in it is looked up on this machine, as these programs do.
    """
    lines = [line.partition(b"#")[0].strip() for line in re.split(rb"[\n,]", text)]
    return _encode(sorted(_row(line.removeprefix(b"default:")) for line in lines if line))


def _row(line: bytes) -> Row:
    fields = [field.strip() for field in line.split(b":")]
    tag = _TAGS.get(fields[0], 0)
    if tag in (_MASK, _OTHER) and len(fields) == 2:
        fields.insert(1, b"")
    if not tag or len(fields) not in (3, 4) or not re.fullmatch(b"[rwx-]*", fields[2]) or (fields[1] and tag > _OWNING_GROUP):
        raise ValueError(f"{line!r} is not an entry of an access control list")
    permissions = sum(bit for letter, bit in ((b"r", 4), (b"w", 2), (b"x", 1)) if letter in fields[2])
    if not fields[1]:
        return tag, _NOBODY, permissions
    return tag * 2, _number(fields[3] if len(fields) == 4 else fields[1], is_group=tag == _OWNING_GROUP), permissions


def _number(text: bytes, *, is_group: bool) -> int:
    if re.fullmatch(b"[0-9]{1,10}", text):
        return int(text)
    import grp
    import pwd

    name = text.decode("utf-8", "surrogateescape")
    try:
        return grp.getgrnam(name).gr_gid if is_group else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"there is no {'group' if is_group else 'user'} {name!r}: tar --numeric-owner keeps numbers") from None


def _encode(rows: list[Row]) -> bytes:
    tags = {tag for tag, _, _ in rows}
    names = {(tag, number) for tag, number, _ in rows}
    needed = {_OWNER, _OWNING_GROUP, _OTHER} | ({_MASK} if tags & {_USER, _GROUP} else set())
    if len(names) != len(rows) or needed - tags or any(number > _NOBODY for _, number in names):
        raise ValueError("not a whole access control list")
    return _VERSION + b"".join(_ROW.pack(tag, permissions, number) for tag, number, permissions in rows)


def _decode(value: bytes) -> list[Row]:
    """Raises ValueError."""
    if value[:4] != _VERSION or len(value) % _ROW.size != 4:
        raise ValueError("not an access control list")
    rows = [(tag, number, permissions) for tag, permissions, number in _ROW.iter_unpack(value[4:])]
    if _encode(rows) != value or not {tag for tag, _, _ in rows} <= _NAMES.keys():
        raise ValueError("not an access control list")
    return rows


def to_text(value: bytes) -> bytes:
    """The text that GNU tar and libarchive read, with numbers for names.  Raises ValueError."""
    return b",".join(
        b"%s:%s:%s" % (_NAMES[tag], b"%d" % number if tag in (_USER, _GROUP) else b"", _letters(permissions))
        for tag, number, permissions in _decode(value)
    )


def _letters(permissions: int) -> bytes:
    return b"".join(letter if permissions & bit else b"-" for letter, bit in ((b"r", 4), (b"w", 2), (b"x", 1)))


def settled(mode: int, xattrs: Xattrs) -> tuple[int, Xattrs]:
    """Mode and xattrs as the kernel has them once the list is set: what the mode can say is no list.  Raises ValueError."""
    value = dict(xattrs).get(ACCESS)
    if value is None:
        return mode, xattrs
    rights = _rights(value)
    mode = mode & ~0o777 | rights[_OWNER] << 6 | rights.get(_MASK, rights[_OWNING_GROUP]) << 3 | rights[_OTHER]
    return mode, xattrs if _MASK in rights else tuple(pair for pair in xattrs if pair[0] != ACCESS)


def mode_without(mode: int, xattrs: Iterable[tuple[bytes, bytes]]) -> int:
    """The mode of a file whose list cannot be kept: nobody may more than with it but those whom it kept out by name."""
    value = dict(xattrs).get(ACCESS)
    if value is None:
        return mode
    try:
        rights = _rights(value)
    except ValueError:
        return mode & ~0o070
    return mode & ~0o070 | (rights[_OWNING_GROUP] & rights.get(_MASK, 7)) << 3


def _rights(value: bytes) -> dict[int, int]:
    return {tag: permissions for tag, _, permissions in _decode(value) if tag not in (_USER, _GROUP)}
