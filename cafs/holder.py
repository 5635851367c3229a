"""Holding images of a store for as long as they are mounted, so that no collection deletes what they need."""

from __future__ import annotations

import json
import logging
import threading
import time

from cafs import atomic, lease
from cafs.errors import CafsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cafs.store import Store

    Held = tuple[str, int]  # image digest, pid of who holds it

_LOOK_EVERY_S = 10.0
_EXIT_WAIT_S = 2.0
_log = logging.getLogger(__name__)


class Holder:
    """Keeps a lease for each (image, pid) that WANTED returns, from a thread of its own: a store may take its time.

    state: a file that remembers the leases, for the next holder after this process was killed.  A store that cannot be written
    to has no leases: its owner's grace time has to do.
    """

    def __init__(self, store: Store, wanted: Callable[[], set[Held]], state: str | None = None) -> None:
        self._store = store
        self._wanted = wanted
        self._state = state
        self._names: dict[Held, str] = {}
        self._touched = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._poked = threading.Event()
        self._forget = self._load()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Take the leases, then keep them."""
        self.look()
        self._thread.start()

    def look(self) -> None:
        """Take what is wanted now and not held; let go what is not wanted any more."""
        with self._lock:
            self._adjust(self._wanted())

    def poke(self) -> None:
        """Look soon, on the thread."""
        self._poked.set()

    def let_go(self) -> None:
        """The end."""
        self._ended.set()
        self.poke()
        if self._thread.ident is not None:
            self._thread.join(_EXIT_WAIT_S)
        if not self._thread.is_alive():
            self._adjust(set())

    def _run(self) -> None:
        while not self._ended.is_set():
            self._poked.wait(_LOOK_EVERY_S)
            self._poked.clear()
            try:
                self.look()
            except OSError as error:  # the thread goes on: leases that nobody touches die
                _log.warning("cannot look what is mounted: %s", error)
            if time.monotonic() - self._touched > lease.REFRESH_S:
                self._touched = time.monotonic()
                for one, name in list(self._names.items()):
                    self._names[one] = self._renew(one, name)

    def _renew(self, one: Held, name: str) -> str:
        """Touch a lease; take it anew if it could not be taken, or was removed, as one that was not touched for too long is."""
        try:
            if name:
                self._store.backend.touch(name)
                return name
        except FileNotFoundError:
            pass
        except (CafsError, OSError):
            return name
        return self._take(one)

    def _take(self, one: Held) -> str:
        """The name of a new lease, '' if none can be had."""
        return self._try(lambda: lease.take(self._store.backend, "mount", one[0], one[1])) or ""

    def _adjust(self, wanted: set[Held]) -> None:
        if wanted == self._names.keys() and not self._forget:
            return
        for one in sorted(wanted - self._names.keys()):
            self._names[one] = self._take(one)
        self._forget += [self._names.pop(one) for one in list(self._names.keys() - wanted)]
        for name in filter(None, self._forget):
            self._try(lambda name=name: self._store.backend.remove(name))  # type: ignore[misc]
        self._forget = []
        self._save()

    def _try(self, call: Callable[[], str | None]) -> str | None:
        try:
            return call()
        except (CafsError, OSError):
            return None  # it dies of age, or with the process that it names

    def _load(self) -> list[str]:
        """The leases of a holder that was killed."""
        try:
            found = json.loads(atomic.read_file(self._state, 1 << 20))["names"] if self._state else []
            return [name for name in found if isinstance(name, str)]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _save(self) -> None:
        if self._state:
            try:
                images = sorted({image for image, _ in self._names})
                found = {"images": images, "names": sorted(filter(None, self._names.values()))}
                atomic.replace_hint(self._state, json.dumps(found).encode(), 0o600)
            except OSError:
                pass


def held(state: str) -> set[str]:
    """Digests of the images for which a holder has taken leases, or tried to."""
    try:
        return set(json.loads(atomic.read_file(state, 1 << 20))["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
