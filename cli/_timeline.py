"""What `cafs-index profile --show` prints or draws: how much was read when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cafs.digest import PLAIN, object_name
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


def write_svg(reads: list[Read], path: str) -> None:
    """Each read a mark: across is time, down how much was read before it.  Raises CafsError."""
    import os

    from cafs import atomic
    from cafs.errors import os_error, quote

    end = max((one.at_us for one in reads), default=0) + 1
    total = sum(one.length for one in reads) or 1
    left, top, width, height = 70, 30, 800, 400
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{top + height + 50}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{left}" y="18">{len(reads)} reads, {total / 1e6:.1f} MB, {end / 1e6:.3f} s</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
    ]
    for tick in range(6):
        across, down = left + width * tick // 5, top + height * tick // 5 + 4
        parts.append(f'<text x="{across}" y="{top + height + 16}" text-anchor="middle">{end / 1e6 * tick / 5:.2f} s</text>')
        parts.append(f'<text x="{left - 6}" y="{down}" text-anchor="end">{total / 1e6 * tick / 5:.1f} MB</text>')
    at = 0
    points = [f"{left},{top}"]
    for one in reads:
        x, y = left + width * one.at_us / end, top + height * at / total
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 if one.kind == PLAIN else 3}" fill="#2b6cb0" opacity="0.5"/>')
        at += one.length
        points.append(f"{x:.1f},{top + height * at / total:.1f}")
    parts += [f'<polyline points="{" ".join(points)}" fill="none" stroke="#c05621"/>', "</svg>\n"]
    try:
        atomic.replace_file(os.path.abspath(path), "\n".join(parts).encode())
    except OSError as error:
        raise os_error(f"cannot write {quote(path)}", error) from error
