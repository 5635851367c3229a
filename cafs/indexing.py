"""What `cafs-index create` does: a source and options to an index file or an image in a store."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import translate

from cafs import atomic, image, linux, locator, sources
from cafs.create import Indexer
from cafs.difference import difference
from cafs.digest import DIGEST_SIZES
from cafs.errors import CorruptError, FormatError, NotFound, UsageError, os_error, quote
from cafs.format import Header
from cafs.index import load
from cafs.refs import pinned_ref, split_ref
from cafs.sources import ImageSource
from cafs.statcache import StatCache
from cafs.store import open_or_init
from cafs.tarindex import MemberReader, TreeIndexer, tar_tree
from cafs.walk import Walk
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from cafs.image import Image
    from cafs.index import Index
    from cafs.store import Store


FOLD_AT = 100
"""An image over one of so many layers has a single one again: each costs a mount and a look-up."""


class Exclusion:
    """Shell patterns for what is left out, as tar's --exclude: '*' matches '/' too, and one without a slash in front, any name.

    unused: those that have not matched yet.
    """

    def __init__(self, globs: tuple[str, ...] = ()) -> None:
        self._patterns = {glob: re.compile(translate(_from_the_root(glob))) for glob in globs}
        self.unused = set(globs)

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __call__(self, path: bytes) -> bool:
        """Whether to leave out a path and all below it."""
        text = path.decode("utf-8", "surrogateescape")
        found = [glob for glob, pattern in self._patterns.items() if len(path) > 1 and pattern.match(text)]
        self.unused.difference_update(found)
        return bool(found)


def _from_the_root(glob: str) -> str:
    """A pattern for whole paths."""
    text = os.fsencode(glob).decode("utf-8", "surrogateescape").rstrip("/")
    if text.startswith("./"):
        return text[1:]
    return text if text.startswith("/") else f"*/{text}"


@dataclass(slots=True)
class Options:
    """How to index."""

    source: str
    jobs: int = 1
    platform: str | None = None
    exclude: Exclusion = field(default_factory=Exclusion)
    one_file_system: bool = False
    rehash: bool = False
    skip_unreadable: bool = False
    progress: Callable[[int, int], None] | None = None


@dataclass(slots=True)
class Report:
    """What was done.  digest: of the image, hex; empty if only an index file was written.  unmatched: patterns to exclude."""

    digest: str = ""
    entries: int = 0
    bytes_seen: int = 0
    files_read: int = 0
    objects: int = 0
    stored_bytes: int = 0
    packs: int = 0
    xattrs_left_out: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Everything, for --json; what was left out as [path, reason]."""
        return {name: getattr(self, name) for name in self.__slots__}

    def summary(self) -> str:
        """One line for -v."""
        return (
            f"{self.entries} entries, {self.bytes_seen} bytes, {self.files_read} files read; "
            f"{self.objects} new objects in {self.packs} packs, {self.stored_bytes} bytes stored; "
            f"{self.xattrs_left_out} xattrs left out"
        )


def create_image(options: Options, store_root: str, tag: str | None, base: str | None = None) -> Report:
    """Index into a store; the ref, if any, is set last.  Raises CafsError; then no ref has changed.

    base: an image whose layers stay, with what differs from it as one more.
    """
    if tag is not None:
        split_ref(tag)
    store = open_or_init(store_root)
    below = image.resolve(store, base) if base else None
    cache = StatCache(options.source, store.hash_name, DIGEST_SIZES[store.hash_name])
    if not options.rehash:
        cache.load()
    with _source(options) as source, Writer(store) as writer:
        indexer = _indexer(options, source, Header(store.hash_name, store.chunk_size), writer, cache)
        data = _run(indexer, options.source)
        writer.flush()
        try:
            config = source.config if isinstance(source, ImageSource) else below.config if below else {}
            index = load(io.BytesIO(data))
            is_over = below is not None and len(below.layers) < FOLD_AT
            made = _put_over(store, below, index, config) if below and is_over else put_layer(store, data, index, config)
            is_itself = not (options.exclude or options.platform or base)
            if isinstance(source, ImageSource) and source.pin and is_itself:
                store.set_ref(pinned_ref(source.pin), made.digest)
            if tag is not None:
                store.set_ref(tag, made.digest)
        except OSError as error:
            raise os_error(f"cannot write to store {quote(store.root)}", error) from error
    if isinstance(indexer, Indexer):
        cache.save()
    report = _report(indexer, data, options)
    report.digest = made.digest.hex()
    report.objects, report.stored_bytes, report.packs = writer.objects, writer.stored_bytes, writer.packs
    return report


def _run(indexer: Indexer | TreeIndexer, source: str) -> bytes:
    try:
        return indexer.run()
    except CorruptError as error:
        if isinstance(indexer, TreeIndexer):
            raise FormatError(f"cannot index {quote(source)}: {error}", hint=error.hint) from error
        raise


