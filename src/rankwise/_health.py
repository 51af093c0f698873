"""`group.health()`: what each rank is doing, read from shared memory and /proc. Never blocks."""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._engine import Engine


class RankHealth(NamedTuple):
    """One rank at one moment.

    state: "starting", "idle", "running", "stopped" (SIGSTOP), "closing" or "dead".
    method, call_id: the call it is in, None where it is in none. seconds: for how long.
    memory: resident bytes; None where it has no process.
    """

    rank: int
    state: str
    pid: int
    method: str | None
    call_id: int | None
    seconds: float
    memory: int | None


def health_of(engine: Engine) -> list[RankHealth]:
    """The health of every rank of `engine`, in rank order."""
    owed = engine.owed()
    ranks = engine.ranks
    found = []
    for rank in range(engine.world_size):
        state, since = ranks.state(rank)
        call_id = ranks.running(rank) if state in ("running", "stopped") else None
        call = owed.get(rank)
        method = call.method if call is not None and call.id == call_id else None
        if state == "running" and method is None:
            state, call_id, since = "idle", None, 0.0  # it has answered a moment ago
        found.append(
            RankHealth(
                rank, state, ranks.pid(rank), method, call_id or None, since, ranks.memory(rank)
            )
        )
    return found
