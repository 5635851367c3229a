"""The binding of a Tree to pyfuse3 and trio; the only module that imports them.

Everything is immutable, so timeouts are unlimited, names that do not exist are remembered by the kernel, and pages are kept.
Whatever may wait for a store runs on a thread under a time limit and ends in EIO (fuse.rst: a hung server hangs its users).
"""

from __future__ import annotations

import errno
import logging
import os
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cafs import format as fmt
from cafs.errors import CafsError, UnsupportedError
from cafs.extras import extra
from cafs.tree import BLOCK_SIZE, Tree

with extra("fuse"):
    import pyfuse3
    import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = logging.getLogger(__name__)
_FOREVER = 1e9
Result = TypeVar("Result")
Given = ParamSpec("Given")


def answering(method: Callable[Given, Coroutine[Any, Any, Result]]) -> Callable[Given, Coroutine[Any, Any, Result]]:
    """A handler in which whatever goes wrong is EIO and a line in the log: an exception that got out would end the mount."""

    @wraps(method)
    async def wrapped(*arguments: Given.args, **options: Given.kwargs) -> Result:
        try:
            return await method(*arguments, **options)
        except pyfuse3.FUSEError:
            raise
        except (CafsError, OSError) as error:
            _log.error("%s: %s", method.__name__, error)
        except Exception:
            _log.exception("%s%r failed", method.__name__, arguments[1:])
        raise pyfuse3.FUSEError(errno.EIO)

    return wrapped


class Operations(pyfuse3.Operations):
    """One mount.  File handle = inode: an open has no state of its own."""

    supports_dot_lookup = False
    enable_acl = True
    """Without it the kernel takes the mask of an ACL for the group's bits."""

    def __init__(self, tree: Tree, limit_s: float) -> None:
        super().__init__()
        self.tree = tree
        self.limit_s = limit_s
        self.threads = trio.CapacityLimiter(16)

    def _entry(self, inode: int) -> Any:
        found = pyfuse3.EntryAttributes()
        found.generation = 0
        found.entry_timeout = found.attr_timeout = _FOREVER
        found.st_blksize = BLOCK_SIZE
        return self._fill(found, inode)

    def _fill(self, found: Any, inode: int) -> Any:
        """Set what differs from inode to inode; one record serves a whole directory."""
        index, at = self.tree.index, inode - 1
        found.st_ino = inode
        found.st_mode = self.tree.mode(inode)
        found.st_nlink = self.tree.links(inode)
        found.st_uid, found.st_gid = index.uid[at], index.gid[at]
        found.st_rdev = self.tree.device(inode)
        found.st_size = size = index.size[at]
        found.st_blocks = (size + 511) // 512
        found.st_atime_ns = found.st_ctime_ns = found.st_mtime_ns = index.mtime_ns[at]
        return found

    @answering
    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._entry(inode)

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        entry = self.tree.child(parent_inode, name)
        if entry is None:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = _FOREVER
            return missing
        return self._entry(self.tree.inode(entry))

    @answering
    async def readlink(self, inode: int, ctx: Any = None) -> bytes:
        return self.tree.index.target[inode - 1]

    @answering
    async def opendir(self, inode: int, ctx: Any = None) -> int:
        return inode

    @answering
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        children = self.tree.index.children(fh - 1)
        entry = self._entry(fh)
        for position in range(start_id, len(children)):
            child = children[position]
            self._fill(entry, self.tree.inode(child))
            if not pyfuse3.readdir_reply(token, self.tree.index.name(child), entry, position + 1):
                break

    @answering
    async def open(self, inode: int, flags: int, ctx: Any = None) -> Any:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @answering
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        data = self.tree.read_ready(fh, offset, size)
        return bytes(data if data is not None else await self._limited(self.tree.read, fh, offset, size))

    async def _limited(self, function: Callable[..., Result], *arguments: int) -> Result:
        """Run on a thread; whatever goes wrong, or takes too long, is EIO and a line in the log."""
        try:
            with trio.fail_after(self.limit_s):
                return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True, limiter=self.threads)
        except trio.TooSlowError:
            _log.error("reading %s: no answer within %g s", self.tree.describe(arguments[0]), self.limit_s)
        except OSError:
            pass  # the reader has said why
        raise pyfuse3.FUSEError(errno.EIO)

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: Any = None) -> bytes:
        value = self.tree.xattrs(inode).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @answering
    async def listxattr(self, inode: int, ctx: Any = None) -> list[bytes]:
        return list(self.tree.xattrs(inode))

    @answering
    async def access(self, inode: int, mode: int, ctx: Any = None) -> bool:
        return True  # default_permissions: the kernel has checked

    @answering
    async def statfs(self, ctx: Any = None) -> Any:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = BLOCK_SIZE
        found.f_blocks = self.tree.blocks
        found.f_files = len(self.tree.index)
        found.f_namemax = fmt.NAME_MAX
        return found


def serve(tree: Tree, mountpoint: str, name: str, *, extra: set[str], limit_s: float, ready: Callable[[], None]) -> None:
    """Mount and answer until unmounted.  ready: called once the mount is there.  Raises UnsupportedError."""
    options = {f"fsname={name}", "subtype=cafs", "ro", "default_permissions", *extra}
    if os.geteuid() == 0:
        options.add("allow_other")
    operations = Operations(tree, limit_s)
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise UnsupportedError(f"cannot mount on '{mountpoint}': {error}", hint="apt install fuse3") from error
    unmount = False
    try:
        ready()
        trio.run(pyfuse3.main)
        unmount = True
    finally:
        pyfuse3.close(unmount=unmount)
