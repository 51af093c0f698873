"""What is missing because a rank's time was up: asked for again, where a test wants to see it.

The launcher gives a rank a tenth of a second for its stack, and a deadline gives the launcher
little more. A machine that stalls for so long makes of it a stack None with the reason: that is as
it should be, and not what those tests are about. A start that sticks has to have come so far first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from rankwise import CallTimeout, StartupTimeout

TRIES = 10
START_LIMITS = 1.0, 3.0, 9.0  # seconds; a machine that stalls takes the longer ones
LATE = re.compile(r"(in|for|after) 100 ms|launcher does not answer")


def untold(reason: str | None) -> bool:
    """Whether a stack is missing for this `reason`: that its time was up."""
    return bool(reason and LATE.search(reason))


def whole(group: Any, **options: Any) -> Any:
    """`group.stacks()` in which no rank's time was up."""
    for _ in range(TRIES):
        stacks = group.stacks(**options)
        if not any(untold(each.reason) for each in stacks):
            break
    return stacks


def late(error: Any) -> bool:
    """Whether a stack that `error` should have is missing: a rank's time was up, or the keeper's
    own, and then there is no reason either."""
    reasons = getattr(error, "reasons", {})
    return any(
        stack is None and (reasons.get(rank) is None or untold(reasons[rank]))
        for rank, stack in error.stacks.items()
    )


def explained(
    attempt: Callable[[], object],
    again: Callable[[], object] = lambda: None,
    kind: type[Exception] = CallTimeout,
) -> Any:
    """What `attempt()` raises, of this `kind`, once no stack is `late`. Before another attempt
    `again()` puts all back."""
    for turn in range(TRIES):
        if turn:
            again()
        with pytest.raises(kind) as caught:
            attempt()
        if not late(caught.value):
            break
    return caught.value


def not_ready(
    start: Callable[[float], object], there: Callable[[StartupTimeout], bool]
) -> StartupTimeout:
    """What `start(start_timeout)` raises, with the first of `START_LIMITS` by which the ranks had
    come as far as they ever will, as `there` sees it; the last one where none was enough."""
    for limit in START_LIMITS:
        with pytest.raises(StartupTimeout) as caught:
            start(limit)
        if there(caught.value):
            break
    return caught.value
