"""Which value a share of all is no larger than; the nearest rank, so that it is one of them."""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def of(ordered: Sequence[float], share: float) -> float:
    """Of values from the least to the largest; 0 of none."""
    return ordered[min(math.ceil(len(ordered) * share), len(ordered)) - 1] if ordered else 0.0
