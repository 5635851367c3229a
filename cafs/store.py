"""A store: packs, meta, refs, leases, wherever a backend keeps them.  cafs-store(5) is the authority.

Writers order: packs, then meta, then the ref.  Readers the reverse.  Nothing that is read here is trusted before its digest
or checksum has been compared.  Reading objects is packs.py's, writing them writer.py's.
"""

from __future__ import annotations

import json
import os
import re

from cafs import atomic, paths
from cafs.digest import CHUNK_SIZE, DIGEST_SIZES, hash_function
from cafs.errors import CafsError, CorruptError, FormatError, NotFound, UsageError, os_error, quote
from cafs.packs import FORMAT_FILE, Packs, open_place
from cafs.refs import is_ref, literal_name, ref_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.locator import Locator

META_MAX = 1 << 30
"""Largest meta file in bytes, and largest index in it."""

IMAGE_MAX = 2 << 20
"""Largest manifest in bytes: parsed JSON takes many times its size in memory."""

RAW_META_MAX = 4096
"""A meta file up to this size is not compressed: what `crun run` reads then needs no zstd."""


class Store(Packs):
    """An open store."""

    def meta_name(self, digest: bytes, kind: str) -> str:
        """Name of a meta file.  kind: 'index', 'image', 'erofs1' or 'loc'."""
        text = self.name_of(digest).hex()
        return f"meta/{text[:2]}/{text[2:]}.{kind}"

    def has_meta(self, digest: bytes, kind: str) -> bool:
        """Whether there is a meta file of this name; it may be damaged."""
        return self.backend.exists(self.meta_name(digest, kind))

    def put_meta(self, data: bytes, kind: str) -> bytes:
        """Store a meta file durably and return its digest.  What is there already and good is left alone."""
        if len(data) > META_MAX:
            raise CafsError(f"the {kind} is too large: {len(data)} bytes")
        digest = self.hash(data)
        name = self.meta_name(digest, kind)
        self.claim(name)
        frame = data
        if len(data) > RAW_META_MAX:
            import zstandard

            frame = zstandard.ZstdCompressor(level=3).compress(data)
        if not self.backend.create(name, frame) and not self._meta_is_good(digest, kind):
            self.backend.replace(name, frame)
        return digest

    def _meta_is_good(self, digest: bytes, kind: str) -> bool:
        try:
            self._fetch_meta(digest, kind)
        except (CafsError, OSError):
            return False
        return True

    def get_meta(self, digest: bytes, kind: str, *, is_kept: bool = True) -> bytes:
        """The verified bytes of an index, a metadata image or a manifest.  Raises NotFound, CorruptError.

        What is far away is kept in the cache, unless the caller does: it never changes.
        """
        if self.backend.is_local or self.is_checked or not is_kept:
            return self._fetch_meta(digest, kind)
        path = os.path.join(paths.cache(), "meta", f"{digest.hex()}.{kind}")
        try:
            data = atomic.read_file(path, META_MAX)
            if self.hash(data) == digest:
                return data
        except OSError:
            pass
        data = self._fetch_meta(digest, kind)
        try:
            paths.make_private(paths.cache(), os.path.dirname(path))
            atomic.replace_hint(path, data, 0o600)
        except OSError:
            pass
        return data

    def _fetch_meta(self, digest: bytes, kind: str) -> bytes:
        name = self.meta_name(digest, kind)
        limit = IMAGE_MAX if kind == "image" else META_MAX
        try:
            data = self._read_meta(name, limit)
        except FileNotFoundError:
            raise NotFound(f"store {quote(self.root)} has no {kind} {digest.hex()}", hint="cafs-store fsck") from None
        except OSError as error:
            raise os_error(f"cannot read {quote(name)} in store {quote(self.root)}", error) from error
        if self.hash(data) != digest:
            raise CorruptError(f"{kind} {digest.hex()} is damaged", hint="cafs-store fsck")
        return data

    def _read_meta(self, name: str, limit: int) -> bytes:
        data = self.backend.read(name, limit)
        return _decompress_meta(data, name, limit) if data.startswith(b"\x28\xb5\x2f\xfd") else data

    def put_locator(self, index: bytes, data: bytes) -> None:
        """Keep the locator of an index; what was there is replaced."""
        import zstandard

        self.claim(self.meta_name(index, "loc"))
        self.backend.replace(self.meta_name(index, "loc"), zstandard.ZstdCompressor(level=3).compress(data))

    def get_locator(self, index: bytes) -> Locator | None:
        """The locator of an index; None if there is none that is sound."""
        from cafs.locator import Locator

        name = self.meta_name(index, "loc")
        try:
            found = Locator(_decompress_meta(self.backend.read(name, META_MAX), name))
        except (OSError, CafsError):
            return None
        return found if (found.index, found.hash_name) == (index, self.hash_name) else None

    def meta_names(self) -> Iterator[tuple[bytes, str]]:
        """(digest, kind) of every index, metadata image and manifest, by name.  Raises CannotList.

        In a scope the names tell nothing, so the files are read; those that are damaged are left out.
        """
        for one in self._list("meta"):
            match = re.fullmatch(r"([0-9a-f]{2})/([0-9a-f]+)\.(index|image|erofs1)", one.name)
            if match and len(match[1] + match[2]) == 2 * DIGEST_SIZES[self.hash_name]:
                digest = bytes.fromhex(match[1] + match[2])
                if self.scope is None:
                    yield digest, match[3]
                elif found := self._digest_of(f"meta/{one.name}", digest):
                    yield found, match[3]

    def _digest_of(self, name: str, keyed: bytes) -> bytes | None:
        try:
            digest = self.hash(self._read_meta(name, META_MAX))
        except (CafsError, OSError):
            return None
        return digest if self.name_of(digest) == keyed else None

    def get_ref(self, ref: str) -> bytes | None:
        """Digest that a ref names, None if there is no such ref.  Raises FormatError."""
        data = b""
        for name in self._ref_names(ref):
            try:
                data = self.backend.read(name, 4096)
                break
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise os_error(f"cannot read ref {quote(ref)}", error) from error
        else:
            return None
        text = data.decode("latin-1").removesuffix("\n")
        if not re.fullmatch(r"[0-9a-f]{%d}" % (2 * DIGEST_SIZES[self.hash_name]), text):
            raise FormatError(f"ref {quote(ref)} is damaged", hint="cafs-store fsck")
        return bytes.fromhex(text)

    def set_ref(self, ref: str, digest: bytes) -> None:
        """Make a ref name an image, durably; the only thing in a store that is ever overwritten."""
        *literal, name = self._ref_names(ref)
        self.backend.swap(name, lambda before: digest.hex().encode() + b"\n")
        for old in literal:
            self._remove_file(old)

    def remove_ref(self, ref: str) -> None:
        """Remove a ref.  Raises NotFound."""
        if not any([self._remove_file(name) for name in self._ref_names(ref)]):
            raise NotFound(f"no ref {quote(ref)}")

    def _remove_file(self, name: str) -> bool:
        """Remove a file of the backend; return whether there was one."""
        try:
            self.backend.remove(name)
        except FileNotFoundError:
            return False
        return True

    @staticmethod
    def _ref_names(ref: str) -> list[str]:
        """The files in which a ref may be: as it is spelt, which `refs` may have listed, and under its short name."""
        return list(dict.fromkeys((literal_name(ref), ref_name(ref))))

    def refs(self) -> list[str]:
        """All refs, sorted, as NAME:TAG.  What is no ref, as `strays` lists, does not count.  Raises CannotList."""
        return sorted(ref for ref, _ in self._ref_files() if ref)

    def strays(self) -> list[str]:
        """Names below refs/ that are neither a ref nor a temporary file, such as NFS leaves of open files."""
        return sorted(name for ref, name in self._ref_files() if not ref)

    def _ref_files(self) -> Iterator[tuple[str, str]]:
        """(ref, name), the ref empty for what is none."""
        for one in self._list("refs"):
            *above, tag = one.name.split("/")
            if not tag.startswith("tmp."):
                ref = f"{above[0].replace('+', '/')}:{tag}" if len(above) == 1 else ""
                yield ref if ref and is_ref(ref) else "", f"refs/{one.name}"


