"""Reading from an image without leaving it: users, groups, programs.  Every path goes through openat2 RESOLVE_IN_ROOT."""

from __future__ import annotations

import errno
import os
import stat

from cafs import atomic, linux
from cafs.errors import CafsError, quote

_FILE_MAX = 1 << 20


class User:
    """Who the command runs as.  groups: supplementary ids, the primary among them."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def read_table(root: int, path: str) -> list[list[str]]:
    """Lines of a file like /etc/passwd as fields; empty if there is none.  At most 1 MiB is read, regular files only."""
    try:
        fd = linux.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        data = atomic.read_exactly(fd, _FILE_MAX, 0)
    finally:
        os.close(fd)
    return [line.split(":") for line in data.decode("utf-8", "surrogateescape").split("\n")]


def is_number(text: str) -> bool:
    """Whether TEXT is an id and not a name; str.isdigit also takes what int() does not."""
    return text.isascii() and text.isdigit() and len(text) <= 10


def resolve(root: int, wanted: str, more: list[str] | None = None) -> User:
    """USER[:GROUP] by the image's own tables, and MORE groups.  A number is never looked up as a name.  Raises CafsError."""
    name, colon, group = (wanted or "0").partition(":")
    name = name or "0"
    passwd = [row for row in read_table(root, "/etc/passwd") if len(row) >= 6 and is_number(row[2]) and is_number(row[3])]
    uid, row = _find(passwd, name, "user")
    gid = int(row[3]) if row else 0
    home = row[5] if row else "/"
    table = [line for line in read_table(root, "/etc/group") if len(line) >= 4 and is_number(line[2])]
    if colon:
        gid = _find(table, group, "group")[0]
        groups = [gid]
    else:
        member = row[0] if row else None
        groups = sorted({gid, *(int(line[2]) for line in table if member in line[3].split(","))})
    groups += [number for number in (_find(table, text, "group")[0] for text in more or []) if number not in groups]
    return User(uid, gid, groups, home or "/")


def _find(table: list[list[str]], wanted: str, what: str) -> tuple[int, list[str] | None]:
    if is_number(wanted):
        number = int(wanted)
        if number > 0xFFFF_FFFE:
            raise CafsError(f"{what} id {wanted} is out of range")
        return number, next((row for row in table if int(row[2]) == number), None)
    for row in table:
        if row[0] == wanted:
            return int(row[2]), row
    raise CafsError(f"no {what} {quote(wanted)} in the image")


def find_program(root: int, name: str, path: str, cwd: str) -> str | None:
    """None if the program can be started, else the reason: an errno's name, ENOENT (127) or another (126)."""
    places = [name] if "/" in name else [f"{directory or '.'}/{name}" for directory in path.split(":")]
    worst = "ENOENT"
    for place in places:
        try:
            fd = linux.open_in_root(root, os.path.join(cwd, place), os.O_PATH)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                worst = errno.errorcode[error.errno or 0]
            continue
        status = os.fstat(fd)
        os.close(fd)
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o111:
            return None
        worst = "EISDIR" if stat.S_ISDIR(status.st_mode) and "/" in name else "EACCES"
    return worst


def refuse_links(root: int) -> None:
    """An image whose /dev, /proc or /sys is a link would steer the runtime's mounts (CVE-2025-31133 and its kin)."""
    for name in ("dev", "proc", "sys"):
        try:
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise CafsError(f"the image's '/{name}' is not a directory")


def open_null(pid: int) -> int:
    """/dev/null of a container, opened.  Raises CafsError if it is something else there."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = linux.open_in_root(root, "/dev/null", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise CafsError(f"cannot open '/dev/null' of the container: {error.strerror}") from error
    finally:
        os.close(root)
    if os.fstat(fd).st_rdev != os.makedev(1, 3):
        os.close(fd)
        raise CafsError("'/dev/null' of the container is something else")
    return fd
