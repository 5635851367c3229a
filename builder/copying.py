"""COPY, and ADD of files: from a tree, by patterns, into the draft of a layer.  No content is read: entries are copied.

Sources: BuildKit's Dockerfile reference, COPY; github.com/tonistiigi/fsutil copy.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, replace

from builder.patterns import Ignore, glob, has_wildcard, os_bytes, os_text
from cafs import format as fmt
from cafs.errors import CafsError, NotFound, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from builder.draft import Draft
    from cafs.format import Entry
    from cafs.lookup import Node

_LINKS_MAX = 255


@dataclass(frozen=True, slots=True)
class How:
    """owner: of all that is copied, None for its own.  chmod: turns (mode, is a directory) into a mode.

    parents: --parents.  exclude: --exclude.  follows: whether links on the way to the destination are.
    """

    owner: tuple[int, int] | None = None
    chmod: Callable[[int, bool], int] | None = None
    parents: bool = False
    exclude: Ignore | None = None
    follows: bool = True

    def apply(self, entry: Entry) -> Entry:
        """An entry as it is to be."""
        if self.owner:
            entry = replace(entry, uid=self.owner[0], gid=self.owner[1])
        if self.chmod and entry.type != fmt.SYMLINK:
            entry = replace(entry, mode=self.chmod(entry.mode, entry.type == fmt.DIRECTORY))
        return entry


@dataclass(frozen=True, slots=True)
class Match:
    """node: what was found.  name: where, relative to the top; what --parents keeps of it comes after `pivot`."""

    node: Node
    name: bytes
    pivot: int = 0


def prefix_of(source: str) -> bytes:
    """The part of a source up to its first wildcard: nothing else of the tree is needed."""
    clean = posixpath.normpath("/" + source.replace("/./", "/")).lstrip("/")
    parts: list[str] = []
    for part in clean.split("/"):
        if has_wildcard(part):
            break
        parts.append(part)
    return os_bytes("/".join(parts).replace("\\", ""))


def find(top: Node, source: str, *, parents: bool = False) -> list[Match]:
    """What a source means in a tree, sorted; [] only if it has wildcards.  Raises NotFound, CafsError, PatternError."""
    pivot = 0
    before, dot, _ = source.partition("/./")
    if parents and dot:
        pivot = len(posixpath.normpath("/" + before).lstrip("/"))
    clean = posixpath.normpath("/" + source).lstrip("/")
    if clean in ("", "."):
        return [Match(top, b"")]
    found = [Match(top, b"")]
    for part in clean.split("/"):
        found = [one for match in found for one in _step(top, match, part)]
    if not found and not has_wildcard(clean):
        raise NotFound(f"no {quote(source)} to copy")
    return [replace(one, pivot=pivot) for one in sorted(found, key=lambda one: fmt.order_key(b"/" + one.name))]


def searched(top: Node, source: str) -> set[bytes]:
    """The directories in which files may come or go that a source with wildcards means.  Raises CafsError, PatternError."""
    paths: set[bytes] = set()
    found, is_wild = [Match(top, b"")], False
    for part in posixpath.normpath("/" + source).lstrip("/").split("/"):
        is_wild = is_wild or has_wildcard(part)
        nodes = [follow(top, match.node) for match in found] if is_wild else []
        paths |= {node.path for node in nodes if node and node.is_directory}
        found = [one for match in found for one in _step(top, match, part)]
    return paths


def _step(top: Node, match: Match, part: str) -> Iterator[Match]:
    node = follow(top, match.node)
    if node is None or not node.is_directory:
        return
    if part == "**":
        yield replace(match, node=node)
        for inner in node.below():
            if inner.is_directory:
                yield Match(inner, _join(match.name, inner.path[len(node.path.rstrip(b"/")) + 1 :]))
        return
    if not has_wildcard(part):
        name = os_bytes(re.sub(r"\\(.)", r"\1", part))
        if child := node.child(name):
            yield Match(child, _join(match.name, name))
        return
    wanted = glob(part)
    for name in node.children():
        if wanted.fullmatch(os_text(name)) and (child := node.child(name)):
            yield Match(child, _join(match.name, name))


def _join(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name


def follow(top: Node, node: Node) -> Node | None:
    """What a node is in the end, if it is a link; the tree's own root is never left.  Raises CafsError."""
    for _ in range(_LINKS_MAX):
        if node.entry.type != fmt.SYMLINK:
            return node
        target = node.entry.target
        base = b"/" if target.startswith(b"/") else (node.path.rpartition(b"/")[0] or b"/")
        found = walk(top, base + b"/" + target)
        if found is None:
            return None
        node = found
    raise CafsError(f"{quote(node.path)}: too many links")


def walk(top: Node, path: bytes) -> Node | None:
    """What has a path; links on the way to it are followed.  Raises CafsError."""
    node = top
    for part in posixpath.normpath(b"/" + path).split(b"/"):
        if not part:
            continue
        inner = follow(top, node)
        child = inner.child(part) if inner and inner.is_directory else None
        if child is None:
            return None
        node = child
    return node


