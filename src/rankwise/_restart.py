"""When a broken group starts again: what the user has asked for, and the decision.

    Restart(3, 1.0)    the user's own terms
    Policy.failed(now) > seconds to wait before the next start, or None: no more
    Policy.ready(now)  a start has succeeded

Nothing here waits or knows of a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankwise._checks import at_least, seconds, wrong_type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

LONGEST: Final = 60.0  # seconds: no back-off grows beyond it
CALM: Final = 60.0  # a group that was ready for so long begins with the shortest back-off again


@dataclass(frozen=True, slots=True)
class Restart:
    """Have a group that breaks start again as a whole: fresh objects, the same arguments.

    max_restarts: how many starts there may be beyond the first, failed ones included; None: no
        limit. When they are used up the group stays broken.
    backoff: seconds before a start. They double with each start that follows on another within a
        minute, up to 60.
    on_restart: called as `on_restart(ranks)`, where `ranks` is a view of all new ranks, before
        anybody else's call reaches them: reload what the old ones knew. If it raises, the start
        has failed. It runs on a thread of its own.

    Open calls end with WorkerDied or GroupBroken and never run twice. Calls that are made before
    the group is ready again raise GroupBroken; `group.wait_ready()` waits for that.
    """

    max_restarts: int | None = 3
    backoff: float = 1.0
    on_restart: Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        if self.max_restarts is not None:
            at_least(0, "max_restarts", "an int of at least 0, or None", self.max_restarts)
        seconds("backoff", "a finite number of seconds, 0 or more", self.backoff, zero=True)
        if self.on_restart is not None and not callable(self.on_restart):
            right = "a callable that takes a view of the new ranks, or None"
            raise wrong_type("on_restart", right, self.on_restart)


class Policy:
    """Counts the failures of one group, and says what follows from the next."""

    def __init__(self, terms: Restart | None) -> None:
        self.terms = terms
        self.used = 0  # restarts so far
        self._in_a_row = 0
        self._ready_at: float | None = None

    def ready(self, now: float) -> None:
        self._ready_at = now

    def failed(self, now: float) -> float | None:
        """The group, or a start of it, failed: seconds until the next start; None: no more."""
        terms = self.terms
        if terms is None or (terms.max_restarts is not None and self.used >= terms.max_restarts):
            return None
        if self._ready_at is not None and now - self._ready_at >= CALM:
            self._in_a_row = 0
        self._ready_at = None
        self.used += 1
        self._in_a_row += 1
        longest = max(LONGEST, terms.backoff)
        return min(longest, terms.backoff * 2.0 ** min(self._in_a_row - 1, 64))

    def count(self) -> str:
        """ "1 of 3": the restart that is under way."""
        limit = None if self.terms is None else self.terms.max_restarts
        return str(self.used) if limit is None else f"{self.used} of {limit}"
