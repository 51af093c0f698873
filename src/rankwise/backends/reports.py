"""What the ranks are doing, asked of the launcher: for `stacks()`, CallTimeout and slow calls.

    any thread   inquire > look, Ask ==> launcher ==Told=> heard > news > RankReports
                 (stacks(), flush(timeout), a start that takes too long)
    the keeper   a deadline, or a grace, is over > overdue > look, Ask ... Told > step
                                                   > Ledger.explained
                 a call is slow        > slow    > look, Ask ... Told > step > the log

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
from rankwise._cpu import CpuUse
from rankwise._deadline import clock
from rankwise._messages import Ask, Told
from rankwise._report import give_reports, look, overdue_ranks
from rankwise._slow import SlowCalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rankwise._calls import Call
    from rankwise._report import RankReport
    from rankwise.backends.local import LocalEngine

    Then = Callable[[dict[int, RankReport] | None], None]

PATIENCE = 0.12  # seconds that the keeper gives the launcher, which gives a rank 0.1
FRESH = 0.1  # seconds for which an answer serves other deadlines too


class Inquiry:
    """One question: what is known of each rank, and for whom the launcher is still to answer."""

    __slots__ = ("number", "reports", "stacks", "waiting")

    def __init__(self, number: int, reports: dict[int, RankReport], stacks: bool) -> None:
        self.number = number
        self.reports = reports
        self.stacks = stacks
        self.waiting = set(reports)

    def hear(self, rank: int, told: Told) -> None:
        self.reports[rank].hear(told)
        self.waiting.discard(rank)

    def end(self, why: str) -> dict[int, RankReport]:
        """Wait no longer. Returns what is known; where there is no answer, `why`."""
        for rank in tuple(self.waiting) if self.stacks else ():
            self.hear(rank, Told(self.number, rank, None, why, ""))
        return self.reports


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

    def inquire(
        self, ranks: tuple[int, ...], patience: float, *, lately: bool
    ) -> dict[int, RankReport]:
        """What each of `ranks` is doing, with its stacks. Waits `patience` seconds at most."""
        link = self._engine.link
        inquiry = self._ask(ranks, stacks=True, lately=self._fresh(ranks) if lately else None)
        try:
            link.wait_for(lambda: not inquiry.waiting or link.gone, clock() + patience)
        finally:
            self._open.pop(inquiry.number, None)
        return inquiry.end(self._silence())

    def _ask(
        self, ranks: tuple[int, ...], *, stacks: bool, lately: Mapping[int, Told] | None = None
    ) -> Inquiry:
        """Ask about `ranks`, but for those of which was told `lately`."""
        inquiry = Inquiry(next(self._numbers), look(self._engine, ranks, self._cpu), stacks)
        for rank, told in (lately or {}).items():
            inquiry.hear(rank, told)
        if inquiry.waiting:
            self._open[inquiry.number] = inquiry
            self._engine.link.send(Ask(inquiry.number, tuple(sorted(inquiry.waiting)), stacks))
        return inquiry

    def _silence(self) -> str:
        return "it has no process" if self._engine.link.gone else "the launcher does not answer"

    # -- the keeper's thread ------------------------------------------------------------------

    def heard(self, told: Told) -> None:
        """The launcher has answered for one rank."""
        inquiry = self._open.get(told.number)
        if inquiry is not None:
            inquiry.hear(told.rank, told)
            if told.stack is not None:
                running = inquiry.reports[told.rank].running
                self._lately[told.rank] = (clock(), running, told)
            if not inquiry.waiting:
                self._open.pop(told.number, None)

    def overdue(self, calls: list[Call]) -> None:
        """The deadlines of `calls` have passed: find out what they wait for, then settle them."""
        ranks = tuple(sorted({rank for call in calls for rank in overdue_ranks(call)}))

        def settle(reports: dict[int, RankReport] | None) -> None:
            with self._engine.pump.lock:
                for call in calls:
                    give_reports(call, reports)
                    self._engine.pump.ledger.explained(call)

        self._begin(ranks, settle, stacks=True, lately=self._fresh(ranks))

    def slow(self, call: Call, limit: float, *, stacks: bool) -> None:
        """`call` takes longer than `limit` seconds: log it, with what it waits for."""
        engine = self._engine

        def say(reports: dict[int, RankReport] | None) -> None:
            if reports is not None and not call.done:
                engine.log(logging.WARNING, "%s", slow_text(call, engine, limit, reports))

        self._begin(tuple(call.missing()), say, stacks=stacks)

    def _begin(
        self,
        ranks: tuple[int, ...],
        then: Then,
        *,
        stacks: bool,
        lately: Mapping[int, Told] | None = None,
    ) -> None:
        try:
            inquiry = self._ask(ranks, stacks=stacks, lately=lately)
        except OSError:  # no descriptors, no memory: a deadline is kept all the same
            self._end(then, None)
        else:
            self._pending.append(_Pending(inquiry, then))

    def _end(self, then: Then, reports: dict[int, RankReport] | None) -> None:
        then(reports)
        self._engine.pump.spread()

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
        for each in list(self._pending):
            if not each.inquiry.waiting or now >= each.until or engine.link.gone:
                self._pending.remove(each)
                self._open.pop(each.inquiry.number, None)
                self._end(each.then, each.inquiry.end(self._silence()))
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
    """An inquiry that the keeper ends, and what is done then with the reports (None: there are
    none)."""

    __slots__ = ("inquiry", "then", "until")

    def __init__(self, inquiry: Inquiry, then: Then) -> None:
        self.inquiry = inquiry
        self.then = then
        self.until = clock() + PATIENCE


_NEVER = (0.0, 0, Told(0, 0, None, None, ""))
