"""Where a store keeps its files: what every place can do, and which place a URL means.

Names are those of cafs-store(5), LAYOUT, relative, with slashes.  A file that is not there is FileNotFoundError; a local
failure is OSError, one of another machine RemoteError.
"""

from __future__ import annotations

from cafs.errors import UnsupportedError, UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


class Listed:
    """A file that a listing shows.  name: relative to what was listed; size in bytes; mtime_s: seconds since 1970."""

    __slots__ = ("mtime_s", "name", "size")

    def __init__(self, name: str, size: int, mtime_s: float) -> None:
        self.name = name
        self.size = size
        self.mtime_s = mtime_s


class Backend:
    """One place.  url: as a user writes it; identity: the same for all ways to write it.

    is_local: files are on a mounted file system.  This class can do nothing: a place overrides what it can.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = self.identity = url

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most LIMIT bytes."""
        self._cannot("read")

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """SIZE bytes at OFFSET; fewer only where the file ends."""
        self._cannot("read")

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        """The last SIZE bytes, or all if there are fewer, and the size of the file."""
        self._cannot("read")

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        self._cannot("read")

    def list(self, directory: str) -> list[Listed]:
        """All files below a directory, at any depth, by name.  Raises CannotList where nothing can be listed."""
        raise CannotList(f"store {quote(self.url)} cannot be listed")

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless it is there, durably; whether it was made.  The content must be implied by the name."""
        self._cannot("written")

    def replace(self, name: str, data: bytes) -> None:
        """Make a file hold DATA, durably: a reader sees the old or the new."""
        self._cannot("written")

    def swap(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace what a file holds by what CHANGE makes of it (None: there is none); calls it again if another was faster."""
        self._cannot("written")

    def remove(self, name: str) -> None:
        """Remove a file, durably."""
        self._cannot("written")

    def touch(self, name: str) -> None:
        """Make a file look new."""
        self._cannot("written")

    def scratch(self) -> str:
        """A local directory in which a pack is made before `publish`."""
        self._cannot("written")

    def publish(self, temporary: str, name: str) -> None:
        """Give a finished, fsynced file of `scratch` its name; what had the name is replaced.  The temporary file goes."""
        self._cannot("written")

    def settle(self) -> None:
        """Make durable what others published."""

    def prepare(self) -> None:
        """Make what has to be there before the first file."""
        self._cannot("written")

    def open_for(self, group: str) -> None:
        """Let the members of a group read it, where the file system says who may."""
        raise UsageError(f"store {quote(self.url)} is no directory: who may read it is said there", hint="leave out --group")

    def is_free(self) -> bool:
        """Whether nothing of anybody else's is here, so that a store can be made."""
        return False

    def _cannot(self, what: str) -> NoReturn:
        raise UnsupportedError(f"store {quote(self.url)} cannot be {what}: it is read-only")


class CannotList(UnsupportedError):
    """This place has no listing, as a web server has none."""
