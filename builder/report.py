"""What a build read and what it cost, for others to read: a make dependency file, and a page."""

from __future__ import annotations

import html
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.progress import Row

_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em }} td, th {{ padding: 2px 10px; text-align: left; white-space: nowrap }}
td.number {{ text-align: right }} div {{ height: 10px; background: #4477aa }} tr.cached div {{ background: #bbbbbb }}
</style></head><body><h1>{title}</h1>
<p>{made} steps made in {seconds:.1f} s, {cached} from the cache, which saved {saved:.1f} s; {bytes} bytes of index added.</p>
<table><tr><th>step</th><th></th><th>seconds</th><th>bytes of index</th><th></th></tr>
{rows}
</table></body></html>
"""


def page(rows: list[Row], title: str) -> bytes:
    """HTML: a row a step, with a bar as long as it took; what was cached is grey, with what it took once."""
    longest = max([row.seconds for row in rows], default=0.0) or 1.0
    made, cached = [row for row in rows if not row.is_cached], [row for row in rows if row.is_cached]
    lines = [
        f'<tr class="{"cached" if row.is_cached else "made"}"><td>{html.escape(row.title)}</td>'
        f"<td>{'cached' if row.is_cached else 'made'}</td><td class=number>{row.seconds:.2f}</td>"
        f'<td class=number>{row.added}</td><td><div style="width: {300 * row.seconds / longest:.0f}px"></div></td></tr>'
        for row in rows
    ]
    return _PAGE.format(
        title=html.escape(title),
        made=len(made),
        cached=len(cached),
        seconds=sum(row.seconds for row in made),
        saved=sum(row.seconds for row in cached),
        bytes=sum(row.added for row in made),
        rows="\n".join(lines),
    ).encode()


def depfile(target: str, files: set[str]) -> bytes:
    """A rule for make(1): what TARGET was made of; and one for each of these, so that make goes on without one that has gone.

    As gcc -MP.  Directories are among them: their time changes when a file comes or goes.
    """
    words = [_for_make(os.fsencode(name)) for name in sorted(files)]
    rule = b" \\\n ".join([_for_make(os.fsencode(target)) + b":", *words]) + b"\n"
    return rule + b"".join(b"\n" + word + b":\n" for word in words)


def _for_make(name: bytes) -> bytes:
    for letter in b"\\", b" ", b"#", b":", b"%":
        name = name.replace(letter, b"\\" + letter)
    return name.replace(b"$", b"$$")
