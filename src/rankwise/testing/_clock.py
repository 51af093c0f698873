"""A clock that a test moves, for groups whose ranks are threads.

advance > now > InlineEngine.tick (deadlines, grace) > waiters look again
"""

from __future__ import annotations

import threading
from weakref import WeakSet

from rankwise import _planned
from rankwise._background import Bell
from rankwise._checks import wrong_value
from rankwise._deadline import check_timeout, clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Final, Self


NANOSECOND: Final = 1e-9  # seconds


class ManualClock:
    """The time of every group with `backend="inline"` that is started in the block.

    Deadlines (`options(timeout=)`), patience (`result(timeout)`), `grace`, the 50 ms after a first
    failure and `current_call().remaining()` go by it: none of them passes until `advance` is
    called, and when it returns all that was due is settled. The start and the end of a group go by
    the real clock, and so do groups of processes.
    """

    def __init__(self) -> None:
        self._now = clock()
        self._lock = threading.Lock()
        self._engines: WeakSet[_planned.Ticking] = WeakSet()
        self._news = Bell()
        self._outer: list[_planned.Clock | None] = []

    def __enter__(self) -> Self:
        self._outer.append(_planned.clock)
        _planned.clock = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _planned.clock = self._outer.pop()

    def time(self) -> float:
        """What it reads, seconds; as `time.monotonic` did when it was made, and what was added."""
        return self._now

    def due(self) -> float:
        """Up to when all is due now: floats that are added up in another order end elsewhere."""
        return self._now + NANOSECOND

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and everything happen that is due then. From any thread."""
        checked = check_timeout(seconds, "seconds")
        if checked is None or checked < 0:
            raise wrong_value("seconds", "a number of seconds, 0 or more", seconds)
        with self._lock:
            self._now += checked
        for engine in list(self._engines):
            engine.tick()
        self.ring()

    def sleep(self, seconds: float) -> None:
        """Wait, for instance in a worker's method, until so much has been advanced."""
        self.wait_for(lambda: False, self._now + seconds)

    # -- for the engine -----------------------------------------------------------------------

    def adopt(self, engine: _planned.Ticking) -> None:
        """Tell `engine` when time has passed, for as long as it lives."""
        self._engines.add(engine)

    def ring(self) -> None:
        """Have everybody who waits look again."""
        self._news.ring()

    def wait_for(self, happened: Callable[[], bool], until: float | None) -> bool:
        """Wait until `happened()` is true (True) or this clock reads `until` (False)."""
        if until is None:
            return self._news.wait_for(happened, None)
        self._news.wait_for(lambda: happened() or self.due() >= until, None)
        return happened()

    def left(self, until: float | None) -> float | None:
        """Seconds until `until`, never negative; None where there is no limit."""
        return None if until is None else max(0.0, until - self._now)
