"""What `cafs-index diff` and `verify` print."""

from __future__ import annotations

import os
import sys

from cli._app import json_path, say, write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cafs.compare import Difference


def verify_content(image: str, root: str, program: str) -> int:
    """Read everything; a line on stderr for each file that is missing or damaged.  Returns the exit code."""
    from cafs.content import pieces
    from cafs.errors import CafsError
    from cafs.image import check_hash, load_index
    from cafs.store import Store

    index, _, found = load_index(image, root)
    opened = found or Store(root)
    check_hash(index, image, opened)
    bad = 0
    for number, kind in enumerate(index.type):
        if kind in b"fF":
            try:
                for _ in pieces(index, number, opened).data():
                    pass
            except CafsError as error:
                bad += 1
                say(program, str(error))
    return 5 if bad else 0


def print_all(found: Iterator[Difference], names: tuple[str, str], name_only: bool, as_json: bool) -> int:
    """Print differences; returns the exit code."""
    from cafs import escape, listing

    count = 0
    for count, one in enumerate(found, 1):
        if as_json:
            sides = {side: listing.as_json(entry) for side, entry in (("old", one.old), ("new", one.new)) if entry is not None}
            write_json({"change": one.letter, "fields": one.fields} | sides | json_path(one.path))
            continue
        if name_only:
            sys.stdout.buffer.write(one.letter.encode() + b"\t" + escape.escape(one.path) + b"\n")
            continue
        if count == 1:
            sys.stdout.buffer.write(b"--- %s\n+++ %s\n" % tuple(map(os.fsencode, names)))
        for sign, entry in ((b"-", one.old), (b"+", one.new)):
            if entry is not None:
                sys.stdout.buffer.write(sign + entry.encode())
    return 3 if count else 0
