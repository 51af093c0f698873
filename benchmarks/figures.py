"""How a row of the tables is written (median of its rounds, least, greatest), and /proc read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (least-most)` of one number a round."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed: 0.99 for the 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def field(path: str, name: str) -> int:
    """A line of a file of /proc, in bytes."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
