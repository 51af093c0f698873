"""How a row of the tables is written: the median of its rounds, with the least and the greatest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (least-most)` of one number a round."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed: 0.99 for the 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
