"""What cbuild does with an image that is built: outputs, and files that say what was done."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.progress import Progress
    from cafs.image import Image
    from cafs.store import Store


def texts(value: object) -> list[str]:
    """The values of an option that may be repeated."""
    return [str(one) for one in value] if isinstance(value, tuple) else []


def squashed(store: Store, made: Image) -> Image:
    import io

    from cafs import image
    from cafs.index import load
    from cafs.indexing import put_layer

    data = image.load_tree(store, made).encode()
    lines = [{**line, "empty_layer": True} for line in made.config.get("history") or []]
    config = {**made.config, "history": [*lines, {"created_by": "cbuild --squash"}]}
    return put_layer(store, data, load(io.BytesIO(data)), config)


def write(store: Store, made: Image, tags: tuple[str, ...], given: dict[str, object]) -> None:
    """Outputs, and the files that say what was built."""
    import json

    from builder.output import write

    store.refresh()
    destinations = texts(given["outputs"])
    destinations += [f"docker://{ref}" for ref in tags] if given["push"] else []
    for destination in destinations:
        write(store, made, destination, tags)
    if given["iidfile"]:
        _put(str(given["iidfile"]), made.digest.hex().encode())
    if given["metadata_file"]:
        found = {"cafs.digest": made.digest.hex(), "image.name": ",".join(tags), "layers": [one.hex() for one in made.layers]}
        _put(str(given["metadata_file"]), json.dumps(found, indent=2).encode() + b"\n")


def _put(path: str, data: bytes) -> None:
    """Write a file that was asked for, whole or not at all."""
    from cafs import atomic

    with atomic.output(path) as out:
        out.write(data)


def write_reports(progress: Progress, title: str, read: set[str], given: dict[str, object]) -> None:
    from builder import report

    if given["report"]:
        _put(str(given["report"]), report.page(progress.rows, f"Build of {title}"))
    if given["depfile"]:
        target = str(given["iidfile"] or given["depfile"])
        read = read - {os.path.normpath(one) for one in (target, str(given["depfile"]))}  # they may lie in the context
        _put(str(given["depfile"]), report.depfile(target, read))
        if target != "-":
            os.utime(target)  # what was just written may have changed the time of a directory that it depends on


def explain(progress: Progress) -> None:
    for row in progress.rows:
        what = f"cached, saved {row.seconds:.1f} s" if row.is_cached else f"made in {row.seconds:.1f} s"
        sys.stderr.write(f"#{row.number}\t{what}\t{row.title}\n")
