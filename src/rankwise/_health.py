"""What each rank is doing.

group.health()   read from shared memory and /proc; never blocks
group.stacks()   asked of the launcher, which asks the ranks' own handlers; py-spy on request, or as
                 a last resort
"""

from __future__ import annotations

from typing import NamedTuple

from rankwise._stacks import RankStack, Stacks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._engine import Engine


STACKS_PATIENCE = 1.0  # seconds for the launcher to answer; a rank has 0.1 of them


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


def stacks_of(engine: Engine, native: bool) -> Stacks:
    """The stacks of every rank of `engine`, in rank order; `native`: with what py-spy says of all.

    py-spy is not asked unasked: it stops a rank for some 50 ms, which is then late with its own.
    """
    reports = engine.inquire(tuple(range(engine.world_size)), STACKS_PATIENCE)
    # What is stopped is left as it is, and what has ended cannot be looked at.
    asked = [
        report.pid
        for report in reports.values()
        if (native or report.stack is None) and report.process and report.process not in "TtZX"
    ]
    told = {}
    if asked:
        from rankwise._pyspy import native_stacks  # subprocess: 5 ms, and rarely needed

        told = native_stacks(asked)
    return Stacks(
        RankStack(
            report.rank,
            report.state,
            report.pid,
            report.method if report.running else None,
            report.seconds,
            report.stack,
            report.reason,
            told.get(report.pid),
            report.last_line,
        )
        for report in reports.values()
    )
