"""Which calls take so long that somebody should hear of it: the group's own soft limit. Pure.

    the oldest call that each rank owes, at every look > SlowCalls.look > those to be logged now

Every call is under it that does not set `slow_after` itself, so it must cost a call nothing and a
program that is merely busy next to nothing. It looks only at what the keeper looks at anyway, and
warns once a call: after a minute, or after twice the longest time that the method has taken before
in this group, so that an epoch of ten minutes is told of once and not at each epoch. It sends no
signal to a worker: nobody has asked, and C code in `sleep` or `poll` may return early from one.
"""

from __future__ import annotations

from rankwise._messages import CALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from rankwise._calls import Call

# Longer than any step that an interactive service takes, shorter than the patience of whoever
# looks at a job that seems to hang: torch's own limits are 10 and 30 minutes.
SLOW_AFTER = 60.0
_METHODS = 256  # whose times are kept: a program that makes up names must not fill the memory


class SlowCalls:
    """What one group has taken long over."""

    def __init__(self) -> None:
        # By id: nobody but its caller is to keep a call, whose answers may be gigabytes.
        self._since: dict[int, tuple[float, str]] = {}  # when first seen at a rank's head, method
        self._limits: dict[int, float] = {}
        self._longest: dict[str, float] = {}  # method -> seconds

    def look(self, owed: Iterable[Call], now: float) -> list[tuple[Call, float]]:
        """The calls that are to be logged now, each with the limit that it has passed.

        owed: the oldest call that each rank owes.
        """
        open_calls = {
            call.id: call
            for call in owed
            if call.slow is None and call.kind == CALL and not call.done
        }
        for number in self._since.keys() - open_calls.keys():
            since, method = self._since.pop(number)
            if self._limits.pop(number, 0.0) == _TOLD and len(self._longest) < _METHODS:
                self._longest[method] = max(now - since, self._longest.get(method, 0.0))
        slow = []
        for number, call in open_calls.items():
            since, _ = self._since.setdefault(number, (now, call.method))
            limit = self._limits.get(number)
            if limit is None:
                limit = max(SLOW_AFTER, 2 * self._longest.get(call.method, 0.0))
                self._limits[number] = limit
            if now >= since + limit:
                self._limits[number] = _TOLD
                slow.append((call, limit))
        return slow


_TOLD = float("inf")
