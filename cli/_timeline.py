"""What `cafs-index profile --show` prints: how much was read when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cafs.digest import object_name
from cli._app import write_json

if TYPE_CHECKING:
    from cafs.record import Read

_ROWS = 20
_WIDTH = 50


def show_reads(reads: list[Read], as_json: bool) -> None:
    """A row a slice of time: its start, reads, bytes, a bar; or, as JSON, a line a read."""
    if as_json:
        for one in reads:
            name = object_name(one.digest, one.kind)
            write_json({"at_us": one.at_us, "object": name, "offset": one.offset, "length": one.length})
        return
    end = max((one.at_us for one in reads), default=0) + 1
    slices: list[list[Read]] = [[] for _ in range(_ROWS)]
    for one in reads:
        slices[one.at_us * _ROWS // end].append(one)
    most = max(sum(one.length for one in part) for part in slices) or 1
    for number, part in enumerate(slices):
        size = sum(one.length for one in part)
        bar = "#" * -(-size * _WIDTH // most)
        click.echo(f"{number * end / _ROWS / 1e6:8.3f} s\t{len(part)}\t{size}\t{bar}".rstrip())
