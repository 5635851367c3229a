"""The packs of a store: where objects are, and reading them.  cafs-store(5), PACKS.

Nothing that is read here is trusted before its digest or checksum has been compared.
"""

from __future__ import annotations

import json
import os
import re

from cafs import pack, scope
from cafs.backend import Backend, CannotList
from cafs.digest import CHUNK_MAX, CHUNK_MIN, DIGEST_SIZES, PLAIN, hash_function, object_name
from cafs.errors import CafsError, CorruptError, FormatError, NotFound, UsageError, os_error, quote
from cafs.opening import open_backend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from cafs.backend import Listed
    from cafs.merged import Merged
    from cafs.scope import Scope

FORMAT_FILE = "cafs-store.json"
PACK_LIST = "packs/list"
_FOOTER_MAX = 1 << 30
_FOOTER_GUESS = 1 << 18
_LIST_MAX = 1 << 28
_AT_ONCE = 8
_PACK_NAME = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}")


class Packs:
    """An open store, as far as its packs go: root (path or URL), backend, hash_name, chunk_size, scope_id ('': none)."""

    def __init__(self, root: str, known: tuple[str, int] | None = None) -> None:
        """known: hash and chunk size, if the store is not to be asked now."""
        self.backend, self.scope = open_place(root)
        self.root = root if self.scope else self.backend.url
        self.hash_name, self.chunk_size = known or self.read_format()
        self.scope_id = self.scope.id if self.scope else ""
        self.hash = hash_function(self.hash_name)
        self._merged: Merged | None = None
        self._sizes: dict[str, int] = {}
        self._footers: dict[str, pack.Records] = {}
        self._filter = pack.Filter()
        self._set_aside: set[str] = set()
        self._hidden: set[str] = set()
        self.is_checked = False
        """Whether meta files are read from the store itself also where the cache has them."""
        self.claim: Callable[[str], None] = lambda name: None
        """Called before a meta file is made or relied upon; a writer puts its own here."""

    def read_format(self) -> tuple[str, int]:
        """Hash and chunk size, as the store says now.  Raises NotFound if there is none, CafsError."""
        try:
            data = self.backend.read(FORMAT_FILE, 1 << 16)
        except FileNotFoundError:
            hint = f"cafs-store init --store {self.root}" if self.backend.is_local else None
            raise NotFound(f"cannot open store {quote(self.root)}: not a store", hint=hint) from None
        except OSError as error:
            raise os_error(f"cannot open store {quote(self.root)}", error) from error
        hash_name, chunk_size, scope_id = _parse_format(data, self.root)
        if scope_id != (self.scope.id if self.scope else ""):
            raise UsageError(f"store {quote(self.root)} is a scope, or of another one", hint="--scope SECRETFILE")
        return hash_name, chunk_size

    def name_of(self, digest: bytes) -> bytes:
        """What stands for a digest in the names and records of this store: itself, if there is no scope."""
        return self.scope.name(digest) if self.scope else digest

    def pack_sizes(self) -> dict[str, int]:
        """Name and size of every pack, by name: from the directory, or from packs/list where there is no listing."""
        try:
            found = [(one.name, one.size) for one in self._list("packs")]
        except CannotList:
            found = parse_pack_list(self.read_pack_list())
        return dict(sorted((name, size) for name, size in found if _PACK_NAME.fullmatch(name)))

    def _list(self, directory: str) -> list[Listed]:
        try:
            return self.backend.list(directory)
        except OSError as error:
            raise os_error(f"cannot list store {quote(self.root)}", error) from error

    def refresh(self) -> None:
        """Look which packs there are, and read the footers of those that no locator has.  A damaged pack holds nothing."""
        from cafs import merged

        gone = self._set_aside | self._hidden
        self._sizes = {name: size for name, size in self.pack_sizes().items() if name not in gone}
        known = merged.load(self.backend.identity, self.hash_name) if self._merged is None else self._merged
        for name in set(self._footers) - set(self._sizes):
            del self._footers[name]
        wanted = [n for n, size in self._sizes.items() if known.packs.get(n) != size and n not in self._footers]
        for name, records in self._read_footers(wanted):
            self._footers[name] = records
            self._filter.add(records)
        whole = {name: records for name, records in self._footers.items() if len(records)}
        if merged.is_due(known, whole):
            known = merged.merge(self.backend.identity, known, whole, self._sizes)
            self._footers = {name: records for name, records in self._footers.items() if not len(records)}
        self._merged = known

    def _read_footers(self, names: list[str]) -> Iterable[tuple[str, pack.Records]]:
        def one(name: str) -> tuple[str, pack.Records]:
            try:
                return name, self.read_footer(name)
            except (CorruptError, OSError):
                return name, pack.Records(self.hash_name)

        if self.backend.is_local or len(names) < 2:
            return map(one, names)
        from cafs.ordered import ordered_map

        return ordered_map(one, names, _AT_ONCE, window=2 * _AT_ONCE)

    def add_pack(self, name: str, records: pack.Records) -> None:
        """A pack that this process has just made."""
        self._footers[name] = records
        self._filter.add(records)
        self._set_aside.discard(name)
        self._hidden.discard(name)

    def is_set_aside(self, name: str) -> bool:
        """Whether `set_aside` was called, and no good pack of the name made since."""
        return name in self._set_aside

    def set_aside(self, name: str) -> None:
        """Look nothing up in this pack any more."""
        self._set_aside.add(name)
        self._sizes.pop(name, None)
        self._footers.pop(name, None)

    def hide(self, names: Iterable[str]) -> None:
        """Find nothing in these packs until `show`; they can be read from all the same."""
        self._hidden.update(names)
        for name in self._hidden:
            self._sizes.pop(name, None)
            self._footers.pop(name, None)

    def show(self) -> None:
        """The end of `hide`, from the next `refresh` on."""
        self._hidden.clear()

    def read_footer(self, name: str) -> pack.Records:
        """Records of one pack.  Raises CorruptError, or OSError or RemoteError if it cannot be read."""
        footer, size = self._read_footer(f"packs/{name}", 0 if self.backend.is_local else self._sizes.get(name, 0))
        if self.hash(footer).hex() != name:
            raise CorruptError("pack footer is not what the pack's name says")
        return self._decode_footer(footer, size)

    def read_footer_of(self, path: str) -> pack.Records:
        """Records of a file in the form of a pack, whose name says nothing of it.  Raises as `read_footer`."""
        return self._decode_footer(*self._read_footer(path, 0))

    def _read_footer(self, path: str, known: int) -> tuple[bytes, int]:
        """The bytes of a footer, and the size of the whole file."""
        tail, size = self._read_tail(path, known)
        length = pack.footer_size(tail[-pack.FOOTER.size :])
        if length > min(size, _FOOTER_MAX):
            raise FormatError("pack is cut off")
        return tail[-length:] if length <= len(tail) else self.backend.read_range(path, size - length, length), size

    def _decode_footer(self, footer: bytes, size: int) -> pack.Records:
        records = pack.decode_footer(footer, size)
        if records.hash_name != self.hash_name:
            raise FormatError("pack of another hash")
        return records

    def _read_tail(self, path: str, size: int) -> tuple[bytes, int]:
        """The end of a pack and its size, which may be known, if not surely: not every web server can count from the end."""
        if size:
            start = max(size - _FOOTER_GUESS, 0)
            tail = self.backend.read_range(path, start, size - start)
            if len(tail) == size - start and tail.endswith(pack.FOOTER_MAGIC):
                return tail, size
        return self.backend.read_tail(path, _FOOTER_GUESS)

    def locate(self, digest: bytes, kind: int = PLAIN) -> Iterator[tuple[str, int, int]]:
        """(pack, offset, frame size) of every copy of an object that was there at the last `refresh`."""
        digest = self.name_of(digest)
        if self._merged is not None:
            for found in self._merged.locate(digest, kind):
                if self._sizes.get(found[0]) == self._merged.packs[found[0]]:
                    yield found
        if not self._filter.may_have(digest):
            return
        for name, records in list(self._footers.items()):  # a writer on another thread may add one
            if place := records.find(digest, kind):
                yield name, *place

    def has(self, digest: bytes, kind: int = PLAIN) -> bool:
        """Whether the object was there at the last `refresh`, or was put by this process."""
        return next(self.locate(digest, kind), None) is not None

    def read_object(self, digest: bytes, kind: int = PLAIN, hint: tuple[str, int, int] | None = None) -> bytes:
        """The verified bytes of an object, from whichever copy is good.  hint: where it may be, from an index's locator.

        Raises NotFound if no pack lists it, CorruptError if every copy is bad, CafsError if a pack cannot be read.
        """
        data = self.read_view(digest, kind, hint)
        return data if isinstance(data, bytes) else bytes(data)

    def read_view(self, digest: bytes, kind: int = PLAIN, hint: tuple[str, int, int] | None = None) -> bytes | memoryview:
        """The same, not copied out of what was read for it."""
        name = object_name(digest, kind)
        if hint:
            try:
                return self._read_copy(*hint, digest, kind)
            except (CorruptError, OSError):
                pass  # the footers know better
        for again in (False, True):
            problem: CafsError | None = None
            if again or self._merged is None:
                self.refresh()
            for pack_name, offset, stored in self.locate(digest, kind):
                try:
                    return self._read_copy(pack_name, offset, stored, digest, kind)
                except CorruptError as error:
                    problem = CorruptError(f"object {name} in pack {pack_name}: {error}", hint="cafs-store fsck")
                except OSError as error:
                    problem = os_error(f"cannot read pack {quote(pack_name)}", error)
            if problem and again:
                raise problem
        raise NotFound(f"store {quote(self.root)} has no object {name}", hint="cafs-store fsck")

    def read_frame(self, digest: bytes, kind: int) -> bytes:
        """The frame of a good copy of an object, as of the last `refresh`.  Raises CorruptError if there is none."""
        for pack_name, offset, stored in self.locate(digest, kind):
            try:
                frame = self.backend.read_range(f"packs/{pack_name}", offset, stored)
                self.check_frame(frame, digest, kind)
                return frame
            except (CorruptError, OSError):
                continue
        name = object_name(digest, kind)
        raise CorruptError(f"store {quote(self.root)} has no good copy of object {name}", hint="cafs-store fsck")

    def _read_copy(self, pack_name: str, offset: int, stored: int, digest: bytes, kind: int) -> bytes | memoryview:
        return self.check_frame(self.backend.read_range(f"packs/{pack_name}", offset, stored), digest, kind)

    def check_frame(self, frame: bytes, digest: bytes, kind: int) -> bytes | memoryview:
        """The object in a frame.  Raises CorruptError unless it is the one of this digest."""
        raw, found_kind = pack.decode_frame(frame)
        if found_kind != kind or self.hash(raw) != digest:
            raise CorruptError("content is not what its name says")
        return raw

    def check_record(self, frame: bytes, name: bytes, kind: int) -> bytes:
        """The digest of the object in a frame.  Raises CorruptError unless it is the one that a pack's record names."""
        raw, found_kind = pack.decode_frame(frame)
        digest = self.hash(raw)
        if found_kind != kind or self.name_of(digest) != name:
            raise CorruptError("content is not what its name says")
        return digest

    def read_pack_list(self) -> bytes:
        """What packs/list holds, empty if it is not there.  Raises CafsError."""
        try:
            return self.backend.read(PACK_LIST, _LIST_MAX)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise os_error(f"cannot read {quote(PACK_LIST)} in store {quote(self.root)}", error) from error

    def write_pack_list(self) -> None:
        """Write packs/list, again if a pack appeared meanwhile."""
        written: dict[str, int] = {}

        def text(before: bytes | None) -> bytes:
            nonlocal written
            written = self.pack_sizes()
            return encode_pack_list(written)

        for _ in range(3):
            self.backend.swap(PACK_LIST, text)
            if self.pack_sizes() == written:
                return


