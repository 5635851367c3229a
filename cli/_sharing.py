"""The output of `cafs-index du`: a table, bars on a terminal, and a picture."""

from __future__ import annotations

import os
import sys

import click

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.usage import Sharing

_BAR = 30
_CELL, _LEFT, _TOP = 64, 180, 60


def write_table(found: Sharing) -> None:
    """A line an image: name, files, bytes, unique, adds, alone; with several, what each pair shares."""
    click.echo("image\tfiles\tbytes\tunique\tadds\talone")
    for one in found.images:
        click.echo(f"{one.name}\t{one.files}\t{one.bytes}\t{one.unique}\t{one.adds}\t{one.alone}")
    if len(found.images) < 2:
        return
    click.echo(f"total\t-\t-\t{found.total}\t{found.total}\t-")
    click.echo("\nshared\t" + "\t".join(one.name for one in found.images))
    for one, row in zip(found.images, found.shared, strict=True):
        click.echo(f"{one.name}\t" + "\t".join(map(str, row)))
    if sys.stdout.isatty():
        _bars(found)


def _bars(found: Sharing) -> None:
    """Each image's content: new in the list, and shared with those before it."""
    most = max(max(one.unique for one in found.images), 1)
    width = max(len(one.name) for one in found.images)
    click.echo()
    for one in found.images:
        new, old = (round(_BAR * size / most) for size in (one.adds, one.unique - one.adds))
        click.echo(f"{one.name:{width}}  " + "#" * new + "." * old + f"  {one.unique >> 20} MiB")
    click.echo(f"{'':{width}}  # added   . shared with those before it")


def write_svg(found: Sharing, path: str) -> None:
    """The matrix as squares, darker where more of the row's image is shared with the column's.  Raises CafsError."""
    from html import escape

    from cafs import atomic
    from cafs.errors import os_error, quote

    count = len(found.images)
    width, height = _LEFT + _CELL * count + 20, _TOP + _CELL * count + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    ]
    for row, one in enumerate(found.images):
        y = _TOP + _CELL * row
        parts.append(f'<text x="{_LEFT - 8}" y="{y + _CELL // 2 + 4}" text-anchor="end">{escape(one.name)}</text>')
        x = _LEFT + _CELL * row + _CELL // 2
        parts.append(f'<text x="{x}" y="{_TOP - 8}" text-anchor="middle">{escape(one.name[:10])}</text>')
        for column, shared in enumerate(found.shared[row]):
            share = shared / one.unique if one.unique else 0.0
            colour, ink = f"rgb({round(245 - 205 * share)},{round(248 - 130 * share)},{round(252 - 60 * share)})", "#fff"
            x = _LEFT + _CELL * column
            parts.append(f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" fill="{colour}"/>')
            ink = "#fff" if share > 0.5 else "#333"
            middle = f'x="{x + _CELL // 2 - 1}" y="{y + _CELL // 2 + 4}" text-anchor="middle" fill="{ink}"'
            parts.append(f"<text {middle}>{share:.0%}</text>")
    parts.append("</svg>\n")
    try:
        atomic.replace_file(os.path.abspath(path), "\n".join(parts).encode())
    except OSError as error:
        raise os_error(f"cannot write {quote(path)}", error) from error
