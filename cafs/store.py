"""A store in a directory: packs, meta, refs, leases.  cafs-store(5) is the authority.

Writers order: packs, then meta, then the ref.  Readers the reverse.  Nothing that is read here is trusted before its digest
or checksum has been compared.  Writing objects is writer.py's.
"""

from __future__ import annotations

import json
import os
import re
import time

from cafs import atomic, merged, mountinfo, pack
from cafs.digest import CHUNK_MAX, CHUNK_MIN, CHUNK_SIZE, DIGEST_SIZES, PLAIN, hash_function, object_name
from cafs.errors import CafsError, CorruptError, FormatError, NotFound, UsageError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.locator import Locator

FORMAT_FILE = "cafs-store.json"
_DIRECTORIES = ("packs", "meta", "refs", "leases", "tmp")
META_MAX = 1 << 30
"""Largest meta file in bytes, and largest index in it."""

IMAGE_MAX = 2 << 20
"""Largest manifest in bytes: parsed JSON takes many times its size in memory."""

RAW_META_MAX = 4096
"""A meta file up to this size is not compressed: what `crun run` reads then needs no zstd."""

_REF_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REF_NAME = re.compile(rf"{_REF_PART}(?::[0-9]+(?=/))?(?:/{_REF_PART})*")
_REF_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NFS_WAIT_S = 60
_NETWORK = ("nfs", "cifs", "smb", "ceph", "9p", "lustre", "glusterfs", "fuse.")
"""File systems on which a name that another machine made may be seen late."""


