"""What `rankwise.testing` has in force for the groups that are made now. Nothing, outside of tests.

A group reads this once, when it starts; one that finds nothing pays nothing for it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Protocol

    class Plan(Protocol):
        """Which faults the ranks of a group are to have."""

        def text_for(self, world_size: int, *, threads: bool = False) -> str:
            """What its ranks are told. ValueError where they cannot have these faults."""
            ...

    class Ticking(Protocol):
        """Whom the clock tells that time has passed."""

        def tick(self) -> None: ...

    class Clock(Protocol):
        """The time of groups whose ranks are threads, moved by a test."""

        def time(self) -> float: ...
        def due(self) -> float: ...
        def sleep(self, seconds: float) -> None: ...
        def adopt(self, engine: Ticking) -> None: ...
        def left(self, until: float | None) -> float | None: ...
        def ring(self) -> None: ...
        def wait_for(self, happened: Callable[[], bool], until: float | None) -> bool: ...


# The variable that tells a rank of its faults. It is gone before any code of the user's runs.
FAULTS: Final = "RANKWISE_FAULTS"

faults: Plan | None = None
clock: Clock | None = None
