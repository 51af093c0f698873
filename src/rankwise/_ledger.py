"""The ledger: which call is owed by whom, and what follows from each event. It touches nothing.

    begin > (nothing is queued there, as nearly always) > begun
    place > (queued a rank) > next_to_send > begun > reply ... reply > settled > ended
                  |                            |       failure > (50 ms) settled > (grace) broken
                cancel, expire              lost: settled with WorkerDied, group broken

No thread, clock, socket or process is touched here: events come in as method calls with the time as
an argument, and what is to be done comes out in `settled`, `reports`, `overdue`, `slow` and
`broken`. The owner (a pump, or the inline engine) calls every method under its one lock.

An exception out of a signal handler may cut a method short between any two bytecodes when the owner
is the main thread. So each method can be run again with the same event: what it stores first it can
store twice, and the store that ends it is its last. CPython runs handlers only after a call and at
a backward jump, never inside straight code, and that is what "last" leans on. That is why this is
one file, long as it is: each event begins by finishing whichever other was cut short.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush

from rankwise._calls import Broken, Call, Cancelled, Closed, Error, Expired, Garbled, Lost, Stuck
from rankwise._deadline import EXPLAIN_PAUSE
from rankwise._messages import ACK, FAILED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from rankwise._messages import Exited

# How much is sent ahead of the answers to one rank. Enough that a worker never waits for the driver
# between two short calls (64 answers of 10 us cover ten wake-ups); little enough that `cancel()`
# still finds something to cancel, and that a stuck rank holds back kilobytes, not gigabytes.
WINDOW_CALLS = 64
WINDOW_BYTES = 4 << 20
SMALL_BODY = 16 << 10

# After the first failure the others have this long to answer or to fail too, so that the earliest
# failure can be told from its consequences.
FAILURE_PAUSE = 0.050
# End of file on a channel without the launcher's word on the process: it closed its descriptors.
HANGUP_PAUSE = 1.0

DEADLINE, SETTLE, BREAK, HANGUP, SLOW = range(5)


class Ledger:
    """The open calls of one group of `world_size` ranks."""

    __slots__ = (
        "_barriers", "_dropping", "_last_id", "_placing", "_timers", "broken", "cancelled",
        "closing", "dead", "exiting", "explains", "hung", "inflight", "late", "open", "overdue",
        "queues", "reports", "settled", "slow", "world_size",
    )  # fmt: skip

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.open: dict[int, Call] = {}  # in order of id; a call leaves when no rank owes it
        self.inflight: list[dict[int, Call]] = [{} for _ in range(world_size)]
        self.settled: deque[Call] = deque()  # to be told to their watchers
        self.reports: deque[tuple[Call, int, bytes]] = deque()  # failures that no caller will see
        self.explains = False  # the owner settles overdue calls, once it can explain them
        self.overdue: deque[Call] = deque()  # their deadline has passed, or their grace; to explain
        self.slow: deque[Call] = deque()  # to be logged: they take longer than they should
        self.broken: Error | None = None
        self.closing = False
        self.exiting = False
        self.dead: dict[int, Exited | None] = {}
        self.hung: set[int] = set()
        self.late = 0  # answers to calls that were settled without them
        self.cancelled: set[int] = set()  # under way to some ranks, and queued for others yet
        self.queues: list[deque[Call]] = [
            deque() for _ in range(world_size)
        ]  # not sent yet, a rank
        self._placing: tuple[Call, ...] = ()
        self._last_id = 0
        self._timers: list[tuple[float, int, int]] = []  # when, what, call id or rank
        self._barriers: list[Call] = []
        self._dropping: dict[int, Call] = {}

    # -- submitting ---------------------------------------------------------------------------

    def refusal(self) -> Error | None:
        """Why no call can be taken now, or None."""
        if self.broken is not None:
            return self.broken
        return Closed(self.exiting) if self.closing else None

    def place(self, calls: tuple[Call, ...]) -> None:
        """Give `calls` their place in the order of calls. From here on they will run."""
        self.mend()
        number = self._last_id
        for call in calls:
            number += 1
            call.id = number
        self._last_id = number
        self._placing = calls  # the commit: whoever comes next finishes it
        self.mend()

    def begin(self, call: Call) -> bool:
        """As `place`, where nothing is in the way of `call` on any of its ranks: it is under way to
        all of them, to be sent there at once, and then noted by `all_sent`. False: `place` it.
        """
        if (
            self._placing or self._dropping or self._barriers
            or call.deadline is not None or call.slow is not None
            or call.bodies is not None or len(call.body) > SMALL_BODY
        ):  # fmt: skip
            return False
        inflight = self.inflight
        if self.open:  # else queues hold only dropped calls, and inflight what a struck reply left
            queues = self.queues
            for rank in call.ranks:
                if queues[rank] or len(inflight[rank]) >= WINDOW_CALLS:
                    return False
        number = self._last_id + 1
        call.id = number
        self._last_id = number
        self._placing = (call,)  # the commit: whoever comes next queues it, if it was not all sent
        call.begun = True
        self.open[number] = call
        for rank in call.ranks:
            inflight[rank][number] = call
        return True

    def all_sent(self) -> None:
        """The call that was begun has left for all its ranks, or is queued where it has not."""
        self._placing = ()

    def mend(self) -> None:
        """Finish the `place` that was cut short, if one was. Every event begins with this."""
        if not (self._placing or self._dropping or self._barriers):
            return
        for call in self._placing:
            if (call.deadline is not None or call.slow is not None) and call.id not in self.open:
                if call.deadline is not None:
                    self._timer(call.deadline, DEADLINE, call.id)
                if call.slow:
                    self._timer(call.slow[0], SLOW, call.id)
            self.open[call.id] = call
            for rank in call.ranks:
                queue = self.queues[rank]
                if not queue or queue[-1].id < call.id:
                    queue.append(call)
        self._placing = ()
        for call in list(self._dropping.values()):
            self._drop_on(call)
        if self._barriers:
            self._settle_barriers(next(iter(self.open), None))

    def barrier(self, call: Call) -> None:
        """Settle `call` (which no rank gets) once all that was placed before it has ended."""
        self.mend()
        call.id = self._last_id
        if not self.open:
            self._finish(call)
        else:
            self._barriers.append(call)

    def next_to_send(self, rank: int) -> Call | None:
        """The call that `rank` is to be sent now; None: nothing is queued, or enough is under way.

        It stays first in the queue until `sent`.
        """
        queue = self.queues[rank]
        while queue:
            call = queue[0]
            if call.dropped:
                queue.popleft()
                continue
            inflight = self.inflight[rank]
            if inflight and call.id not in inflight:
                if len(inflight) >= WINDOW_CALLS:
                    return None
                size = len(call.body_for(rank))
                if size > SMALL_BODY:
                    ahead = sum(len(other.body_for(rank)) for other in inflight.values())
                    if ahead + size > WINDOW_BYTES:
                        return None
            inflight[call.id] = call
            call.begun = True
            return call
        return None

    def sent(self, rank: int, call: Call) -> bool:
        """The last byte of `call` has left for `rank`. Whether more is queued for it."""
        queue = self.queues[rank]
        if queue and queue[0] is call:
            queue.popleft()
        return bool(queue)

    # -- what comes back ----------------------------------------------------------------------

    def reply(self, rank: int, call_id: int, kind: int, body: bytes, now: float) -> bool:
        """`rank` has answered call `call_id` with a frame of `kind`. Whether that is nonsense."""
        inflight = self.inflight[rank]
        call = inflight.get(call_id)
        if call is None:
            return self._unasked(rank, call_id)
        answers = call.answers
        if call.done:
            self._late_reply(call, rank, kind, body, now)
        else:
            answers[rank] = (kind, body)
            if kind == FAILED:
                self._failure(call, now)
                if call.error is not None:
                    self.reports.append((call, rank, body))  # its deadline has passed
                elif call.reply_from is not None and not call.return_exceptions:
                    self._finish(call)
            elif rank == call.reply_from and call.error is None:
                self._finish(call)
        if len(answers) == len(call.ranks):
            if not call.done and call.error is None:
                self._finish(call)
            if call.done:  # else it is overdue: it ends when it is settled
                self._end(call)
        inflight.pop(call_id, None)
        return False

    def _unasked(self, rank: int, call_id: int) -> bool:
        """An answer that `rank` does not owe: this very event, run again, or one to no call."""
        self.late += 1
        call = self.open.get(call_id)
        if call_id <= self._last_id and (call is None or rank in call.answers):
            return False
        self.break_group(Garbled(rank, f"it has answered call {call_id}, which it was not sent"))
        return True

    def _late_reply(self, call: Call, rank: int, kind: int, body: bytes, now: float) -> None:
        """`call` had its outcome already."""
        if rank in call.answers:
            pass  # struck before the end of this very event, which is run again
        elif kind != FAILED:
            self.late += call.error is not None
            call.answers[rank] = (kind, b"")  # nobody will read it
        else:
            if call.late_failure is None:
                call.late_failure = (rank, body)  # it may be what breaks the group
            self.reports.append((call, rank, body))
            self._failure(call, now)
            # Beside other failures it is one more of them; an outcome that was something else
            # stays what it was.
            failed = call.error is None and call.failure() is not None
            call.answers[rank] = (kind, body) if failed else (ACK, b"")

    def _failure(self, call: Call, now: float) -> None:
        if len(call.ranks) == 1 or call.break_at is not None:
            return
        if not call.return_exceptions and call.error is None:
            self._timer(now + FAILURE_PAUSE, SETTLE, call.id)
        if call.on_error == "fail":
            self._timer(now + call.grace, BREAK, call.id)
        call.break_at = now + call.grace

    def hangup(self, rank: int, now: float) -> None:
        """End of file came on the channel of `rank`: a hint; the launcher's word should follow."""
        if rank not in self.hung and rank not in self.dead:
            self._timer(now + HANGUP_PAUSE, HANGUP, rank)
            self.hung.add(rank)

    def died(self, rank: int, report: Exited | None) -> None:
        """`rank` has ended, and its channel has been emptied."""
        self.mend()
        if rank in self.dead:
            return
        owed = next(iter(self.inflight[rank].values()), None)
        if owed is None and self.queues[rank]:
            owed = next((call for call in self.queues[rank] if not call.dropped), None)
        orderly = self.closing and owed is None and self.broken is None
        if not orderly:
            method = None if owed is None else owed.method
            self.break_group(Lost(rank, report, method, None if owed is None else owed.id))
        self.dead[rank] = report

    def break_group(self, cause: Error) -> None:
        """End every open call, because of `cause`. The first cause is the one that stays."""
        self.mend()
        if self.broken is None:
            self.broken = cause
        cause = self.broken
        for call in list(self.open.values()):
            if not call.done:
                if isinstance(cause, Closed):
                    call.error = cause
                elif isinstance(cause, Lost):
                    call.error = cause if cause.rank in call.ranks else Broken(cause)
                else:
                    call.error = Broken(cause)
                self._finish(call)
            self._end(call)
        for queue in self.queues:
            queue.clear()
        for inflight in self.inflight:
            inflight.clear()

    # -- the caller's wishes, and time --------------------------------------------------------

    def cancel(self, call: Call) -> bool:
        """Drop `call` where no byte of it has been sent; else say False: it runs on every rank."""
        self.mend()
        if call.done:
            return isinstance(call.error, Cancelled)
        if call.begun:
            return False
        self._drop(call, Cancelled())
        return True

    def to_be_told(self, call: Call) -> list[int]:
        """The ranks that are under way with `call`, which was cancelled. Those for which it is
        queued yet are to be told when it is sent to them: it is among `cancelled`."""
        missing = call.missing()
        under_way = [rank for rank in missing if call.id in self.inflight[rank]]
        self.cancelled.intersection_update(self.open)
        if len(under_way) < len(missing):
            self.cancelled.add(call.id)
        return under_way

    def drop_queued(self, error: Error) -> None:
        """Drop every call of which no byte has been sent."""
        self.mend()
        for call in list(self.open.values()):
            if not call.begun and not call.done:
                self._drop(call, error)

    def abort(self, call: Call, error: Error) -> None:
        """Settle `call` with `error` now, whatever its ranks are doing."""
        if not call.begun and not call.done:
            self._drop(call, error)
        elif not call.done:
            call.error = error
            self._finish(call)

    def exit(self) -> None:
        """The interpreter is about to exit: take no more calls, and settle all that wait."""
        self.closing = self.exiting = True
        for call in list(self.open.values()):
            self.abort(call, Closed(exiting=True))
        self.end_barriers()

    def _drop(self, call: Call, error: Error) -> None:
        call.error = error
        call.dropped = True  # the commit: `next_to_send` and `mend` finish it
        self._dropping[call.id] = call
        self._drop_on(call)

    def _drop_on(self, call: Call) -> None:
        self._finish(call)
        self._end(call)
        self._dropping.pop(call.id, None)

    def expire(self, now: float) -> bool:
        """Let every timer run out that is due at `now`. Whether there was one."""
        self.mend()
        timers = self._timers
        due = bool(timers) and timers[0][0] <= now
        while timers and timers[0][0] <= now:
            _, what, number = timers[0]
            if what == HANGUP:
                # In the order of an end a rank goes when it owes nothing.
                leaves = self.closing and not self.inflight[number]
                if number not in self.dead and self.broken is None and not leaves:
                    self.break_group(Garbled(number, "it closed its channel but did not exit"))
            else:
                call = self.open.get(number)
                if call is not None:
                    self._due(call, what, now)
            heappop(timers)
        return due

    def _due(self, call: Call, what: int, now: float) -> None:
        if what == BREAK:
            self._grace_is_over(call, now)
        elif call.done:
            if call.dropped or not call.missing():
                self._end(call)
        elif what == SLOW:
            self.slow.append(call)
        elif what == SETTLE:
            self._settle(call)
        else:
            if not isinstance(call.error, Expired):
                call.error = Expired(tuple(call.missing()) if call.begun else call.ranks)
                call.dropped = not call.begun
            if self.explains:
                self._timer(now + EXPLAIN_PAUSE, SETTLE, call.id)
                self.overdue.append(call)
            else:
                self._settle(call)

    def _grace_is_over(self, call: Call, now: float) -> None:
        """Break the group: at once, or when it is known where the ranks are that stay in `call`."""
        failed = call.failure() or call.late_failure
        missing = tuple(call.missing())
        if failed is None or not missing:
            return
        if call.stuck is not None:
            self.break_group(call.stuck)
        elif not self.explains:
            self.break_group(Stuck(call, *failed, missing))
        else:
            self._timer(now + EXPLAIN_PAUSE, BREAK, call.id)
            self.overdue.append(call)
            call.stuck = Stuck(call, *failed, missing)

    def explained(self, call: Call) -> None:
        """What is to be known of the overdue `call` is known: settle it, or break the group."""
        if isinstance(call.error, Expired):
            self._due(call, SETTLE, 0.0)
        if call.stuck is not None and not call.ended:
            self._grace_is_over(call, 0.0)

    def _settle(self, call: Call) -> None:
        self._finish(call)
        if call.dropped or not call.missing():
            self._end(call)

    def next_timer(self) -> float | None:
        """The earliest moment at which `expire` has something to do, or None."""
        timers = self._timers
        while timers and timers[0][1] != HANGUP and timers[0][2] not in self.open:
            heappop(timers)
        return timers[0][0] if timers else None

    def _timer(self, when: float, what: int, number: int) -> None:
        timers = self._timers
        if len(timers) > 64 and len(timers) > 4 * len(self.open):
            # Calls with a timeout of a minute leave their timers behind at 50,000 a second.
            kept = [t for t in timers if t[1] == HANGUP or t[2] in self.open]
            heapify(kept)
            timers[:] = kept
        heappush(timers, (when, what, number))

    # -- ends ---------------------------------------------------------------------------------

    def _finish(self, call: Call) -> None:
        call.done = True  # before the look at `future`: who sets that looks at `done` afterwards
        if call.watchers or call.future is not None:  # no handler strikes in between
            self.settled.append(call)

    def _end(self, call: Call) -> None:
        call.ended = True
        self.open.pop(call.id, None)
        if self._barriers:
            self._settle_barriers(next(iter(self.open), None))

    def _settle_barriers(self, first: int | None) -> None:
        """Settle those that wait for nothing from call `first` on; None: all."""
        for waiting in list(self._barriers):
            if (first is None or first > waiting.id) and not waiting.done:
                self._finish(waiting)
        self._barriers[:] = [waiting for waiting in self._barriers if not waiting.done]

    def end_barriers(self) -> None:
        """Nobody waits for what is open any more."""
        self._settle_barriers(None)

    def owed(self) -> Iterator[tuple[int, Call]]:
        """(rank, the oldest call that it was sent and has not answered), for each such rank."""
        for rank, inflight in enumerate(self.inflight):
            for call in inflight.values():
                yield rank, call
                break