def copy(draft: Draft, matches: list[Match], top: Node, target: str, *, is_directory: bool, how: How) -> None:
    """Copy what was found.  target: absolute; is_directory: it was spelled as one.  Raises CafsError."""
    where = os_bytes(posixpath.normpath(target))
    if len(matches) > 1 or how.parents:
        is_directory = True
    for match in matches:
        node = follow(top, match.node)
        if node is None:
            raise NotFound(f"{quote(match.node.path)} is a link to what is not there")
        if how.parents:
            _with_parents(draft, top, match, node, where, how)
        elif node.is_directory:
            _tree(draft, node, _directory(draft, where, how), how)
        else:
            name = match.name.rpartition(b"/")[2]
            if how.exclude and how.exclude.matches(name):
                continue
            _file(draft, node, where, name, is_directory=is_directory, how=how)


def _directory(draft: Draft, path: bytes, how: How) -> bytes:
    """Make the destination, if it is missing, as --chown and --chmod have it."""
    mode = how.chmod(0o755, True) if how.chmod else 0o755
    return draft.make_directory(path, mode, how.owner or (0, 0), follows=how.follows)


def _file(draft: Draft, node: Node, where: bytes, name: bytes, *, is_directory: bool, how: How) -> None:
    there = draft.get(draft.resolve(where)) if how.follows else draft.get(where)
    is_inside = is_directory or (there is not None and there.type == fmt.DIRECTORY)
    if is_inside:
        where = _directory(draft, where, how) + b"/" + name
    else:
        above, _, name = where.rpartition(b"/")
        where = _directory(draft, above or b"/", how).rstrip(b"/") + b"/" + name
    where = b"/" + where.lstrip(b"/")
    # A link that was named is followed; one that is in a directory which was named is replaced, as BuildKit has it.
    if how.follows and not is_inside and (there := draft.get(where)) is not None and there.type == fmt.SYMLINK:
        where = draft.resolve(where)
        _directory(draft, where.rpartition(b"/")[0] or b"/", how)
    draft.put(how.apply(replace(node.entry, path=where)))


def _with_parents(draft: Draft, top: Node, match: Match, node: Node, where: bytes, how: How) -> None:
    """--parents: the directories above a source come along, from the pivot on."""
    kept = match.name[match.pivot :].lstrip(b"/") if match.pivot else match.name
    above, _, name = kept.rpartition(b"/")
    place = _directory(draft, where, how)
    source = match.name[: len(match.name) - len(kept)].rstrip(b"/")
    for part in above.split(b"/") if above else []:
        source = _join(source, part)
        found = walk(top, source)
        found = follow(top, found) if found else None
        place = _one_directory(draft, place.rstrip(b"/") + b"/" + part, found.entry if found else None, how)
    if node.is_directory:
        inner = _one_directory(draft, place.rstrip(b"/") + b"/" + name, node.entry, how) if name else place
        _tree(draft, node, inner, how)
    elif not (how.exclude and how.exclude.matches(name)):
        draft.put(how.apply(replace(node.entry, path=place.rstrip(b"/") + b"/" + name)))


def _one_directory(draft: Draft, path: bytes, like: Entry | None, how: How) -> bytes:
    """Where a directory is, which is made like another if it is not there."""
    there = draft.resolve(path) if how.follows else path
    if draft.get(there) is None and like is not None:
        above = _directory(draft, there.rpartition(b"/")[0] or b"/", how)
        there = above.rstrip(b"/") + b"/" + there.rpartition(b"/")[2]
        draft.put(how.apply(replace(like, path=there)))
        return there
    return _directory(draft, path, how)


def _tree(draft: Draft, top: Node, where: bytes, how: How) -> None:
    """The content of a directory; what are names of one file stay that."""
    copying, skipped = object(), b""
    places = {b"": where.rstrip(b"/")}
    for node in top.below():
        relative = node.path[len(top.path.rstrip(b"/")) + 1 :]
        if skipped and relative.startswith(skipped):
            continue
        if how.exclude and how.exclude.matches(relative):
            skipped = relative + b"/" if node.is_directory and not how.exclude.may_hold_exceptions(relative) else b""
            if skipped or not node.is_directory:
                continue
        above, _, name = relative.rpartition(b"/")
        path = places[above] + b"/" + name
        if not node.is_directory:
            draft.put(how.apply(replace(node.entry, path=path)), (copying, node.key))
            continue
        there = draft.resolve(path) if how.follows else path
        found = draft.get(there)
        if there != path and found is not None and found.type == fmt.DIRECTORY:
            places[relative] = there  # a link of the image that leads to a directory stays, and what is below goes there
            continue
        places[relative] = path
        draft.put(how.apply(replace(node.entry, path=path)))
