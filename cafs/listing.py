"""Entries for people and programs: `ls -l` lines and JSON."""

from __future__ import annotations

import stat
import time

from cafs import format as fmt
from cafs.escape import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.format import Entry
    from cafs.index import Index


def as_json(entry: Entry) -> dict[str, object]:
    """Everything but the path.  Times in ns, sizes in bytes, digests in hex."""
    found: dict[str, object] = {"type": entry.type.decode()}
    if entry.type == fmt.HARDLINK:
        found["target"] = escape(entry.target).decode()
        return found
    found |= {"mode": f"{entry.mode:o}", "uid": entry.uid, "gid": entry.gid, "mtime_ns": entry.mtime_ns}
    if entry.type in (fmt.FILE, fmt.CHUNKED):
        found |= {"size": entry.size, "digest": entry.digest.hex()}
    if entry.type in (fmt.CHAR_DEVICE, fmt.BLOCK_DEVICE):
        found["device"] = f"{entry.device[0]}:{entry.device[1]}"
    if entry.type == fmt.SYMLINK:
        found["target"] = escape(entry.target).decode()
    if entry.xattrs:
        found["xattrs"] = {escape(name).decode(): escape(value).decode() for name, value in entry.xattrs}
    return found


def long_line(index: Index, entry: Entry) -> bytes:
    """Like `ls -ln --time-style=long-iso`, in UTC, paths escaped."""
    number = index.find(entry.path)
    assert number is not None
    inode = index.inode(number)
    mode = stat.filemode(fmt.TYPE_BITS.get(index.type[inode], 0) | entry.mode)
    links = index.links.get(inode, 1)
    size = (
        f"{entry.device[0]},{entry.device[1]}" if entry.type in (fmt.CHAR_DEVICE, fmt.BLOCK_DEVICE) else str(index.size[inode])
    )
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.mtime_ns // 1_000_000_000))
    arrow = b" -> " + escape(entry.target) if entry.type == fmt.SYMLINK else b""
    head = f"{mode} {links:3} {entry.uid:5} {entry.gid:5} {size:>10} {when} ".encode()
    return head + escape(entry.path) + arrow