class Store:
    """An open store.  Attributes: root (path), hash_name, chunk_size."""

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            data = atomic.read_file(os.path.join(root, FORMAT_FILE), 1 << 16)
        except FileNotFoundError:
            raise NotFound(f"cannot open store {quote(root)}: not a store", hint=f"cafs-store init --store {root}") from None
        except OSError as error:
            raise os_error(f"cannot open store {quote(root)}", error) from error
        self.hash_name, self.chunk_size = _parse_format(data, root)
        self.hash = hash_function(self.hash_name)
        self._merged: merged.Merged | None = None
        self._sizes: dict[str, int] = {}
        self._footers: dict[str, pack.Records] = {}
        self._filter = pack.Filter()
        self._set_aside: set[str] = set()

    # --- packs ---------------------------------------------------------------------------------------------------

    def pack_path(self, name: str) -> str:
        """Path of a pack."""
        return os.path.join(self.root, "packs", name)

    def pack_names(self) -> list[str]:
        """Names of all packs, sorted."""
        return sorted(n for n in os.listdir(os.path.join(self.root, "packs")) if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{32}", n))

    def refresh(self) -> None:
        """Look which packs there are, and read the footers of those that no locator has.  A damaged pack holds nothing."""
        self._sizes = {name: size for name, size in self._pack_sizes() if name not in self._set_aside}
        known = merged.load(self.root, self.hash_name) if self._merged is None else self._merged
        for gone in set(self._footers) - set(self._sizes):
            del self._footers[gone]
        for name, size in self._sizes.items():
            if known.packs.get(name) != size and name not in self._footers:
                try:
                    self._footers[name] = self.read_footer(name)
                    self._filter.add(self._footers[name])
                except (CorruptError, OSError):
                    self._footers[name] = pack.Records(self.hash_name)
        whole = {name: records for name, records in self._footers.items() if len(records)}
        if merged.is_due(known, whole):
            known = merged.merge(self.root, known, whole, self._sizes)
            self._footers = {name: records for name, records in self._footers.items() if not len(records)}
        self._merged = known

    def _pack_sizes(self) -> Iterator[tuple[str, int]]:
        for name in self.pack_names():
            try:
                yield name, os.stat(self.pack_path(name)).st_size
            except FileNotFoundError:
                continue

    def add_pack(self, name: str, records: pack.Records) -> None:
        """A pack that this process has just made."""
        self._footers[name] = records
        self._filter.add(records)
        self._set_aside.discard(name)

    def is_set_aside(self, name: str) -> bool:
        """Whether `set_aside` was called, and no good pack of the name made since."""
        return name in self._set_aside

    def set_aside(self, name: str) -> None:
        """Look nothing up in this pack any more."""
        self._set_aside.add(name)
        self._sizes.pop(name, None)
        self._footers.pop(name, None)

    def read_footer(self, name: str) -> pack.Records:
        """Records of one pack.  Raises CorruptError, or OSError if it cannot be read."""
        fd = os.open(self.pack_path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.fstat(fd).st_size
            length = pack.footer_size(atomic.read_exactly(fd, pack.FOOTER.size, max(size - pack.FOOTER.size, 0)))
            if length > size:
                raise FormatError("pack is cut off")
            footer = atomic.read_exactly(fd, length, size - length)
        finally:
            os.close(fd)
        if self.hash(footer).hex() != name:
            raise CorruptError("pack footer is not what the pack's name says")
        records = pack.decode_footer(footer, size)
        if records.hash_name != self.hash_name:
            raise FormatError("pack of another hash")
        return records

    def locate(self, digest: bytes, kind: int = PLAIN) -> Iterator[tuple[str, int, int]]:
        """(pack, offset, frame size) of every copy of an object that was there at the last `refresh`."""
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

    def _read_copy(self, pack_name: str, offset: int, stored: int, digest: bytes, kind: int) -> bytes:
        fd = self._open_pack(pack_name)
        try:
            raw, found_kind = pack.decode_frame(atomic.read_exactly(fd, stored, offset))
        finally:
            os.close(fd)
        if found_kind != kind or self.hash(raw) != digest:
            raise CorruptError("content is not what its name says")
        return raw

    def _open_pack(self, name: str) -> int:
        """Open a pack; on NFS a name that another machine just made may not be seen yet, so look again for a while."""
        deadline = 0.0
        while True:
            try:
                return os.open(self.pack_path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                deadline = deadline or time.monotonic() + (
                    _NFS_WAIT_S if mountinfo.fstype(self.root).startswith(_NETWORK) else 0
                )
                if time.monotonic() >= deadline:
                    raise
                os.listdir(os.path.join(self.root, "packs"))
                time.sleep(0.5)

    # --- meta ----------------------------------------------------------------------------------------------------

    def meta_path(self, digest: bytes, kind: str) -> str:
        """Path of a meta file.  kind: 'index', 'image' or 'loc'."""
        name = digest.hex()
        return os.path.join(self.root, "meta", name[:2], f"{name[2:]}.{kind}")

    def put_meta(self, data: bytes, kind: str) -> bytes:
        """Store an index or a manifest durably and return its digest.  What is there already and good is left alone."""
        digest = self.hash(data)
        path = self.meta_path(digest, kind)
        atomic.make_directory(os.path.dirname(path))
        frame = data
        if len(data) > RAW_META_MAX:
            import zstandard

            frame = zstandard.ZstdCompressor(level=3).compress(data)
        if not atomic.create_file(path, frame) and not self._meta_is_good(digest, kind):
            atomic.replace_file(path, frame, 0o444)
        return digest

    def _meta_is_good(self, digest: bytes, kind: str) -> bool:
        try:
            self.get_meta(digest, kind)
        except (CafsError, OSError):
            return False
        return True

    def get_meta(self, digest: bytes, kind: str) -> bytes:
        """The verified bytes of an index or a manifest.  Raises NotFound, CorruptError."""
        path = self.meta_path(digest, kind)
        limit = IMAGE_MAX if kind == "image" else META_MAX
        try:
            data = atomic.read_file(path, limit)
        except FileNotFoundError:
            raise NotFound(f"store {quote(self.root)} has no {kind} {digest.hex()}", hint="cafs-store fsck") from None
        except OSError as error:
            raise os_error(f"cannot read {quote(path)}", error) from error
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            data = _decompress_meta(data, path, limit)
        if self.hash(data) != digest:
            raise CorruptError(f"{kind} {digest.hex()} is damaged", hint="cafs-store fsck")
        return data

    def put_locator(self, index: bytes, data: bytes) -> None:
        """Keep the locator of an index; what was there is replaced."""
        import zstandard

        path = self.meta_path(index, "loc")
        atomic.make_directory(os.path.dirname(path))
        atomic.replace_file(path, zstandard.ZstdCompressor(level=3).compress(data), 0o444)

    def get_locator(self, index: bytes) -> Locator | None:
        """The locator of an index; None if there is none that is sound."""
        from cafs import locator

        path = self.meta_path(index, "loc")
        try:
            return locator.decode(_decompress_meta(atomic.read_file(path, META_MAX), path), self.hash_name)
        except (OSError, CafsError):
            return None

    def write_pack_list(self) -> None:
        """Write packs/list, again if a pack appeared meanwhile."""
        names: list[str] = []
        for _ in range(3):
            if (found := self.pack_names()) == names:
                return
            names = found
            atomic.replace_file(self.pack_path("list"), "".join(f"{name}\n" for name in names).encode())

    def meta_names(self) -> Iterator[tuple[bytes, str]]:
        """(digest, kind) of every meta file, sorted."""
        top = os.path.join(self.root, "meta")
        for shard in sorted(os.listdir(top)):
            if not re.fullmatch("[0-9a-f]{2}", shard):
                continue
            for name in sorted(os.listdir(os.path.join(top, shard))):
                match = re.fullmatch(r"([0-9a-f]+)\.(index|image)", name)
                if match and len(shard + match[1]) == 2 * DIGEST_SIZES[self.hash_name]:
                    yield bytes.fromhex(shard + match[1]), match[2]

    # --- refs ----------------------------------------------------------------------------------------------------

    def ref_path(self, ref: str) -> str:
        """Path of a ref's file: refs/NAME/TAG, with '+' for the slashes of NAME."""
        name, tag = split_ref(ref)
        return os.path.join(self.root, "refs", name.replace("/", "+"), tag)

    def get_ref(self, ref: str) -> bytes | None:
        """Digest that a ref names, None if there is no such ref.  Raises FormatError."""
        path = self.ref_path(ref)
        try:
            data = atomic.read_file(path, 4096)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise os_error(f"cannot read ref {quote(ref)}", error) from error
        text = data.decode("latin-1").removesuffix("\n")
        if not re.fullmatch(r"[0-9a-f]{%d}" % (2 * DIGEST_SIZES[self.hash_name]), text):
            raise FormatError(f"ref {quote(ref)} is damaged", hint="cafs-store fsck")
        return bytes.fromhex(text)

    def set_ref(self, ref: str, digest: bytes) -> None:
        """Make a ref name an image, durably; the only thing in a store that is ever overwritten."""
        path = self.ref_path(ref)
        atomic.make_directory(os.path.dirname(path))
        atomic.replace_file(path, digest.hex().encode() + b"\n")

    def remove_ref(self, ref: str) -> None:
        """Remove a ref.  Raises NotFound."""
        path = self.ref_path(ref)
        try:
            os.unlink(path)
        except FileNotFoundError:
            raise NotFound(f"no ref {quote(ref)}") from None
        atomic.fsync_directory(os.path.dirname(path))

    def refs(self) -> list[str]:
        """All refs, sorted, as NAME:TAG.  What is no ref, as `strays` lists, does not count."""
        return sorted(ref for ref, path in self._ref_files() if ref)

    def strays(self) -> list[str]:
        """Paths below refs/ that are neither a ref nor a temporary file, such as NFS leaves of open files."""
        return sorted(path for ref, path in self._ref_files() if not ref)

    def _ref_files(self) -> Iterator[tuple[str, str]]:
        """(ref, path), the ref empty for what is none."""
        top = os.path.join(self.root, "refs")
        for name in os.listdir(top):
            if name.startswith("tmp."):
                continue
            if not os.path.isdir(os.path.join(top, name)):
                yield "", f"refs/{name}"
                continue
            for tag in os.listdir(os.path.join(top, name)):
                if not tag.startswith("tmp."):
                    ref = f"{name.replace('+', '/')}:{tag}"
                    yield ref if _is_ref(ref) else "", f"refs/{name}/{tag}"


def split_ref(ref: str) -> tuple[str, str]:
    """NAME[:TAG] -> (name, tag), 'latest' where no tag is given.  Raises UsageError on anything that is no ref."""
    head, slash, last = ref.rpartition("/")
    base, colon, tag = last.partition(":")
    name = head + slash + base
    if not colon:
        tag = "latest"
    if not _REF_NAME.fullmatch(name) or len(name) > 255 or not _REF_TAG.fullmatch(tag):
        raise UsageError(f"{quote(ref)} is not a ref", hint="a ref is NAME[:TAG], in lower case, like debian:12")
    return name, tag


def _is_ref(text: str) -> bool:
    try:
        split_ref(text)
    except UsageError:
        return False
    return True


def init(root: str, hash_name: str = "sha256", chunk_size: int = CHUNK_SIZE) -> Store:
    """Make a store, or open it if it is there with the same hash.  Safe against a crash and a second maker."""
    hash_function(hash_name)
    try:
        for directory in _DIRECTORIES:
            atomic.make_directory(os.path.join(root, directory))
        text = json.dumps({"chunk_size": chunk_size, "format": 1, "hash": hash_name}, sort_keys=True) + "\n"
        atomic.create_file(os.path.join(root, FORMAT_FILE), text.encode())
    except OSError as error:
        raise os_error(f"cannot make store {quote(root)}", error) from error
    store = Store(root)
    if (store.hash_name, store.chunk_size) != (hash_name, chunk_size):
        raise UsageError(f"store {quote(root)} exists with hash {store.hash_name}", hint="nothing mixes: use another directory")
    return store


def open_or_init(root: str) -> Store:
    """The store at ROOT, made on first use if nothing is there, or only what an interrupted `init` left."""
    if os.path.lexists(os.path.join(root, FORMAT_FILE)):
        return Store(root)
    if os.path.isdir(root) and any(name not in _DIRECTORIES and not name.startswith("tmp.") for name in os.listdir(root)):
        return Store(root)  # something else lives there: this says so
    return init(root)


def is_chunk_size(size: object) -> bool:
    """Whether SIZE is one that an index may have: rule 4 of cafs-index(5)."""
    return type(size) is int and CHUNK_MIN <= size <= CHUNK_MAX and not size & (size - 1)


def _parse_format(data: bytes, root: str) -> tuple[str, int]:
    try:
        found = json.loads(data)
        version, hash_name, chunk_size = found.pop("format"), found.pop("hash"), found.pop("chunk_size")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FormatError(f"{quote(os.path.join(root, FORMAT_FILE))} is damaged") from None
    is_known = version == 1 and not found and isinstance(hash_name, str) and hash_name in DIGEST_SIZES
    if not is_known or not is_chunk_size(chunk_size):
        raise FormatError(f"store {quote(root)} has an unknown format", hint="a newer release of these tools may read it")
    return hash_name, chunk_size


def _decompress_meta(data: bytes, path: str, limit: int = META_MAX) -> bytes:
    import zstandard

    try:
        if not 0 <= zstandard.frame_content_size(data) <= limit:
            raise CorruptError(f"{quote(path)} does not declare its size, or is too large")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{quote(path)} is damaged: {error}", hint="cafs-store fsck") from error
