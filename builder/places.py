"""Where files may come from: stages, images, named contexts; as trees, and as directories to mount.  And who owns them."""

from __future__ import annotations

import difflib
import os
import posixpath
from contextlib import contextmanager

from builder import copying
from builder.context import Context, open_context
from builder.patterns import os_bytes
from cafs import commit, image
from cafs.digest import PLAIN
from cafs.errors import CafsError, NotFound, UsageError, quote
from cafs.image import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from builder.config import State
    from builder.request import Request
    from builder.stages import Plan
    from cafs.lookup import MappedIndex, Node
    from cafs.writer import Writer

_TABLE_MAX = 1 << 20


class Places:
    """Of one build."""

    def __init__(self, writer: Writer, context: Context | None, request: Request, plan: Plan, states: dict[int, State]) -> None:
        """states: what each finished stage has come to, by number; it grows."""
        self._writer, self._store = writer, writer.store
        self._context, self._request, self._plan, self._states = context, request, plan, states
        self._trees: dict[tuple[bytes, ...], Node] = {}
        self._opened: dict[bytes, MappedIndex] = {}
        self._contexts: dict[str, Context] = {}
        self._read: set[str] = set()
        self.pulled_now: set[str] = set()
        """What was brought for this build, by whichever of its processes: one build has one version of it."""

    def tree(self, layers: tuple[bytes, ...]) -> Node:
        """The root of the tree that layers make."""
        if layers not in self._trees:
            self._writer.flush()
            self._trees[layers] = commit.open_below(self._store, layers, self._opened)
        return self._trees[layers]

    def base_image(self, name: str) -> Image:
        """What FROM means: a named context, an image of the store, or one of a registry.  Raises CafsError."""
        return self._image(self._request.contexts.get(name.lower(), name), name.lower())

    def _image(self, where: str, name: str) -> Image:
        store = self._store
        kind, colon, rest = where.partition(":")
        is_given = name in self._request.contexts  # a Dockerfile, which may be a stranger's, names no files of the host
        if where.startswith("docker-image://"):
            where = where.removeprefix("docker-image://")
        elif where.startswith("oci-layout://") and is_given:
            return self._imported("oci:" + where.removeprefix("oci-layout://"))
        elif colon and kind in ("oci", "oci-archive", "docker-archive", "docker-daemon") and rest and is_given:
            return self._imported(where)
        elif where.startswith("docker://"):
            return self._pulled(where)
        elif is_given and os.path.isdir(where):
            raise UsageError(f"context {quote(name)} is a directory, and FROM needs an image")
        if self._request.pulls:
            hint = f"FROM docker://{where}, or leave out --pull"
            raise UsageError(f"image {quote(where)} is of the store: there is nothing to pull it from", hint=hint)
        try:
            return image.resolve(store, where)
        except NotFound as error:
            near = difflib.get_close_matches(where.lower(), [stage.name for stage in self._plan.stages if stage.name], 1, 0.7)
            tag = "" if "@" in where else f" -t {where}"
            create = f"cafs-index create docker://{where}{tag}, or FROM docker://{where}"
            error.hint = f"did you mean stage {quote(near[0])}?" if near else create
            raise

    def _pulled(self, where: str) -> Image:
        from runner import pull

        is_new = self._request.pulls and where not in self.pulled_now
        self.pulled_now.add(where)
        return pull.get(self._store.root, where, "always" if is_new else "missing")

    def _imported(self, source: str) -> Image:
        from cafs.indexing import Options, create_image

        self._writer.flush()
        report = create_image(Options(source, os.cpu_count() or 1), self._store.root, None)
        self._store.refresh()
        return image.get(self._store, bytes.fromhex(report.digest))

    def find(self, origin: str | None, before: int, prefixes: tuple[bytes, ...]) -> Node | None:
        """The tree that COPY --from or a mount's from= means; of a context only what is near PREFIXES.  Raises CafsError."""
        context, layers = self._origin(origin, before)
        if context is not None:
            return context.tree(prefixes)
        return self.tree(layers) if layers else None

    def identity(self, origin: str | None, before: int, source: str) -> str:
        """What SOURCE in a place is, for a name: another where it is not the same.  Raises CafsError."""
        context, layers = self._origin(origin, before)
        if context is not None:
            layers = (self._store.hash(context.index((copying.prefix_of(source),))),)
        return ",".join([*(layer.hex() for layer in layers), source])

    def is_context(self, origin: str | None, before: int) -> bool:
        """Whether it is a directory of this machine."""
        return self._origin(origin, before)[0] is not None

    def _origin(self, origin: str | None, before: int) -> tuple[Context | None, tuple[bytes, ...]]:
        if origin is None:
            if self._context is None:
                raise UsageError("there is no build context", hint="cbuild DIRECTORY")
            return self._context, ()
        named = origin.lower()
        stage = None if named in self._request.contexts else self._plan.find(origin, before)
        if stage is not None:
            return None, self._states[stage.number].layers
        if origin.isascii() and origin.isdigit():
            raise NotFound(f"no stage {origin} before this one")
        where = self._request.contexts.get(named)
        if where is not None and os.path.isdir(where):
            if named not in self._contexts:
                self._contexts[named] = open_context(where, None, self._writer)
            return self._contexts[named], ()
        later = self._plan.find(origin, len(self._plan.stages))
        if later is not None and where is None:
            raise NotFound(f"stage {quote(origin)} comes later than this one")
        return None, self.base_image(origin).layers

    def why_not(self, origin: str | None, before: int, source: str, top: Node) -> str | None:
        """A hint about a source that is not there: it is left out of the context, or has another name."""
        context, _ = self._origin(origin, before)
        above, _, name = posixpath.normpath("/" + source).rpartition("/")
        if context is not None:
            if context.has(source):
                return ".dockerignore leaves it out"
            names = context.names(above)
        else:
            node = copying.walk(top, os_bytes(above))
            names = [os.fsdecode(one) for one in node.children()] if node and node.is_directory else []
        near = difflib.get_close_matches(name, names, 1, 0.6)
        return f"did you mean {quote(posixpath.join(above, near[0]).lstrip('/'))}?" if near else None

    def note_read(self, origin: str | None, paths: Iterable[bytes]) -> None:
        """Note what of the build context a step has used."""
        if origin is None and self._context is not None:
            self._read |= {os.path.join(self._context.root, os.fsdecode(path[1:])) for path in paths}

    def add_read(self, paths: set[str]) -> None:
        """The same, of a stage that was built elsewhere."""
        self._read |= paths

    def read_files(self) -> set[str]:
        """What of the build context was used."""
        return {os.path.normpath(path) for path in self._read}

    def save(self) -> None:
        """Remember what was hashed."""
        for context in [*self._contexts.values(), *([self._context] if self._context else [])]:
            context.save()

    @contextmanager
    def mounted(self, origin: str | None, before: int, source: str) -> Iterator[str]:
        """The path of a file or directory of a place, while its image is mounted.  Raises CafsError."""
        from runner import lower

        prefix = copying.prefix_of(source)
        context, layers = self._origin(origin, before)
        if context is not None:
            data = context.index((prefix,))
            self._writer.flush()
            layers = (commit.add_to(self._store, data)[0],)
        if not layers:
            raise NotFound(f"{quote(origin or '')} has no files")
        made = image.put_layers(self._store, layers, {})
        top = self.tree(layers)
        node = copying.walk(top, os_bytes(posixpath.normpath("/" + source)))
        node = copying.follow(top, node) if node else None
        if node is None:
            raise NotFound(f"no {quote(source)} to mount")
        key = lower.key_of(made.digest, self._store.root, "", None)
        low = lower.find(made.digest, self._store.root, key)
        try:
            yield os.path.join(low.path, os.fsdecode(node.path[1:])).rstrip("/")
        finally:
            low.let_go()
            lower.release(key)

    def owner(self, tree: Node | None, text: str) -> tuple[int, int]:
        """USER[:GROUP], by the image's own tables; a number is never looked up as a name.  Raises CafsError."""
        user, colon, group = text.partition(":")
        uid, gid = self._id(tree, user, b"/etc/passwd", "user") if user else (0, 0)
        if colon:
            gid = self._id(tree, group, b"/etc/group", "group")[0]
        return uid, gid

    def _id(self, tree: Node | None, name: str, path: bytes, what: str) -> tuple[int, int]:
        if name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < 0xFFFF_FFFF:
            return int(name), int(name)
        for row in self.table(tree, path):
            if row[0] == name and len(row) > 3 and row[2].isdigit():
                return int(row[2]), int(row[3]) if row[3].isdigit() else int(row[2])
        raise CafsError(f"no {what} {quote(name)} in {path.decode()} of the image")

    def table(self, tree: Node | None, path: bytes) -> list[list[str]]:
        """Lines of a file like /etc/passwd as fields; [] if there is none."""
        node = copying.walk(tree, path) if tree else None
        node = copying.follow(tree, node) if node and tree else None
        if node is None or node.entry.type != b"f" or not 0 < node.entry.size <= _TABLE_MAX:
            return []
        self._writer.flush()
        data = self._store.read_object(node.entry.digest, PLAIN)
        return [line.split(":") for line in data.decode("utf-8", "surrogateescape").split("\n")]
