"""Putting objects into a store: one writer, one lease, packs in the order in which objects are put.

A pack becomes visible only whole: temporary file, fsync, link.  Killing the writer at any point leaves at most temporary
files and a lease, which `cafs-store fsck --repair` removes.
"""

from __future__ import annotations

import os
import time

from cafs import atomic, candidates, lease, pack
from cafs.digest import PLAIN
from cafs.errors import CafsError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from cafs.store import Store


class Writer:
    """A context manager.  Leaving it normally flushes; leaving it with an error discards the open pack.

    Counters: objects and raw bytes put, stored bytes written, packs made (their names in `made`).
    for_collection: whether a collection itself writes, which minds its candidates.
    """

    def __init__(self, store: Store, *, for_collection: bool = False) -> None:
        self.store = store
        self.for_collection = for_collection
        self.made: list[str] = []
        self.objects = self.raw_bytes = self.stored_bytes = self.packs = 0
        self._listed = 0
        self._rows: list[tuple[bytes, int, int, int, int]] = []
        self._open_names: set[tuple[bytes, int]] = set()
        self._fd = -1
        self._offset = 0
        self._temporary = ""
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._candidates: set[str] = set()
        self._lease = ""
        self._lease_time = 0.0

    def __enter__(self) -> Writer:
        try:
            self._lease, self._lease_time = lease.take(self.store.backend, "writer"), time.monotonic()
            self.store.refresh()
            self._candidates = candidates.names(self.store.backend)
            self.store.hide(name.removeprefix("packs/") for name in self._candidates)
            self.store.claim = self.claim
        except OSError as error:
            raise os_error(f"cannot write to store {quote(self.store.root)}", error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._discard()
            self.store.claim = lambda name: None
            self.store.show()
            if self._lease:
                self._drop_lease()

    def has(self, digest: bytes, kind: int = PLAIN) -> bool:
        """Whether the store, or this writer's open pack, has the object."""
        return (digest, kind) in self._open_names or self.store.has(digest, kind)

    def put(self, digest: bytes, kind: int, frame: bytes) -> bool:
        """Add an object's frame unless it is there; whether it was added.  The caller made the digest from the bytes."""
        if self.has(digest, kind):
            return False
        try:
            self._refresh_lease()
            if self._fd < 0:
                self._open_pack()
            self._rows.append((self.store.name_of(digest), kind, self._offset, len(frame), pack.frame_raw_size(frame)))
            self._open_names.add((digest, kind))
            self._offset += len(frame)
            self._pending.append(frame)
            self._pending_size += len(frame)
            if self._pending_size >= 1 << 20:
                self._write_pending()
            if self._offset >= pack.PACK_TARGET:
                self._close_pack()
        except OSError as error:
            raise self._error(error) from error
        self.objects += 1
        self.raw_bytes += pack.frame_raw_size(frame)
        self.stored_bytes += len(frame)
        return True

    def publish(self, temporary: str, name: str, records: pack.Records) -> None:
        """Give a finished, fsynced pack its name.  Raises OSError, CafsError.

        A pack of this name that is there already may be damaged, and this one is not: so this one takes its place.
        """
        self.claim(f"packs/{name}")
        self.store.backend.publish(temporary, f"packs/{name}")
        self.store.add_pack(name, records)
        self.packs += 1
        self.made.append(name)

    def claim(self, name: str) -> None:
        """Before a file is made, or relied upon, that a collection may be about to delete: keep it from doing so."""
        if name in self._candidates and not self.for_collection:
            candidates.clear(self.store.backend)
            self._candidates = set()

    def flush(self) -> None:
        """Make everything that was put durable and visible."""
        try:
            if self._rows:
                self._close_pack()
            else:  # what was there already may be the pack of a writer that died between its link and its fsync
                self.store.backend.settle()
            if self.packs > self._listed:
                self.store.write_pack_list()
                self._listed = self.packs
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> CafsError:
        return os_error(f"cannot write to store {quote(self.store.root)}", error)

    def _refresh_lease(self) -> None:
        if time.monotonic() - self._lease_time > lease.REFRESH_S:
            self.store.backend.touch(self._lease)
            self._lease_time = time.monotonic()

    def _drop_lease(self) -> None:
        try:
            self.store.backend.remove(self._lease)
        except (OSError, CafsError):
            pass  # it dies of age

    def _open_pack(self) -> None:
        self._fd, self._temporary = atomic.open_temporary(self.store.backend.scratch(), 0o444)
        self._pending, self._pending_size = [pack.PACK_MAGIC], len(pack.PACK_MAGIC)
        self._offset = len(pack.PACK_MAGIC)

    def _write_pending(self) -> None:
        atomic.write_all_parts(self._fd, self._pending)
        self._pending, self._pending_size = [], 0

    def _close_pack(self) -> None:
        records = pack.Records.build(self.store.hash_name, self._rows)
        footer = records.encode_footer()
        self._pending.append(footer)
        self._write_pending()
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self.publish(self._temporary, self.store.hash(footer).hex(), records)
        self._temporary = ""
        self._rows, self._open_names = [], set()

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary:
            atomic.unlink_quietly(self._temporary)
            self._temporary = ""
