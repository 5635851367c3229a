"""What COPY and ADD take: files of a tree, heredocs, archives to unpack, what is behind a URL or in a git repository."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urlsplit

from builder import copying, fetch
from builder import flags as flagging
from builder.context import Context
from builder.patterns import Ignore, PatternError, os_bytes
from builder.words import expand
from cafs import format as fmt
from cafs.decompress import decompressed
from cafs.digest import CHUNK_LIST, PLAIN
from cafs.errors import CafsError, FormatError, NotFound, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from builder.config import State
    from builder.copying import How, Match
    from builder.draft import Draft
    from builder.lexer import Heredoc
    from builder.request import Step
    from builder.work import Work
    from cafs.format import Entry
    from cafs.lookup import Node
    from cafs.store import Store
    from cafs.vtree import VirtualTree


@dataclass(slots=True)
class Source:
    """top: the root of a tree; matches: what of it.  archive: reads what is in a file, which is wanted instead of it."""

    top: Node
    matches: list[Match]
    archive: Callable[[], VirtualTree] | None = None


@dataclass(slots=True)
class Gathered:
    """All sources of one instruction."""

    sources: list[Source] = field(default_factory=list)

    def fingerprint(self, how: How) -> list[str]:
        """What is to be copied, without times: names, attributes, content."""
        found = []
        for source in self.sources:
            for match in source.matches:
                node = copying.follow(source.top, match.node)
                digest = hashlib.sha256()
                for row in _rows(node, how) if node else ():
                    digest.update(row)
                name = match.name if how.parents or (node and not node.is_directory) else b""
                shown = f"{match.pivot} {name.decode('utf-8', 'surrogateescape')}"
                found.append(f"{shown} {digest.hexdigest()} {source.archive is not None}")
        return found

    def put(self, draft: Draft, place: str, *, is_directory: bool, how: How) -> None:
        """Copy all into a draft.  Raises CafsError."""
        is_directory = is_directory or sum(len(source.matches) for source in self.sources) > 1
        for source in self.sources:
            if source.archive is not None:
                _put_archive(draft, source.archive(), os_bytes(place), how)
            else:
                copying.copy(draft, source.matches, source.top, place, is_directory=is_directory, how=how)


def _rows(node: Node, how: How) -> Iterator[bytes]:
    below = node.below() if node.is_directory else iter(())
    for one in (node, *below):
        entry = one.entry
        if how.owner:
            entry = replace(entry, uid=0, gid=0)
        is_top = one is node and node.is_directory
        yield replace(entry, mtime_ns=0, path=b"/" + one.path[len(node.path) :], mode=0 if is_top else entry.mode).encode()


def _put_archive(draft: Draft, tree: VirtualTree, place: bytes, how: How) -> None:
    """Unpack: directories that are there keep what is in them, unless something else takes their place."""
    top = draft.make_directory(place, 0o755, how.owner or (0, 0)).rstrip(b"/")
    where: dict[bytes, bytes] = {b"": top}
    files: dict[bytes, Entry] = {}
    unpacking = object()
    for entry in tree.entries():
        if entry.path == b"/":
            continue
        above, _, name = entry.path.rpartition(b"/")
        path = where[above] + b"/" + name
        if entry.type == fmt.DIRECTORY:
            try:
                there = draft.resolve(path)
            except CafsError:
                there = path  # links in a circle are no directory: they are replaced
            found = draft.get(there)
            path = there if found is not None and found.type == fmt.DIRECTORY else path
            where[entry.path] = path
            draft.put(how.apply(replace(entry, path=path)), replaces=True)
            continue
        first = entry.target if entry.type == fmt.HARDLINK else entry.path
        content = files.setdefault(first, entry)
        draft.put(how.apply(replace(content, path=path)), (unpacking, first), replaces=True)


def gather(work: Work, state: State, step: Step, words: list[str], documents: list[Heredoc], origin: str | None) -> Gathered:
    """Find them all.  Raises CafsError, ValueError."""
    found, is_add = Gathered(), step.one.keyword == "add"
    checksum = flagging.one(step.flags, "checksum")
    for word in words:
        if fetch.GIT.fullmatch(word) or fetch.URL.fullmatch(word):
            if not is_add:
                raise ValueError(f"{quote(word)}: only ADD takes what is not in a tree")
            if fetch.GIT.fullmatch(word):
                found.sources.append(_git(work, word, keeps=flagging.is_on(step.flags, "keep-git-dir"), checksum=checksum))
            else:
                found.sources += _url(work, step, word, checksum)
            continue
        if checksum is not None:
            raise ValueError("--checksum is for URLs and git repositories")
        found.sources += _local(work, step, word, origin, is_add=is_add)
    if documents:
        found.sources.append(_documents(work, state, documents))
    return found


def _local(work: Work, step: Step, word: str, origin: str | None, *, is_add: bool) -> list[Source]:
    parents = flagging.is_on(step.flags, "parents")
    top = work.places.find(origin, step.stage.number, (copying.prefix_of(word),))
    if top is None:
        raise NotFound(f"no {quote(word)} to copy: {quote(origin or '')} has no files")
    try:
        matches = copying.find(top, word, parents=parents)
        lost = [match.name for match in matches if copying.follow(top, match.node) is None]
        if lost and work.places.is_context(origin, step.stage.number):  # links out of what was read of it so far
            top = work.places.find(origin, step.stage.number, (copying.prefix_of(word), *lost)) or top
            matches = copying.find(top, word, parents=parents)
    except PatternError as error:
        raise ValueError(str(error)) from None
    except NotFound as error:
        error.hint = work.places.why_not(origin, step.stage.number, word, top)
        raise
    nodes = [node for match in matches if (node := copying.follow(top, match.node))]
    work.places.note_read(origin, copying.searched(top, word))
    for node in nodes:
        work.places.note_read(origin, (one.path for one in (node, *(node.below() if node.is_directory else ()))))
    if not is_add or flagging.one(step.flags, "unpack") == "false":
        return [Source(top, matches)] if matches else []
    return [_unpacked(work, Source(top, [match])) for match in matches]


def _unpacked(work: Work, source: Source, *, must: bool = False) -> Source:
    """With what is in the archive that a source is, if it is one: by its content, whatever its name.  Raises CafsError."""
    from cafs.tar import Reader
    from cafs.tarindex import MemberReader, tar_tree

    node = copying.follow(source.top, source.matches[0].node)
    if node is None or node.entry.type not in (fmt.FILE, fmt.CHUNKED) or not node.entry.size:
        return source
    work.writer.flush()
    try:
        next(iter(Reader(decompressed(_open(work.store, node)))))
    except (CafsError, StopIteration, OSError):
        if must:
            raise FormatError(f"{quote(node.path)} is not an archive") from None
        return source
    reader = MemberReader(work.header, work.writer, os.cpu_count() or 1)
    return replace(source, archive=lambda: tar_tree(reader, _open(work.store, node)))


class _Content(io.RawIOBase):
    """The verified content of a file of a store, in order."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        while not self._ready:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._ready = memoryview(part)
        size = min(len(view), len(self._ready))
        view[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _open(store: Store, node: Node) -> BinaryIO:
    return io.BufferedReader(_Content(_parts(store, node)), 1 << 20)


def _parts(store: Store, node: Node) -> Iterator[bytes]:
    from cafs import chunks

    if node.entry.type == fmt.FILE:
        yield store.read_object(node.entry.digest, PLAIN)
        return
    listed = chunks.decode(store.read_object(node.entry.digest, CHUNK_LIST), store.hash_name, store.chunk_size)
    for number in range(listed.chunks()):
        digest = listed.digest_at(number)
        yield store.read_object(digest, PLAIN) if digest else bytes(listed.length_at(number))


def _tree_of(work: Work, directory: str) -> Node:
    return Context(directory, Ignore([]), work.writer).tree((b"",))


def _documents(work: Work, state: State, documents: list[Heredoc]) -> Source:
    with tempfile.TemporaryDirectory(prefix="cafs-heredoc-") as directory:
        for one in documents:
            if "/" in one.name or one.name in (".", ".."):
                raise ValueError(f"'{one.name}' is not a name for a file")
            text = one.content if one.is_raw else expand(one.content, state.variables(), "\\", keeps_quotes=True)
            path = os.path.join(directory, one.name)
            with open(path, "wb") as file:
                file.write(os_bytes(text))
            os.chmod(path, 0o644)
            os.utime(path, ns=(work.now_ns(), work.now_ns()))
        top = _tree_of(work, directory)
        return Source(top, [found for one in documents for found in copying.find(top, one.name.replace("\\", "\\\\"))])


def _url(work: Work, step: Step, url: str, checksum: str | None) -> list[Source]:
    """A file of mode 600 with the server's time."""
    from email.utils import parsedate_to_datetime

    name = os.path.basename(unquote(urlsplit(url).path)) or "index"
    with tempfile.TemporaryDirectory(prefix="cafs-url-") as directory:
        path = os.path.join(directory, name)
        digest, changed = fetch.download(url, path)
        if checksum is not None and checksum != f"sha256:{digest}":
            raise CafsError(f"{quote(url)} has the checksum sha256:{digest}, not {checksum}")
        os.chmod(path, 0o600)
        try:
            time_s = parsedate_to_datetime(changed).timestamp() if changed else 0
        except ValueError:
            time_s = 0  # as docker has it
        os.utime(path, (time_s, time_s))
        top = _tree_of(work, directory)
        source = Source(top, copying.find(top, re.sub(r"([*?\[\\])", r"\\\1", name)))
        if flagging.is_on(step.flags, "unpack"):
            return [_unpacked(work, source, must=True)]
        return [source]


def _git(work: Work, url: str, *, keeps: bool, checksum: str | None) -> Source:
    with tempfile.TemporaryDirectory(prefix="cafs-git-") as directory:
        commit, inner = fetch.clone(url, directory, keeps=keeps)
        if checksum is not None and not (len(checksum) >= 7 and commit.startswith(checksum)):
            raise CafsError(f"{quote(url)} is at commit {commit}, not {checksum}")
        tree = _tree_of(work, directory)
        return Source(tree, copying.find(tree, inner or "."))
