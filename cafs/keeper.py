"""What every server of mounts does beside answering: it looks after the cache, and writes a log."""

from __future__ import annotations

import logging
import os
import threading
import time

from cafs import ledger, linux, mountinfo, quota
from cafs.errors import os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.cache import Cache

_TRIM_AFTER = 256 << 20
_FIRST_S = 0.5
_KEEP_EVERY_S = 10
_SYNC_EVERY_S = 30
_EXIT_WAIT_S = 2


class Keeper:
    """Looks after the cache from a thread of its own: counters, and the quota, at first and after so much was fetched.

    trimmed: called when something went from the cache.
    is_synced: also write what was fetched to disk every half a minute, for mounts that read it without verifying it.
    """

    def __init__(
        self, cache: Cache, limit: int, *, is_synced: bool = False, trimmed: Callable[[], None] = lambda: None
    ) -> None:
        self._cache = cache
        self._limit = limit
        self._fetched = _TRIM_AFTER
        self._is_synced = is_synced
        self._trimmed = trimmed
        self._unsynced, self._synced = 1, 0.0
        self.also: Callable[[], None] = lambda: None
        """Called every ten seconds or so."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The last time."""
        self._ended.set()
        self._thread.join(_EXIT_WAIT_S)
        self._once()

    def _run(self) -> None:
        pause_s = _FIRST_S
        while not self._ended.wait(pause_s):
            self._once()
            if pause_s == _KEEP_EVERY_S:
                self._try(self.also)
            pause_s = _KEEP_EVERY_S

    def count(self) -> None:
        """Add up what was read and fetched."""
        counted = self._cache.take_stats()
        if counted.hits or counted.misses:
            quota.add_stats(self._cache.root, counted)
        self._fetched += counted.bytes_fetched
        self._unsynced += counted.bytes_fetched

    def _once(self) -> None:
        before = self._unsynced
        self.count()
        if self._unsynced == before:
            linux.trim_heap()  # nothing is going on
        if self._is_synced and self._unsynced and time.monotonic() - self._synced > _SYNC_EVERY_S:
            self._unsynced, self._synced = 0, time.monotonic()
            self._try(lambda: ledger.sync(self._cache.root))
        if self._fetched >= min(_TRIM_AFTER, self._limit // 20):
            self._fetched = 0
            self._try(self._trim)

    def _trim(self) -> None:
        if quota.trim(self._cache.root, self._limit).files:
            self._trimmed()

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # the thread goes on, whatever it was
            logging.getLogger(__name__).warning("cannot look after cache %s: %s", self._cache.root, error)


def look_anew(cache: str) -> None:
    """Have the mounts over a cache look anew what it has.

    Overlayfs remembers, for the life of an inode, in which layer it found a file: what LAZY served is not asked of the cache
    that has it now, and what went from the cache takes its space until then.
    """
    for mount in mountinfo.over(cache):
        try:
            linux.reconfigure(os.fsdecode(mount.point), is_read_only=not mount.upper)
        except OSError:
            continue  # it went meanwhile; it costs space or speed until its last user has gone


def log_to(path: str | None, otherwise: str) -> None:
    """Log to PATH; without one to syslog, and where there is none to the file OTHERWISE; with neither to standard error."""
    handler: logging.Handler
    try:
        if not path and otherwise and os.path.exists("/dev/log"):
            from logging.handlers import SysLogHandler

            handler = SysLogHandler("/dev/log")
            handler.setFormatter(logging.Formatter("cafs-mount[%(process)d]: %(message)s"))
        elif path or otherwise:
            os.makedirs(os.path.dirname(path or otherwise), mode=0o700, exist_ok=True)
            handler = logging.FileHandler(path or otherwise, delay=not path)
            handler.setFormatter(logging.Formatter("%(asctime)s cafs-mount[%(process)d]: %(levelname)s: %(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("cafs-mount: %(message)s"))
    except OSError as error:
        raise os_error(f"cannot log to {quote(path or otherwise)}", error) from error
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
