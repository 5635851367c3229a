"""How much images hold and share: their objects, and in large files their chunks.  Sizes in bytes, uncompressed."""

from __future__ import annotations

from dataclasses import dataclass

from cafs import chunks, image
from cafs import format as fmt
from cafs.digest import CHUNK_LIST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cafs.index import Index
    from cafs.store import Store


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one image among several.

    files, bytes: regular files (names) and their sizes.  objects, unique: what is stored of them, each content once.
    adds: what no image before it in the list has.  alone: what no other image in the list has.
    """

    name: str
    files: int
    bytes: int
    objects: int
    unique: int
    adds: int
    alone: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """images in the order asked for; shared[i][j]: bytes of content that both have; total: of all, each content once."""

    images: tuple[Usage, ...]
    shared: tuple[tuple[int, ...], ...]
    total: int


def sharing(store: Store, names: Sequence[str]) -> Sharing:
    """Compare images of one store.  Raises CafsError."""
    counted = [_content(store, image.load_tree(store, image.resolve(store, name))) for name in names]
    before: dict[bytes, int] = {}
    found = []
    for number, (name, (files, size, content)) in enumerate(zip(names, counted, strict=True)):
        others = [other for at, (_, _, other) in enumerate(counted) if at != number]
        usage = Usage(
            name=name,
            files=files,
            bytes=size,
            objects=len(content),
            unique=sum(content.values()),
            adds=sum(length for digest, length in content.items() if digest not in before),
            alone=sum(length for digest, length in content.items() if not any(digest in other for other in others)),
        )
        found.append(usage)
        before |= content
    matrix = tuple(tuple(_common(a, b) for _, _, b in counted) for _, _, a in counted)
    return Sharing(tuple(found), matrix, sum(before.values()))


def _common(a: dict[bytes, int], b: dict[bytes, int]) -> int:
    return sum(length for digest, length in a.items() if digest in b)


def _content(store: Store, index: Index) -> tuple[int, int, dict[bytes, int]]:
    """(files, bytes, {digest: bytes}) of a tree."""
    files = size = 0
    content: dict[bytes, int] = {}
    for entry, kind in enumerate(index.type):
        if kind not in b"fFh":
            continue
        files += 1
        size += index.size[entry]
        if kind == fmt.FILE[0] and index.size[entry]:
            content[index.object(entry)] = index.size[entry]
        elif kind == fmt.CHUNKED[0]:
            data = store.read_object(index.object(entry), CHUNK_LIST)
            listed, at = chunks.decode(data, store.hash_name, store.chunk_size), 0
            for count, digest in listed.runs:
                if digest:
                    content[digest] = listed.length_at(at)
                at += count
    return files, size, content