def _put_over(store: Store, below: Image, index: Index, config: dict[str, object]) -> Image:
    """The image of a tree as one layer more than another image has; none if the trees are alike."""
    claim_layers(store, below)
    data = difference(image.load_tree(store, below), index)
    layer = load(io.BytesIO(data))
    if not len(layer):
        return image.put_layers(store, below.layers, config, below.metadata)
    return put_layer(store, data, layer, config, below)


def claim_layers(store: Store, below: Image) -> None:
    """Rely on the layers of an image, so that nobody collects them meanwhile."""
    for name, metadata in zip(below.layers, below.metadata, strict=True):
        store.claim(store.meta_name(name, "index"))
        if metadata:
            store.claim(store.meta_name(metadata, image.METADATA))


def put_layer(store: Store, data: bytes, index: Index, config: dict[str, object], below: Image | None = None) -> Image:
    """An image of an index, alone or over another; its locator is made unless there is one whose packs are all there."""
    ensure_locator(store, index)
    return image.put(store, data, index, config, below)


def ensure_locator(store: Store, index: Index) -> None:
    """Make the locator of an index whose objects are there, unless there is one whose packs are."""
    found = store.get_locator(index.identity)
    if found is None or not set(found.packs) <= set(store.pack_sizes()):
        store.put_locator(index.identity, locator.encode(store, index))


def create_file(options: Options, output: str, hash_name: str) -> Report:
    """Index into a file, which appears whole or not at all; '-' is stdout.  Needs no store."""
    with _source(options) as source:
        indexer = _indexer(options, source, Header(hash_name), None, None)
        data = _run(indexer, options.source)
    with atomic.output(output) as out:
        out.write(data)
    return _report(indexer, data, options)


def index_directory(path: str, header: Header, threads: int) -> Index:
    """The index of a directory as it is now; nothing is stored.  Raises CafsError."""
    linux.raise_descriptor_limit()
    return load(io.BytesIO(Indexer(Walk(path), header, None, threads).run()))


def merge_image(store_root: str, data: bytes, base: str, tag: str | None) -> str:
    """Make an image of a merged index, with the config of BASE if that is an image; returns its digest, hex."""
    store = open_or_init(store_root)
    index = load(io.BytesIO(data))
    image.check_hash(index, base, store)
    try:
        config = image.resolve(store, base).config
    except (NotFound, UsageError):
        config = {}  # a bare index
    with Writer(store) as writer:
        writer.flush()
        made = put_layer(store, data, index, config)
        if tag is not None:
            store.set_ref(tag, made.digest)
    return made.digest.hex()


@contextmanager
def _source(options: Options) -> Iterator[ImageSource | BinaryIO | None]:
    """An image of others, the stream of a tar, or None for a directory."""
    found = sources.parse(options.source, options.platform)
    if options.platform and not found:
        raise UsageError("a platform is chosen of an image, not of a directory or a tar")
    if found or options.source == "-":
        yield found or (sys.stdin.buffer.raw if isinstance(sys.stdin.buffer, io.BufferedReader) else sys.stdin.buffer)
        return
    try:
        is_directory = os.path.isdir(options.source)
        stream = None if is_directory else open(options.source, "rb", buffering=0)
    except OSError as error:
        raise os_error(f"cannot index {quote(options.source)}", error) from error
    try:
        yield stream
    finally:
        if stream:
            stream.close()


def _indexer(
    options: Options, source: ImageSource | BinaryIO | None, header: Header, writer: Writer | None, cache: StatCache | None
) -> Indexer | TreeIndexer:
    exclude = options.exclude or None
    linux.raise_descriptor_limit()  # a walk holds one a level, and one a directory of the files that wait to be read
    if source:
        if options.one_file_system or options.rehash or options.skip_unreadable:
            raise UsageError("other mounts, what is remembered and what cannot be read are of directories alone")
        reader = MemberReader(header, writer, options.jobs, options.progress)
        build = source.build if isinstance(source, ImageSource) else lambda reader: tar_tree(reader, source)
        return TreeIndexer(reader, build, exclude)
    walk = Walk(
        options.source,
        exclude=exclude,
        one_file_system=options.one_file_system,
        skip_unreadable=options.skip_unreadable,
    )
    return Indexer(walk, header, writer, options.jobs, cache, options.progress)


def _report(indexer: Indexer | TreeIndexer, data: bytes, options: Options) -> Report:
    return Report(
        entries=data.count(b"\n") - 2,
        bytes_seen=indexer.bytes_seen,
        files_read=indexer.files_read,
        xattrs_left_out=indexer.left_out,
        skipped=[(quote(path), reason) for path, reason in indexer.skipped],
        unmatched=sorted(options.exclude.unused),
    )