def encode_pack_list(sizes: Mapping[str, int]) -> bytes:
    """What packs/list holds.  sizes: name -> bytes, by name."""
    return "".join(f"{name} {size}\n" for name, size in sizes.items()).encode()


def parse_pack_list(data: bytes) -> list[tuple[str, int]]:
    """(name, size) of each line of packs/list; a line that is none is passed over: it is a hint."""
    found = re.findall(r"^([0-9a-f]{32}|[0-9a-f]{64}) ([0-9]{1,15})$", data.decode("latin-1"), re.M)
    return [(name, int(size)) for name, size in found]


def open_place(root: str) -> tuple[Backend, Scope | None]:
    """The place that an address means, and its scope if it names one."""
    url, secret = scope.split(root)
    within = scope.read(secret) if secret else None
    return open_backend(within.address(url) if within else url), within


def is_chunk_size(size: object) -> bool:
    """Whether SIZE is one that an index may have: rule 4 of cafs-index(5)."""
    return type(size) is int and CHUNK_MIN <= size <= CHUNK_MAX and not size & (size - 1)


def _parse_format(data: bytes, root: str) -> tuple[str, int, str]:
    """Hash, chunk size, id of the scope or ''."""
    try:
        found = json.loads(data)
        version, hash_name, chunk_size = found.pop("format"), found.pop("hash"), found.pop("chunk_size")
        scope_id = str(found.pop("scope", ""))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FormatError(f"{quote(os.path.join(root, FORMAT_FILE))} is damaged") from None
    is_known = version == 1 and not found and isinstance(hash_name, str) and hash_name in DIGEST_SIZES
    if not is_known or not is_chunk_size(chunk_size):
        raise FormatError(f"store {quote(root)} has an unknown format", hint="a newer release of these tools may read it")
    return hash_name, chunk_size, scope_id
