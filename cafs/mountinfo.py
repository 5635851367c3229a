"""What is mounted: /proc/self/mountinfo (proc_pid_mountinfo(5)), read as bytes, and what of it is ours."""

from __future__ import annotations

import os
import re

from cafs import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FSTYPE = b"fuse.cafs"
_OCTAL = re.compile(rb"\\([0-7]{3})")
_UPPER = re.compile(rb"(?:^|,)upperdir=([^,]*)")
_OWNER = re.compile(rb"(?:^|,)user_id=([0-9]+)")


class Mount:
    """One line: mount point (raw bytes), type, source, options of the file system as they are spelled, MAJOR:MINOR.

    words: options of the mount itself, as nosuid.
    """

    __slots__ = ("device", "fstype", "options", "point", "source", "words")

    def __init__(
        self, point: bytes, fstype: bytes, source: bytes, options: bytes = b"", device: str = "", words: bytes = b""
    ) -> None:
        self.words = set(words.decode().split(","))
        self.device = device
        self.point = point
        self.fstype = fstype
        self.source = source
        self.options = options

    @property
    def owner(self) -> int:
        """For FUSE the uid of who serves it, else -1."""
        found = _OWNER.search(self.options)
        return int(found[1]) if found else -1

    @property
    def upper(self) -> str:
        """The directory that takes what is written to an overlay, '' if there is none."""
        found = _UPPER.search(self.options)
        return os.fsdecode(_unescape(found[1])) if found else ""

    @property
    def layers(self) -> list[tuple[str, str]]:
        """The lower layers of an overlay, topmost first: (key, path), the keys as fsconfig(2) has them."""
        pairs = [(key, _unescape(path)) for key, _, path in (one.partition(b"=") for one in self.options.split(b","))]
        found = [(key.decode(), os.fsdecode(path)) for key, path in pairs if key in (b"lowerdir+", b"datadir+")]
        for key, path in pairs:
            if key == b"lowerdir":  # Linux 6.7, or whoever mounts by mount(2)
                lowers, *data = re.split(rb"(?<!\\)::", path)
                found += [("lowerdir+", _plain(one)) for one in re.split(rb"(?<!\\):", lowers)]
                found += [("datadir+", _plain(one)) for one in data]
        return found

    def has_data(self, path: str) -> bool:
        """Whether it is an overlay that has PATH as a layer of data."""
        return ("datadir+", path) in self.layers

    def stands_on_tree(self, path: str) -> bool:
        """Whether it is an overlay over the tree at PATH, or maybe: one may have been given its layer by descriptor."""
        return any(layer == path or layer.startswith("/proc/self/fd/") for key, layer in self.layers if key == "lowerdir+")

    @property
    def digest(self) -> str:
        """Image or index digest of one of our mounts."""
        return self.source.removeprefix(b"cafs:").decode("latin-1")


def _plain(path: bytes) -> str:
    """A path of lowerdir= without the backslashes before what means something there."""
    return os.fsdecode(re.sub(rb"\\(.)", rb"\1", path))


def _unescape(text: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text)


def writer_to(upper: str) -> tuple[str, Mount] | None:
    """An overlay that has the directory UPPER to write to, in any mount namespace: ('self' or a pid in it, mount)."""
    wanted = os.stat(upper)
    for pid, found in namespaces():
        for mount in found:
            try:
                # /proc/self/fd/N, of a container of the fuse engine, would be a descriptor of ours.
                is_path = mount.upper and not mount.upper.startswith("/proc/")
                if is_path and os.path.samestat(os.stat(f"/proc/{pid}/root{mount.upper}"), wanted):
                    return pid, mount
            except OSError:
                continue  # the process ended, or the directory has gone
    return None


def namespaces() -> Iterator[tuple[str, list[Mount]]]:
    """The mounts of each mount namespace that has a process, ours first: ('self' or a pid in it, mounts)."""
    seen = set()
    for pid in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                yield pid, mounts(pid)
        except OSError:
            continue  # it ended


def elsewhere() -> Iterator[Mount]:
    """The mounts of all other mount namespaces."""
    return (mount for pid, found in namespaces() if pid != "self" for mount in found)


def mounts(pid: str = "self") -> list[Mount]:
    """All mounts of a process's namespace, in the order in which they were made."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        lines = file.read().split(b"\n")  # a mount point may have a carriage return in it
    found = []
    for line in filter(None, lines):
        left, _, right = line.partition(b" - ")
        fstype, source, options = right.split(b" ", 2)
        _, _, device, _, point, words, *_ = left.split(b" ")
        found.append(Mount(_unescape(point), fstype, _unescape(source), options, device.decode(), words))
    return found


def is_shared(path: str) -> bool:
    """Whether the mount that a path is on tells its peers of what is mounted below it."""
    wanted = os.fsencode(os.path.realpath(path))
    best, found = -1, False
    with open("/proc/self/mountinfo", "rb") as file:
        for line in filter(None, file.read().split(b"\n")):
            fields = line.partition(b" - ")[0].split(b" ")
            point = _unescape(fields[4])
            if len(point) >= best and (wanted + b"/").startswith(point.rstrip(b"/") + b"/"):
                best, found = len(point), any(field.startswith(b"shared:") for field in fields[6:])
    return found


def is_kernel(mount: Mount) -> bool:
    """Whether a mount is of the kernel engine; only root can mount an overlay, outside of a user namespace."""
    return mount.fstype == b"overlay" and mount.source.startswith(b"cafs:")


def over(cache: str) -> list[Mount]:
    """The mounts of the kernel engine over a cache directory."""
    return [mount for mount in mounts() if is_kernel(mount) and mount.has_data(paths.data(cache))]


def ours() -> list[Mount]:
    """The mounts of cafs-mount."""
    return [mount for mount in mounts() if mount.fstype == FSTYPE or is_kernel(mount)]


def is_mine(mount: Mount) -> bool:
    """Whether a mount is of cafs-mount and served by this user: anybody may mount anything and call it the same."""
    return (mount.fstype == FSTYPE and mount.owner == os.geteuid()) or (is_kernel(mount) and not os.geteuid())


def at(path: str) -> Mount | None:
    """What is mounted on top at exactly PATH (absolute, no links), or None."""
    found = [mount for mount in mounts() if mount.point == os.fsencode(path)]
    return found[-1] if found else None


def fstype(path: str) -> str:
    """Type of the file system that PATH is on."""
    device = os.stat(path).st_dev
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            left, _, right = line.partition(b" - ")
            if left.split(b" ")[2] == wanted:
                return right.split(b" ")[0].decode()
    return ""


def lazy_below(mount: Mount) -> str:
    """Where LAZY is mounted on which a mount of the kernel engine stands; '' for any other mount."""
    data = [layer for key, layer in mount.layers if key == "datadir+"] if is_kernel(mount) else []
    return data[-1] if data else ""


def answers(path: str) -> bool:
    """Whether the servers of the mount at PATH are alive.

    By statfs(2): what stat(2) says may come from the kernel's cache.  An overlay answers by itself: LAZY below it is asked.
    """
    here = at(path)
    lazy = lazy_below(here) if here else ""
    if lazy and at(lazy) is None:
        return False  # its servers were found dead before, by way of another mount
    try:
        for one in filter(None, (lazy, path)):
            os.statvfs(one)
    except OSError:
        return False
    return True
