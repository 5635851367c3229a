"""What `cafs-index create` does: a source and options to an index file or an image in a store."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from fnmatch import translate

from cafs import atomic, image
from cafs.create import Indexer
from cafs.digest import DIGEST_SIZES
from cafs.errors import os_error, quote
from cafs.format import Header
from cafs.statcache import StatCache
from cafs.store import open_or_init, split_ref
from cafs.walk import Walk
from cafs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class Options:
    """How to index.  exclude: shell patterns matched against whole paths ('*' also matches '/')."""

    source: str
    jobs: int = 1
    exclude: tuple[str, ...] = ()
    one_file_system: bool = False
    rehash: bool = False
    skip_unreadable: bool = False
    progress: Callable[[int, int], None] | None = None


@dataclass(slots=True)
class Report:
    """What was done.  digest: of the image, hex; empty if only an index file was written."""

    digest: str = ""
    entries: int = 0
    bytes_seen: int = 0
    files_read: int = 0
    objects: int = 0
    stored_bytes: int = 0
    packs: int = 0
    xattrs_left_out: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """One line for -v."""
        return (
            f"{self.entries} entries, {self.bytes_seen} bytes, {self.files_read} files read; "
            f"{self.objects} new objects in {self.packs} packs, {self.stored_bytes} bytes stored; "
            f"{self.xattrs_left_out} xattrs left out"
        )


def create_image(options: Options, store_root: str, tag: str | None) -> Report:
    """Index into a store; the ref, if any, is set last.  Raises CafsError; then no ref has changed."""
    if tag is not None:
        split_ref(tag)
    walk = _walk(options)
    store = open_or_init(store_root)
    cache = StatCache(options.source, store.hash_name, DIGEST_SIZES[store.hash_name])
    if not options.rehash:
        cache.load()
    with Writer(store) as writer:
        indexer = Indexer(walk, Header(store.hash_name, store.chunk_size), writer, options.jobs, cache, options.progress)
        data = indexer.run()
        writer.flush()
        try:
            made = image.put(store, data, {})
            if tag is not None:
                store.set_ref(tag, made.digest)
        except OSError as error:
            raise os_error(f"cannot write to store {quote(store.root)}", error) from error
    cache.save()
    report = _report(indexer, data)
    report.digest = made.digest.hex()
    report.objects, report.stored_bytes, report.packs = writer.objects, writer.stored_bytes, writer.packs
    return report


def create_file(options: Options, output: str, hash_name: str) -> Report:
    """Index into a file, which appears whole or not at all; '-' is stdout.  Needs no store."""
    indexer = Indexer(_walk(options), Header(hash_name), None, options.jobs, None, options.progress)
    data = indexer.run()
    if output == "-":
        sys.stdout.buffer.write(data)
    elif os.path.exists(output) and not os.path.isfile(output):
        with open(output, "wb") as stream:
            stream.write(data)
    else:
        try:
            umask = os.umask(0)
            os.umask(umask)
            atomic.replace_file(os.path.abspath(output), data, 0o666 & ~umask)
        except OSError as error:
            raise os_error(f"cannot write {quote(output)}", error) from error
    return _report(indexer, data)


def _walk(options: Options) -> Walk:
    patterns = [re.compile(os.fsencode(translate(pattern))) for pattern in options.exclude]
    return Walk(
        options.source,
        exclude=lambda path: any(pattern.match(path) for pattern in patterns),
        one_file_system=options.one_file_system,
        skip_unreadable=options.skip_unreadable,
    )


def _report(indexer: Indexer, data: bytes) -> Report:
    return Report(
        entries=data.count(b"\n") - 2,
        bytes_seen=indexer.bytes_seen,
        files_read=indexer.files_read,
        xattrs_left_out=indexer.walk.left_out,
        skipped=[(quote(path), reason) for path, reason in indexer.walk.skipped],
    )
