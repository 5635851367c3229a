"""A store in a directory, local or on a network file system."""

from __future__ import annotations

import os
import stat
import time

from cafs import atomic, mountinfo, paths
from cafs.backend import Backend, Listed
from cafs.errors import CafsError, NotFound, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MODE = 0o750
"""Of a new store: what image files hold that their modes keep from others lies open in packs.  As docker's data-root."""

DIRECTORIES = ("packs", "meta", "refs", "leases", "tmp")
_NFS_WAIT_S = 60
_NETWORK = ("nfs", "cifs", "smb", "ceph", "9p", "lustre", "glusterfs", "fuse.")
"""File systems on which a name that another machine made may be seen late."""


class DirectoryBackend(Backend):
    """root: the directory."""

    is_local = True

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.root = root
        self.identity = os.path.realpath(root)

    def path(self, name: str) -> str:
        """Path of a file."""
        return os.path.join(self.root, name)

    def read(self, name: str, limit: int) -> bytes:
        return atomic.read_file(self.path(name), limit)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        fd = self._open(name)
        try:
            return atomic.read_exactly(fd, size, offset)
        finally:
            os.close(fd)

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        fd = self._open(name)
        try:
            length = os.fstat(fd).st_size
            return atomic.read_exactly(fd, min(size, length), max(length - size, 0)), length
        finally:
            os.close(fd)

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def list(self, directory: str) -> list[Listed]:
        found = []
        top = self.path(directory)
        if not os.path.isdir(top):
            raise FileNotFoundError(2, "No such file or directory", top)
        for where, _, names in os.walk(top):
            for name in names:
                try:
                    status = os.lstat(os.path.join(where, name))
                except FileNotFoundError:
                    continue  # it went meanwhile
                path = os.path.relpath(os.path.join(where, name), top)
                found.append(Listed(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda one: one.name)

    def create(self, name: str, data: bytes) -> bool:
        self._make_parents(name)
        return atomic.create_file(self.path(name), data)

    def replace(self, name: str, data: bytes) -> None:
        self._make_parents(name)
        atomic.replace_file(self.path(name), data, 0o444 if name.startswith("meta/") else 0o644)

    def _make_parents(self, name: str) -> None:
        """Never the store itself: what is away, like a disk that is not mounted, is not begun anew by a lease."""
        if not os.path.isdir(self.root):
            raise FileNotFoundError(2, "No such file or directory", self.root)
        atomic.make_directory(os.path.dirname(self.path(name)), is_exact=True)

    def swap(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """The last writer wins, as with any file: a ref is not counted, and packs/list is a hint."""
        try:
            before: bytes | None = self.read(name, 1 << 28)
        except FileNotFoundError:
            before = None
        self.replace(name, change(before))

    def remove(self, name: str) -> None:
        os.unlink(self.path(name))
        atomic.fsync_directory(os.path.dirname(self.path(name)))

    def touch(self, name: str) -> None:
        os.utime(self.path(name))

    def scratch(self) -> str:
        return self.path("tmp")

    def publish(self, temporary: str, name: str) -> None:
        self._make_parents(name)
        atomic.publish(temporary, self.path(name), replace=True)

    def settle(self) -> None:
        atomic.fsync_directory(self.path("packs"))

    def prepare(self) -> None:
        atomic.make_directory(os.path.dirname(self._gates()[0]))
        for directory in self._gates():
            atomic.make_directory(directory, MODE)
        for directory in DIRECTORIES:
            atomic.make_directory(self.path(directory), is_exact=True)

    def _gates(self) -> tuple[str, ...]:
        """The directories by whose modes all in it, which has none of its own, is open or not; those above a scope first."""
        top, is_scope, _ = self.identity.rpartition("/scopes/")
        return (top, os.path.dirname(self.identity), self.identity) if is_scope else (self.identity,)

    def open_for(self, group: str) -> None:
        """Let the members of a group read the store.  Raises NotFound, CafsError, OSError."""
        import grp

        try:
            number = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise NotFound(f"no group {quote(group)}") from None
        for directory in self._gates():
            os.chown(directory, -1, number)
            os.chmod(directory, stat.S_IMODE(os.stat(directory).st_mode) | 0o050)
        above = os.path.dirname(self._gates()[0])
        if above == paths.state():  # ours, and closed if a container was there first; each directory in it is closed itself
            os.chmod(above, stat.S_IMODE(os.stat(above).st_mode) | 0o011)
        while above != "/":
            status = os.stat(above)
            if not status.st_mode & (0o010 if status.st_gid == number else 0o001):
                raise CafsError(f"group {quote(group)} cannot pass through {quote(above)}", hint=f"chmod o+x {above}")
            above = os.path.dirname(above)

    def is_free(self) -> bool:
        try:
            return all(name in (*DIRECTORIES, "scopes") or name.startswith("tmp.") for name in os.listdir(self.root))
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _open(self, name: str) -> int:
        """Open a pack; on NFS a name that another machine just made may not be seen yet, so look again for a while."""
        deadline = 0.0
        while True:
            try:
                return os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                deadline = deadline or time.monotonic() + (
                    _NFS_WAIT_S if mountinfo.fstype(self.root).startswith(_NETWORK) else 0
                )
                if time.monotonic() >= deadline:
                    raise
                os.listdir(self.path("packs"))
                time.sleep(0.5)
