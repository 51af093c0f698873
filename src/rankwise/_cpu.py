"""How much CPU time processes use, from their CPU clocks: one system call a look. Pure but for it.

a look now and then > CpuUse.sample     share(pid) > since a look a quarter of a second ago
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST = 0.1  # seconds: over less, a share says nothing
_STALE = 2.0  # seconds without a look: what it did before is not what it does now


def cpu_seconds(pid: int) -> float | None:
    """CPU time that all threads of process `pid` have used; None if it is gone."""
    try:
        # The clock of another process (clock_getcpuclockid(3)); /proc counts in steps of 10 ms.
        return time.clock_gettime((~pid << 3) | 2) if pid > 0 else None
    except OSError:
        return None


class CpuUse:
    """The looks of one group, by process."""

    def __init__(self, read: Callable[[int], float | None] = cpu_seconds) -> None:
        self._read = read
        self._looks: dict[int, list[tuple[float, float]]] = {}  # pid -> the last two: when, seconds

    def sample(self, pid: int, now: float) -> None:
        used = self._read(pid)
        looks = self._looks.get(pid, [])
        if used is None:
            self._looks.pop(pid, None)
        elif looks and now < looks[-1][0] + _STALE:
            self._looks[pid] = [looks[-1], (now, used)]
        else:
            self._looks[pid] = [(now, used)]

    def share(self, pid: int, now: float) -> float | None:
        """CPU time a second since the last look but one: 1.0 is one core; None: not known."""
        looks = self._looks.get(pid)
        used = self._read(pid)
        if not looks or used is None:
            return None
        when, before = looks[0]
        if not _LEAST <= now - when < 2 * _STALE:
            return None
        return max(0.0, (used - before) / (now - when))
