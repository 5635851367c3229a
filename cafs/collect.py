"""Garbage collection: what no ref and no mount needs is listed, and deleted after the grace time.  cafs-store(5), COLLECTION.

Restartable: every step leaves a sound store.  Order: packs that are mostly dead are copied, locators made anew, candidates
listed; then manifests, indexes and locators are deleted, then packs.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from cafs import candidates, image, lease, leftovers, locator, steps
from cafs.bulk import read_frames
from cafs.candidates import Candidate
from cafs.errors import BusyError, CafsError, CorruptError, quote
from cafs.packs import PACK_LIST, encode_pack_list
from cafs.transfer import wanted
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.bulk import Key
    from cafs.index import Index
    from cafs.store import Store

    Row = tuple[bytes, int, int, int, int]  # digest, kind, offset, frame size, raw size

GRACE_S = 86400
_MOSTLY = 0.5
"""A pack with a smaller share of live bytes is copied."""


@dataclass(slots=True)
class Report:
    """What a collection did, or would do.  deleted, waiting: files; *_bytes: their sizes; repacked: packs copied."""

    images: int = 0
    objects: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    waiting: int = 0
    waiting_bytes: int = 0
    repacked: int = 0


@dataclass(slots=True)
class _Live:
    """What is needed: names of meta files, objects, the indexes that need them, names of images that may have profiles."""

    names: set[str] = field(default_factory=set)
    objects: set[Key] = field(default_factory=set)
    indexes: dict[bytes, Index] = field(default_factory=dict)
    profiled: set[str] = field(default_factory=set)
    images: int = 0


def collect(store: Store, *, grace_s: float = GRACE_S, dry_run: bool = False, steps_s: float = steps.KEPT_S) -> Report:
    """One pass; what dead writers have left goes, too.

    steps_s: how long layers of builds are kept that no image has, after they were used.
    Raises BusyError if another runs, and CorruptError, with nothing deleted, if what is needed is damaged.
    """
    store.is_checked = True
    store.refresh()
    if dry_run:
        return _Pass(store, grace_s, dry_run, steps_s).run()
    name = lease.take(store.backend, "gc")
    try:
        mine = name.removeprefix("leases/")
        if min(candidates.holders(store.backend, "gc") | {mine}) != mine:
            raise BusyError(f"store {quote(store.root)} is being collected already")
        report = _Pass(store, grace_s, dry_run, steps_s).run()
        for _, leftover in list(leftovers.find(store.backend, mine)):
            _remove(store, leftover)
        return report
    finally:
        store.backend.remove(name)


class _Pass:
    def __init__(self, store: Store, grace_s: float, dry_run: bool, steps_s: float) -> None:
        self.store = store
        self.steps_s = steps_s
        self.grace_s = grace_s
        self.dry_run = dry_run
        self.report = Report()
        self.known = candidates.read(store.backend)
        self._layers: dict[bytes, tuple[Index, set[Key]]] = {}

    def run(self) -> Report:
        live = self._mark()
        self.report.images, self.report.objects = live.images, len(live.objects)
        sizes = {one.name: one.size for one in self.store.backend.list("meta")}
        dead = {f"meta/{name}": size for name, size in sizes.items() if _is_meta(name) and f"meta/{name}" not in live.names}
        dead |= self._dead_profiles(live)
        dead |= self._dead_packs(live)
        now = time.time()
        listed = {name: self.known.get(name) or Candidate(name, now, None) for name in dead}
        if not self.dry_run:
            self._renew_locators(live, dead)
            self._list(listed)
        alive = candidates.holders(self.store.backend, "writer")
        ripe = self._still_dead([name for name, one in listed.items() if self._is_ripe(one, now, alive)], live)
        for name in ripe:
            self.report.deleted += 1
            self.report.deleted_bytes += dead[name]
        self.report.waiting = len(dead) - len(ripe)
        self.report.waiting_bytes = sum(dead.values()) - self.report.deleted_bytes
        if not self.dry_run:
            self._delete(ripe)
            for name in steps.kept(self.store, self.steps_s)[1]:
                self.store.backend.remove(name)
        return self.report

    def _still_dead(self, ripe: list[str], before: _Live) -> list[str]:
        """Mark again, now that the list can be seen: a writer may have begun and ended between the first mark and the list."""
        if not ripe:
            return []
        live = self._mark()
        is_same = live.objects <= before.objects
        kept = live.names | {name for name in ripe if name.startswith("profiles/") and name.split("/")[1] in live.profiled}
        return [name for name in ripe if name not in kept and (is_same or not name.startswith("packs/"))]

    def _mark(self) -> _Live:
        """From refs, and from the leases of mounts."""
        live = _Live()
        roots = {digest for ref in self.store.refs() if (digest := self.store.get_ref(ref)) is not None}
        for _, record in candidates.live_leases(self.store.backend):
            text = str(record.get("image") or "")
            if re.fullmatch("(?:[0-9a-f]{2})+", text) and self.store.has_meta(bytes.fromhex(text), "image"):
                roots.add(bytes.fromhex(text))  # else a bare index is mounted, of which the store knows nothing
        for digest in roots:
            try:
                found = image.get(self.store, digest)
            except CafsError as error:
                raise CorruptError(f"cannot collect: {error}", hint="cafs-store fsck; nothing was deleted") from error
            live.images += 1
            live.names.add(self.store.meta_name(digest, "image"))
            live.profiled.update(self.store.name_of(one).hex() for one in (digest, *found.layers))
            live.names |= {self.store.meta_name(one, image.METADATA) for one in found.metadata if one}
            for layer in found.layers:
                self._mark_layer(live, layer)
        for step in steps.kept(self.store, self.steps_s)[0]:
            try:
                self._mark_layer(live, step.layer)
            except CafsError:
                continue  # it is gone: the step will be made again
            if step.metadata:
                live.names.add(self.store.meta_name(step.metadata, image.METADATA))
        return live

    def _mark_layer(self, live: _Live, layer: bytes) -> None:
        if layer not in live.indexes:
            live.indexes[layer], objects = self._read(layer)
            live.objects |= objects
        live.names |= {self.store.meta_name(layer, "index"), self.store.meta_name(layer, "loc")}

    def _read(self, layer: bytes) -> tuple[Index, set[Key]]:
        """An index and what it needs, read once a pass."""
        if layer not in self._layers:
            index = image.load_layer(self.store, layer)
            self._layers[layer] = index, {(self.store.name_of(digest), kind) for digest, kind in wanted(self.store, index)}
        return self._layers[layer]

    def _dead_profiles(self, live: _Live) -> dict[str, int]:
        """Names and sizes of profiles whose images are dead."""
        try:
            listed = self.store.backend.list("profiles")
        except FileNotFoundError:
            return {}
        return {f"profiles/{one.name}": one.size for one in listed if one.name.partition("/")[0] not in live.profiled}

    def _dead_packs(self, live: _Live) -> dict[str, int]:
        """Names and sizes of packs that nothing needs, once those that are mostly dead have been copied."""
        sizes = self.store.pack_sizes()
        claimed: set[Key] = set()
        dead, mostly = {}, {}
        for name, rows, frames in self._by_use(sizes, live):
            mine = {row[:2]: row for row in rows if row[:2] not in claimed}
            if not mine:
                dead[f"packs/{name}"] = sizes[name]
            elif sum(row[3] for row in mine.values()) < _MOSTLY * frames:
                mostly[name] = sorted(mine.values(), key=lambda row: row[2])
            claimed |= mine.keys()
        dead |= {f"packs/{name}": sizes[name] for name in mostly}
        self.report.repacked = len(mostly)
        if mostly and not self.dry_run:
            for name in self._repack(mostly, live, dead):
                dead.pop(f"packs/{name}", None)
        return dead

    def _by_use(self, sizes: dict[str, int], live: _Live) -> list[tuple[str, list[Row], int]]:
        """Packs, their live rows, and bytes of all their frames; the most used first: there a copy of an object is kept."""
        found = []
        for name, size in sizes.items():
            try:
                every = list(self.store.read_footer(name).rows())
            except (CafsError, OSError):
                continue  # fsck's business
            rows = [row for row in every if row[:2] in live.objects]
            share = sum(row[3] for row in rows) / size
            found.append((f"packs/{name}" in self.known, -share, name, rows, sum(row[3] for row in every)))
        return [(name, rows, frames) for _, _, name, rows, frames in sorted(found)]

    def _repack(self, mostly: dict[str, list[Row]], live: _Live, dead: dict[str, int]) -> list[str]:
        """Put what is alive in these packs into new ones; returns their names.

        dead: all packs that will go: a copy in one of them is none.
        """
        with Writer(self.store, for_collection=True) as writer:
            self.store.hide(name.removeprefix("packs/") for name in dead)
            for name, rows in mostly.items():
                places = [row[2:4] for row in rows]
                for row, frame in zip(rows, read_frames(self.store, f"packs/{name}", places), strict=True):
                    writer.put(self.store.check_record(frame, row[0], row[1]), row[1], frame)
            writer.flush()
        return writer.made

    def _renew_locators(self, live: _Live, dead: dict[str, int]) -> None:
        """Make those anew that point into packs that will go."""
        self.store.hide(name.removeprefix("packs/") for name in dead)
        for layer, index in live.indexes.items():
            found = self.store.get_locator(layer)
            if found is None or any(f"packs/{name}" in dead for name in found.packs):
                self.store.put_locator(layer, locator.encode(self.store, index))
        self.store.show()

    def _list(self, listed: dict[str, Candidate]) -> None:
        """Write the list first, then look who may have looked things up before it could be seen."""
        candidates.write(self.store.backend, listed)
        new = [one for one in listed.values() if one.waits_for is None]
        if new:
            alive = frozenset(candidates.holders(self.store.backend, "writer"))
            for one in new:
                one.waits_for = alive
            candidates.write(self.store.backend, listed)

    def _is_ripe(self, one: Candidate, now: float, alive: set[str]) -> bool:
        if now - one.time_s < self.grace_s:
            return False
        return not alive if one.waits_for is None else not (one.waits_for & alive)

    def _delete(self, names: list[str]) -> None:
        """Manifests, then what they name, then packs, which leave packs/list first."""
        backend = self.store.backend
        metas = sorted((name for name in names if not name.startswith("packs/")), key=lambda name: not name.endswith(".image"))
        packs = [name for name in names if name.startswith("packs/")]
        for name in metas:
            _remove(self.store, name)
        if packs:
            kept = {name: size for name, size in self.store.pack_sizes().items() if f"packs/{name}" not in set(packs)}
            backend.replace(PACK_LIST, encode_pack_list(kept))
            for name in packs:
                _remove(self.store, name)
        left = {name: one for name, one in candidates.read(backend).items() if name not in set(names)}
        candidates.write(backend, left)
        if packs:
            self.store.write_pack_list()


def _remove(store: Store, name: str) -> None:
    try:
        store.backend.remove(name)
    except FileNotFoundError:
        pass


def _is_meta(name: str) -> bool:
    return name.endswith((".index", ".image", ".loc", f".{image.METADATA}")) and not name.rpartition("/")[2].startswith("tmp.")
