"""The search for calls and answers that were lost: looks in, reasons to break the group out.

    look 1   the rank has finished the call, or sleeps and has read all that was sent to it;
             nothing from it lies in the driver's socket                        > a suspect
    look 2   leaders have fed all that they held at look 1; it is owed still     > lost

A rank that has finished a call had written its answer before; one that sleeps until bytes come, and
has none unread, has nothing in hand, and no byte of a call that was sent whole is still to come.
So what it owes will never be answered. The answer may only be with a leader, who took it off the
socket and has not fed it yet. `served` counts how often a leader has fed all that it found: one
that was at it in look 1 has finished when the count is one higher, and at two another has been
round.

What is not lost: a call that lies unread with a stopped rank; one that was read by a rank which
waits for the interpreter's lock, or for memory, or for a CPU (it does not sleep until bytes come).
It touches nothing: no socket, no page, no clock.
"""

from __future__ import annotations

from rankwise._calls import Garbled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Sight:
    """How one rank looked that owed call `call_id`, of `method`, which had been sent whole.

    idle: it slept until bytes come, and had read all that was sent to it. finished: it had written
    its answer to this call, or to a later one. unheard: bytes from it that lay in the driver's
    socket, read last.
    """

    __slots__ = ("call_id", "finished", "idle", "method", "rank", "unheard")

    def __init__(
        self, rank: int, call_id: int, method: str, idle: bool, finished: bool, unheard: int
    ) -> None:
        self.rank = rank
        self.call_id = call_id
        self.method = method
        self.idle = idle
        self.finished = finished
        self.unheard = unheard


class Lookout:
    """Remembers between two looks what seemed to be lost."""

    def __init__(self) -> None:
        # (rank, call) > what had been served when nothing of it was on its way any more, and why
        self.suspects: dict[tuple[int, int], tuple[int, str]] = {}

    def look(self, before: int, sights: Iterable[Sight], after: int) -> list[Garbled]:
        """Take in one look at the ranks that owe an answer. Returns what is lost for certain.

        before, after: how often leaders had fed all they found, read before the look and after it.
        """
        suspects: dict[tuple[int, int], tuple[int, str]] = {}
        lost = []
        for sight in sights:
            key = sight.rank, sight.call_id
            first = self.suspects.get(key)
            if first is not None and before >= first[0] + 2:
                lost.append(Garbled(sight.rank, first[1]))
            elif first is not None:
                suspects[key] = first
            elif (sight.idle or sight.finished) and not sight.unheard:
                suspects[key] = after, _words(sight)
        self.suspects = suspects
        return lost


def _words(sight: Sight) -> str:
    what = f"{sight.method}() (call {sight.call_id})"
    doing = "is idle" if sight.idle else "is busy with a later one"
    if sight.finished:
        return (
            f"the answer to {what} was lost: the rank says that it has finished the call, and "
            f"{doing}, but no answer has come"
        )
    return (
        f"{what} was lost: the rank is idle and has read all that was sent to it, but owes the "
        "answer"
    )
