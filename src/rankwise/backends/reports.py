"""What the ranks are doing, asked of the launcher: for `stacks()`, CallTimeout and slow calls.

    any thread   inquire > Ask ==> launcher ==Told=> heard > news > look > RankReports
    the keeper   a deadline has passed > overdue > Ask ... Told > step > Ledger.explained
                 a call is slow        > slow    > Ask ... Told > step > the log

The keeper never waits: an open inquiry is a line in `_pending`, looked at in `step`, and ended by
its last Told or by the clock. A launcher that does not answer (stopped, or busy with an import)
costs a deadline 120 ms, no more.

No rank is asked for a stack more than ten times a second on behalf of deadlines, however short the
timeouts of a program that polls: what was told so lately, in the same call, is told again.
"""

from __future__ import annotations

import logging
from itertools import count

from rankwise._answers import slow_text
from rankwise._calls import Expired
from rankwise._cpu import CpuUse
from rankwise._deadline import clock
from rankwise._messages import Ask, Told
from rankwise._report import look
from rankwise._slow import SlowCalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._calls import Call
    from rankwise._report import RankReport
    from rankwise.backends.local import LocalEngine

PATIENCE = 0.12  # seconds that the keeper gives the launcher, which gives a rank 0.1
FRESH = 0.1  # seconds for which an answer serves other deadlines too
_LOST = "the launcher does not answer"


class Inquiry:
    """One question to the launcher: who has not answered yet, and the answers."""

    __slots__ = ("number", "told", "waiting")

    def __init__(self, number: int, ranks: tuple[int, ...]) -> None:
        self.number = number
        self.waiting = set(ranks)
        self.told: dict[int, Told] = {}


class Reports:
    """The questions of one group."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._numbers = count(1)
        self._open: dict[int, Inquiry] = {}
        self._pending: list[_Pending] = []
        self._lately: dict[int, tuple[float, int, Told]] = {}  # rank -> when, in which call, what
        self._slow = SlowCalls()
        self._cpu = CpuUse()

    # -- any thread ---------------------------------------------------------------------------

    def inquire(self, ranks: tuple[int, ...], patience: float) -> dict[int, RankReport]:
        """What each of `ranks` is doing, with its stacks. Waits `patience` seconds at most."""
        engine = self._engine
        inquiry = self._ask(ranks, stacks=True)
        try:
            engine.link.wait_for(
                lambda: not inquiry.waiting or engine.link.gone, clock() + patience
            )
        finally:
            self._open.pop(inquiry.number, None)
        return self._look(inquiry, ranks, stacks=True)

    def _ask(self, ranks: tuple[int, ...], *, stacks: bool) -> Inquiry:
        inquiry = Inquiry(next(self._numbers), ranks)
        if inquiry.waiting:
            self._open[inquiry.number] = inquiry
            self._engine.link.send(Ask(inquiry.number, ranks, stacks))
        return inquiry

    def _look(
        self, inquiry: Inquiry, ranks: tuple[int, ...], *, stacks: bool
    ) -> dict[int, RankReport]:
        told = dict(inquiry.told)
        if stacks:
            for rank in ranks:
                if rank not in told:
                    why = "it has no process" if self._engine.link.gone else _LOST
                    told[rank] = Told(inquiry.number, rank, None, why, "")
        return look(self._engine, ranks, told, self._cpu)

    # -- the keeper's thread ------------------------------------------------------------------

    def heard(self, told: Told) -> None:
        """The launcher has answered for one rank."""
        if told.stack is not None:
            running = self._engine.ranks.running(told.rank)
            self._lately[told.rank] = (clock(), running, told)
        inquiry = self._open.get(told.number)
        if inquiry is not None:
            inquiry.told[told.rank] = told
            inquiry.waiting.discard(told.rank)
            if not inquiry.waiting:
                self._open.pop(told.number, None)

    def overdue(self, calls: list[Call]) -> None:
        """The deadlines of `calls` have passed: find out what they wait for, then settle them."""
        ranks = tuple(sorted({rank for call in calls for rank in call.missing()}))
        fresh = self._fresh(ranks)
        inquiry = self._ask(tuple(rank for rank in ranks if rank not in fresh), stacks=True)
        inquiry.told.update(fresh)

        def settle(reports: dict[int, RankReport] | None) -> None:
            with self._engine.pump.lock:
                for call in calls:
                    if isinstance(call.error, Expired):
                        call.error.reports = reports
                    self._engine.pump.ledger.explained(call)

        self._pending.append(_Pending(inquiry, ranks, settle, stacks=True))

    def slow(self, call: Call, limit: float, *, stacks: bool) -> None:
        """`call` takes longer than `limit` seconds: log it, with what it waits for."""
        engine = self._engine
        ranks = tuple(call.missing())

        def say(reports: dict[int, RankReport] | None) -> None:
            if reports is not None and not call.done:
                engine.log(logging.WARNING, "%s", slow_text(call, engine, limit, reports))

        self._pending.append(_Pending(self._ask(ranks, stacks=stacks), ranks, say, stacks=stacks))

    def step(self, now: float) -> float | None:
        """Begin what is due and end what can be ended. Returns when something is due, or None."""
        engine = self._engine
        ledger = engine.pump.ledger
        if ledger.overdue or ledger.slow:
            with engine.pump.lock:
                overdue, slow = list(ledger.overdue), list(ledger.slow)
                ledger.overdue.clear()
                ledger.slow.clear()
            if overdue:
                self.overdue(overdue)
            for call in slow:
                if call.slow:
                    self.slow(call, call.slow[1], stacks=True)
            engine.link.flush()
        if not self._pending:
            return None
        pending, self._pending = self._pending, []
        for each in pending:
            if each.inquiry.waiting and now < each.until and not engine.link.gone:
                self._pending.append(each)
                continue
            self._open.pop(each.inquiry.number, None)
            try:
                reports = self._look(each.inquiry, each.ranks, stacks=each.stacks)
            except OSError:  # no descriptors, no memory: a deadline is kept all the same
                reports = None
            each.then(reports)
        engine.pump.spread()
        return min((each.until for each in self._pending), default=None)

    def tick(self, now: float, owed: list[tuple[int, Call]]) -> None:
        """One of the keeper's looks at what is owed: how busy the ranks are, and what is slow."""
        ranks = self._engine.ranks
        for rank, _ in owed:
            self._cpu.sample(ranks.pid(rank), now)
        if not self._engine.starting:
            for call, limit in self._slow.look((call for _, call in owed), now):
                self.slow(call, limit, stacks=False)

    def _fresh(self, ranks: tuple[int, ...]) -> dict[int, Told]:
        """What was told of `ranks` lately, in the call that they are in, and serves again."""
        since = clock() - FRESH
        return {
            rank: told
            for rank in ranks
            for when, running, told in [self._lately.get(rank, _NEVER)]
            if when > since and running == self._engine.ranks.running(rank)
        }


class _Pending:
    """An inquiry that the keeper ends: `then` gets the reports, or None where there are none."""

    __slots__ = ("inquiry", "ranks", "stacks", "then", "until")

    def __init__(
        self,
        inquiry: Inquiry,
        ranks: tuple[int, ...],
        then: Callable[[dict[int, RankReport] | None], None],
        *,
        stacks: bool,
    ) -> None:
        self.inquiry = inquiry
        self.ranks = ranks
        self.then = then
        self.stacks = stacks
        self.until = clock() + PATIENCE


_NEVER = (0.0, 0, Told(0, 0, None, None, ""))
