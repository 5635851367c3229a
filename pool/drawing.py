"""Charts as SVG: points or lines in a frame with scales; the same values give the same bytes."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 34, 640, 300
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1")


@dataclass(frozen=True, slots=True)
class Series:
    """name: for the legend.  points: (across, up, what it is, '' for nothing)."""

    name: str
    points: Sequence[tuple[float, float, str]]


def chart(title: str, across: str, up: str, series: Sequence[Series], *, is_line: bool) -> str:
    """across, up: what is measured.  Scales begin at 0, or below."""
    every = [point for one in series for point in one.points]
    left, right = _span([point[0] for point in every], from_zero=not is_line)
    bottom, top = _span([point[1] for point in every], from_zero=True)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * (x - left) / (right - left), _TOP + _HEIGHT * (1 - (y - bottom) / (top - bottom))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 30}" height="{_TOP + _HEIGHT + 56}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="16" font-size="13">{html.escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">{html.escape(across)}</text>',
        f'<text transform="translate(14 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">{html.escape(up)}</text>',
    ]
    for step in range(6):
        x, y = left + (right - left) * step / 5, bottom + (top - bottom) * step / 5
        at_x, at_y = place(x, y)
        parts.append(f'<text x="{at_x:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{x:.4g}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at_y + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<text x="{_LEFT + 8}" y="{_TOP + 16 + 14 * number}" fill="{colour}">{html.escape(one.name)}</text>')
        places = [place(x, y) for x, y, _ in one.points]
        if is_line:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            continue
        for (x, y), (_, _, label) in zip(places, one.points, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{html.escape(label)}</title></circle>'
            )
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" font-size="9" fill="{colour}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _span(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value)] or [0.0]
    low = min(0.0, *found, 0.0) if from_zero else min(found)
    high = max(found)
    return (low, high) if high > low else (low, low + 1.0)
