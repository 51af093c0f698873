"""One monotonic clock, and what is left of a limit on it.

A timeout becomes a deadline once, where the user gave it; from there on only deadlines are passed.
"""

from __future__ import annotations

import time

# CLOCK_MONOTONIC, seconds. On one machine it reads the same in every process, so a deadline may
# travel with a call and two ranks' failures can be put in order.
clock = time.monotonic

# What may be waited after a timeout to find out what the ranks are doing: they have 0.1 s to say
# it; the rest is the way there and back. A call whose deadline has passed is settled by then, and a
# group whose grace is over broken, whatever could be found out.
EXPLAIN_PAUSE = 0.15


def deadline(timeout: float | None) -> float | None:
    """The moment `timeout` seconds from now, or None for no limit. A negative timeout is now."""
    return None if timeout is None else clock() + max(0.0, timeout)


def left(until: float | None) -> float | None:
    """Seconds until `until`, never negative; None where there is no limit."""
    return None if until is None else max(0.0, until - clock())


def check_timeout(timeout: object, name: str = "timeout") -> float | None:
    """`timeout` as seconds, or None. Raises TypeError or ValueError, naming the argument `name`."""
    if timeout is None:
        return None
    number = isinstance(timeout, (int, float)) or type(timeout).__module__ == "numpy"
    if isinstance(timeout, bool) or not number:
        raise TypeError(f"{name} must be seconds (a number) or None, not {timeout!r}")
    seconds = float(timeout)  # type: ignore[arg-type]
    if seconds != seconds:
        raise ValueError(f"{name} must be seconds (a number) or None, not nan")
    # What no clock reaches is no limit; the kernel's calls would refuse it.
    return None if seconds > 1e9 else seconds
