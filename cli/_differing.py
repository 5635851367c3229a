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
    from cafs.bulk import read_index
    from cafs.errors import CORRUPT, CafsError, CorruptError, NotFound, quote
    from cafs.image import check_hash, load_index
    from cafs.locator import contents
    from cafs.store import Store

    index, _, found = load_index(image, root)
    opened = found or Store(root)
    check_hash(index, image, opened)
    bad = {key: problem for key, problem in read_index(opened, index) if isinstance(problem, CafsError)}
    named = set(contents(index)) & bad.keys()
    for number in range(len(index)):
        kind = index.kind(number)
        key = (index.object(number), int(kind == b"F"))
        if kind in (b"f", b"F") and key in named:
            say(program, f"{quote(index.path(number))}: {bad[key]}")
    for key in sorted(bad.keys() - named):
        say(program, f"a chunk: {bad[key]}")
    others = [problem.exit_code for problem in bad.values() if not isinstance(problem, (CorruptError, NotFound))]
    return others[0] if others else CORRUPT if bad else 0


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
