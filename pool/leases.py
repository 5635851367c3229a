"""The images of jobs that have not ended are kept from collection: leases in the store, as mounts have.  cafs-store(5)."""

from __future__ import annotations

import threading
import time

from cafs import lease, paths
from cafs.errors import CafsError
from cafs.store import Store

_LOOKED_S = 30.0


class Leases:
    """store: as of --store, '' for this machine's.  Stores that cannot be written to hold none."""

    def __init__(self, store: str) -> None:
        self._store = store or paths.store()
        self._names: dict[str, str] = {}
        self._wanted: frozenset[str] = frozenset()
        self._next = 0.0
        self._touch_after = time.monotonic() + lease.REFRESH_S
        self._thread: threading.Thread | None = None

    def mind(self, wanted: frozenset[str]) -> None:
        """wanted: digests, in hexadecimal.  What is to be done is done in a thread: a store may be far away."""
        now = time.monotonic()
        if (wanted == self._wanted and now < self._next) or (self._thread and self._thread.is_alive()):
            return
        self._wanted, self._next = wanted, now + _LOOKED_S
        if wanted or self._names:
            self._thread = threading.Thread(target=self.hold, args=(wanted,), daemon=True)
            self._thread.start()

    def hold(self, wanted: frozenset[str]) -> None:
        """Take those that are missing, touch the others from time to time, give back what is not wanted."""
        try:
            backend = Store(self._store).backend
            for digest in wanted - set(self._names):
                self._names[digest] = lease.take(backend, "mount", digest)
            for digest in set(self._names) - wanted:
                backend.remove(self._names.pop(digest))
            if time.monotonic() >= self._touch_after:
                self._touch_after = time.monotonic() + lease.REFRESH_S
                for name in self._names.values():
                    backend.touch(name)
        except (OSError, CafsError):
            return  # it is tried again; nothing that runs depends on it
