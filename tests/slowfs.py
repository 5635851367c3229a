"""A file system that shows a directory read-only, logs every read, and holds reads while a file called 'hold' exists.

usage: slowfs.py SOURCE MOUNTPOINT CONTROL    CONTROL: a directory with 'log' and, at times, 'hold'
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pyfuse3
import trio


class Slow(pyfuse3.Operations):
    def __init__(self, source: str, control: str) -> None:
        super().__init__()
        self.paths = {pyfuse3.ROOT_INODE: source}
        self.control = control

    def _attributes(self, inode: int) -> Any:
        status = os.lstat(self.paths[inode])
        found = pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(found, name, getattr(status, name))
        found.st_ino = inode
        return found

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        path = os.path.join(self.paths[parent_inode], os.fsdecode(name))
        if not os.path.lexists(path):
            raise pyfuse3.FUSEError(2)
        inode = os.lstat(path).st_ino
        self.paths[inode] = path
        return self._attributes(inode)

    async def opendir(self, inode: int, ctx: Any = None) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for number, name in enumerate(sorted(os.listdir(self.paths[fh]))[start_id:], start_id + 1):
            entry = await self.lookup(fh, os.fsencode(name))
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                break

    async def open(self, inode: int, flags: int, ctx: Any = None) -> Any:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        with open(os.path.join(self.control, "log"), "a") as log:
            log.write(f"{os.path.basename(self.paths[fh])} {offset} {size}\n")
        while os.path.exists(os.path.join(self.control, "hold")):
            await trio.sleep(0.01)
        with open(self.paths[fh], "rb") as file:
            file.seek(offset)
            return file.read(size)


if __name__ == "__main__":
    source, mountpoint, control = sys.argv[1:]
    pyfuse3.init(Slow(source, control), mountpoint, {"fsname=slowfs", "ro", "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()