def init(root: str, hash_name: str = "sha256", chunk_size: int = CHUNK_SIZE, group: str | None = None) -> Store:
    """Make a store, or open it if it is there with the same hash.  Safe against a crash and a second maker.

    group: whose members may read it, beside its owner.
    """
    hash_function(hash_name)
    place, within = open_place(root)
    found: dict[str, object] = {"chunk_size": chunk_size, "format": 1, "hash": hash_name}
    if within:
        found["scope"] = within.id
    try:
        place.prepare()
        place.create(FORMAT_FILE, (json.dumps(found, sort_keys=True) + "\n").encode())
        if group is not None:
            place.open_for(group)
    except OSError as error:
        raise os_error(f"cannot make store {quote(place.url)}", error) from error
    store = Store(root)
    if (store.hash_name, store.chunk_size) != (hash_name, chunk_size):
        raise UsageError(
            f"store {quote(place.url)} exists with hash {store.hash_name}", hint="nothing mixes: use another directory"
        )
    return store


def open_or_init(root: str, hash_name: str = "sha256", chunk_size: int = CHUNK_SIZE) -> Store:
    """The store at ROOT, made on first use if nothing is there, or only what an interrupted `init` left."""
    try:
        return Store(root)
    except NotFound:
        if not open_place(root)[0].is_free():
            raise  # something else lives there
        return init(root, hash_name, chunk_size)


def _decompress_meta(data: bytes, path: str, limit: int = META_MAX) -> bytes:
    import zstandard

    try:
        if not 0 <= zstandard.frame_content_size(data) <= limit:
            raise CorruptError(f"{quote(path)} does not declare its size, or is too large")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{quote(path)} is damaged: {error}", hint="cafs-store fsck") from error
