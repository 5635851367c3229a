"""The build context: a directory of which only what the Dockerfile uses is read, as a tree like those of images."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import replace

from builder.patterns import Ignore, PatternError, read_ignore
from cafs import atomic, linux, lookup, paths
from cafs import format as fmt
from cafs.create import Indexer
from cafs.digest import DIGEST_SIZES
from cafs.errors import CafsError, NotFound, os_error, quote
from cafs.format import Header
from cafs.statcache import StatCache
from cafs.walk import Walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.format import Entry
    from cafs.lookup import Node
    from cafs.writer import Writer

_IGNORE_MAX = 1 << 20
_LINKS_MAX = 255


class Context:
    """A directory.  ignore: what is left out of it.  Trees are of root's files, as BuildKit has it."""

    def __init__(self, root: str, ignore: Ignore, writer: Writer) -> None:
        self.root = root
        self._ignore = ignore
        self._writer = writer
        store = writer.store
        self._header = Header(store.hash_name, store.chunk_size)
        self._cache = StatCache(root, store.hash_name, DIGEST_SIZES[store.hash_name])
        self._cache.load()
        self._indexes: dict[tuple[bytes, ...], bytes] = {}
        self._trees: dict[tuple[bytes, ...], Node] = {}

    def tree(self, prefixes: tuple[bytes, ...]) -> Node:
        """The root of a tree with what is at or below some paths ('' for all), whose objects are put.  Raises CafsError."""
        found = self._trees.get(prefixes)
        if found is None:
            with tempfile.NamedTemporaryFile(prefix="cafs-context-") as file:
                file.write(self.index(prefixes))
                file.flush()
                found = self._trees[prefixes] = lookup.root([lookup.MappedIndex(file.name)])
        return found

    def has(self, path: str) -> bool:
        """Whether the directory has a name, left out or not."""
        return os.path.lexists(os.path.join(self.root, path.lstrip("/")))

    def names(self, directory: str) -> list[str]:
        """What is in a directory of it and not left out."""
        found = [
            os.path.join(directory, name).lstrip("/") for name in paths.listed(os.path.join(self.root, directory.lstrip("/")))
        ]
        return [os.path.basename(one) for one in found if not self._ignore.matches(os.fsencode(one))]

    def for_writer(self, writer: Writer) -> Context:
        """The same directory, for another writer."""
        return Context(self.root, self._ignore, writer)

    def _with_links(self, prefixes: tuple[bytes, ...]) -> set[bytes]:
        """The paths, and where links on them lead in the context, which is never left."""
        found, todo = set[bytes](), [(b"", prefix.split(b"/")) for prefix in prefixes]
        while todo and len(found) < _LINKS_MAX:
            done, left = todo.pop()
            while left:
                name = left.pop(0)
                if name in (b"", b"."):
                    continue
                if name == b"..":
                    done = done.rpartition(b"/")[0]
                    continue
                path = done + b"/" + name if done else name
                try:
                    target = os.readlink(os.path.join(os.fsencode(self.root), path))
                except OSError:
                    done = path
                    continue
                if path not in found:
                    found.add(path)
                    todo.append((b"" if target.startswith(b"/") else done, [*target.split(b"/"), *left]))
                break
            else:
                found.add(done)
        return found or set(prefixes)

    def save(self) -> None:
        """Remember which file has which content."""
        self._cache.save()

    def index(self, prefixes: tuple[bytes, ...]) -> bytes:
        """The index of such a tree; what was read of it once is not read again."""
        if prefixes not in self._indexes:
            self._indexes[prefixes] = self._read(prefixes)
        return self._indexes[prefixes]

    def _read(self, prefixes: tuple[bytes, ...]) -> bytes:
        prefixes = prefixes if b"" in prefixes else tuple(self._with_links(prefixes))

        def is_out(path: bytes) -> bool:
            name = path[1:]
            if not any(_is_near(name, prefix) for prefix in prefixes):
                return True
            return bool(self._ignore) and self._ignore.matches(name) and not self._ignore.may_hold_exceptions(name)

        linux.raise_descriptor_limit()
        walk = Walk(self.root, exclude=is_out)
        indexer = Indexer(walk, self._header, self._writer, os.cpu_count() or 1, self._cache)
        rows = [entry for _, entry in indexer.entries()]
        rows = self._kept(rows) if self._ignore else rows
        lines = [self._header.encode(), *(replace(entry, uid=0, gid=0).encode() for entry in rows)]
        return b"".join([*lines, fmt.encode_trailer(len(rows))])

    def _kept(self, rows: list[Entry]) -> list[Entry]:
        """Without directories that were looked into for exceptions in vain, and names of files whose first is left out."""
        out = [bool(entry.path[1:]) and self._ignore.matches(entry.path[1:]) for entry in rows]
        kept: list[Entry] = []
        below = b""
        for entry, is_out in zip(reversed(rows), reversed(out), strict=True):
            if not is_out or below.startswith(entry.path + b"/"):
                kept.append(entry)
                below = entry.path
        return _relinked(list(reversed(kept)), {entry.path: entry for entry in rows})


def _relinked(kept: list[Entry], all_rows: dict[bytes, Entry]) -> list[Entry]:
    """With the content of a file at the first of its names that is left."""
    there = {entry.path for entry in kept}
    first: dict[bytes, bytes] = {}
    found: list[Entry] = []
    for entry in kept:
        if entry.type == fmt.HARDLINK and entry.target not in there:
            name = first.setdefault(entry.target, entry.path)
            is_first = name == entry.path
            entry = replace(all_rows[entry.target], path=name) if is_first else replace(entry, target=name)
        found.append(entry)
    return found


def _is_near(name: bytes, prefix: bytes) -> bool:
    """Whether a path leads to, is, or is below another."""
    return not prefix or name == prefix or name.startswith(prefix + b"/") or prefix.startswith(name + b"/")


def open_context(root: str, dockerfile: str | None, writer: Writer) -> Context:
    """A directory with its .dockerignore: that of the Dockerfile's own name, if there is one.  Raises CafsError."""
    if not os.path.isdir(root):
        raise NotFound(f"no directory {quote(root)} to build in")
    names = [f"{dockerfile}.dockerignore"] if dockerfile else []
    for path in [*names, *(os.path.join(root, name) for name in (".dockerignore", ".containerignore"))]:
        try:
            data = _read(root, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise os_error(f"cannot read {quote(path)}", error) from error
        try:
            return Context(root, read_ignore(data), writer)
        except PatternError as error:
            raise CafsError(f"{path}: {error}") from None
    return Context(root, Ignore([]), writer)


def _read(root: str, path: str) -> bytes:
    """A file; if it is in the context, a link does not lead out of that: it may be a stranger's."""
    inside = os.path.relpath(path, root)
    if inside.startswith("../"):
        return atomic.read_file(path, _IGNORE_MAX)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = linux.open_in_root(top, inside, os.O_RDONLY | os.O_NONBLOCK)
    finally:
        os.close(top)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(22, "not a regular file")
        return atomic.read_exactly(fd, _IGNORE_MAX, 0)
    finally:
        os.close(fd)
