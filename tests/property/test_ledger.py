"""The ledger under any events in any order, and under exceptions in the middle of its methods.

Workers are modelled as lists: what a rank was sent, in order, and how many of these it has
answered. Every answer's body names its call and rank, so an answer that settles another call shows.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from striking import Striker, Struck

from rankwise import _ledger
from rankwise._calls import Broken, Call, Cancelled, Closed, Expired, Garbled, Lost, Stuck
from rankwise._ledger import EXPLAIN_PAUSE, FAILURE_PAUSE, Ledger
from rankwise._messages import ACK, FAILED, OK

WINDOW_CALLS = 3
WINDOW_BYTES = 40
SMALL_BODY = 10

ranks_of_a_group = st.integers(1, 4)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(_ledger, "WINDOW_CALLS", WINDOW_CALLS)
    monkeypatch.setattr(_ledger, "WINDOW_BYTES", WINDOW_BYTES)
    monkeypatch.setattr(_ledger, "SMALL_BODY", SMALL_BODY)


class Machine(RuleBasedStateMachine):
    """Everything that an owner of a ledger may do, in any order."""

    interrupts = False

    @initialize(size=ranks_of_a_group, explains=st.booleans())
    def start(self, size: int, explains: bool) -> None:
        self.size = size
        self.ledger = Ledger(size)
        self.ledger.explains = explains
        self.now = 1000.0
        self.placed: list[Call] = []
        self.barriers: list[tuple[Call, list[Call]]] = []
        self.received: list[list[Call]] = [[] for _ in range(size)]
        self.answered = [0] * size
        self.under_way: list[Call | None] = [None] * size
        self.told: dict[Call, int] = {}
        self.outcomes: dict[Call, Any] = {}
        self.cancelled: set[Call] = set()
        self.gone: set[int] = set()
        self.failed_at: dict[Call, float] = {}
        self.late: dict[Call, float] = {}  # calls whose deadline was seen to have passed, and when
        self.over: dict[Call, float] = {}  # the same of their grace

    # How an event reaches the ledger; the other machine strikes it.
    def event(self, name: str, *args: Any) -> Any:
        return getattr(self.ledger, name)(*args)

    def do_place(self, calls: tuple[Call, ...]) -> bool:
        self.event("place", calls)
        return True

    def do_cancel(self, call: Call) -> bool | None:
        """What `cancel` said; None: it was struck, and nobody asked again."""
        answer: bool = self.event("cancel", call)
        return answer

    # -- events -------------------------------------------------------------------------------

    def alive(self) -> bool:
        return self.ledger.broken is None

    @precondition(lambda self: self.ledger.refusal() is None)
    @rule(data=st.data(), number=st.integers(1, 3))
    def place(self, data: st.DataObject, number: int) -> None:
        calls = tuple(self.any_call(data.draw) for _ in range(number))
        if self.do_place(calls):
            self.placed += calls

    @precondition(lambda self: self.ledger.refusal() is None)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """A call that nothing is in the way of leaves at once, for some of its ranks at least."""
        call = self.any_call(data.draw)
        if data.draw(st.integers(0, 3)):
            call.body, call.deadline, call.slow = b"x", None, None
        begun = self.do_begin(call)
        if begun is None:
            return
        self.placed.append(call)
        if begun:
            for rank in call.ranks:
                assert self.under_way[rank] is None, "in the middle of a frame"
                if data.draw(st.booleans()) and rank not in self.gone:
                    self.received[rank].append(call)
                elif self.alive():
                    self.ledger.queues[rank].append(call)  # its socket has taken nothing
            self.event("all_sent")

    def do_begin(self, call: Call) -> bool | None:
        """Whether `call` is under way to all its ranks; None: nobody has heard of it."""
        if self.event("begin", call):
            return True
        return False if self.do_place((call,)) else None

    def any_call(self, draw: Any) -> Call:
        ranks = tuple(draw(st.lists(st.sampled_from(range(self.size)), min_size=1, unique=True)))
        reply_from = draw(st.none() | st.sampled_from(ranks)) if len(ranks) > 1 else None
        timeout = draw(st.sampled_from((None, None, 0.0, 0.02, 1.0)))
        made = Call(
            "m",
            bytes(draw(st.sampled_from((1, 5, 15, 30, 100)))),
            ranks,
            deadline=None if timeout is None else self.now + timeout,
            slow=draw(st.sampled_from((None, None, (), (self.now + 0.01, 0.01)))),
            reply_from=reply_from,
            return_exceptions=draw(st.booleans()),
            on_error=draw(st.sampled_from(("fail", "continue"))),
            grace=draw(st.sampled_from((0.01, 5.0))),
        )
        made.future = made  # somebody watches it: it has to appear in `settled`
        return made

    @rule(data=st.data(), whole=st.booleans())
    def send(self, data: st.DataObject, whole: bool) -> None:
        rank = data.draw(st.sampled_from(range(self.size)))
        call = self.event("next_to_send", rank)
        before = self.under_way[rank]
        if before is not None and self.alive():
            assert call is before, "a frame that has begun is followed by its own rest"
        if call is None:
            return
        assert rank in call.ranks
        assert call not in self.received[rank], "sent twice"
        assert call not in self.cancelled
        assert not call.dropped
        assert call.begun
        self.under_way[rank] = call
        if whole:
            self.event("sent", rank, call)
            self.under_way[rank] = None
            if rank not in self.gone:
                self.received[rank].append(call)

    def owing(self, rank: int) -> list[Call]:
        return self.received[rank][self.answered[rank] :]

    @rule(data=st.data(), fails=st.booleans())
    def reply(self, data: st.DataObject, fails: bool) -> None:
        able = [r for r in range(self.size) if self.owing(r) and r not in self.gone]
        if able:
            self.answer(data.draw(st.sampled_from(able)), fails)

    def answer(self, rank: int, fails: bool) -> None:
        call = self.owing(rank)[0]
        wanted = call.reply_from is None or call.reply_from == rank
        kind = FAILED if fails else OK if wanted else ACK
        self.answered[rank] += 1
        if fails and not call.ended:
            self.failed_at.setdefault(call, self.now)
        self.event("reply", rank, call.id, kind, body_of(call, rank), self.now)

    @rule(data=st.data(), number=st.integers(0, 10**6))
    def nonsense(self, data: st.DataObject, number: int) -> None:
        """An answer that nobody waits for: a second one, or one to a call that never was."""
        rank = data.draw(st.sampled_from(range(self.size)))
        known = [call.id for call in self.received[rank][: self.answered[rank]]]
        again = bool(known) and number > 10**5
        call_id = data.draw(st.sampled_from(known)) if again else 10**9 + number
        late, alive = self.ledger.late, self.alive()
        self.event("reply", rank, call_id, OK, b"nonsense", self.now)
        assert self.ledger.late > late
        assert self.alive() is (alive and again), "it was never sent: the group breaks"

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.placed))
        done, begun = call.done, call.begun
        answer = self.do_cancel(call)
        if answer is None:
            return
        if done:
            assert answer is isinstance(call.error, Cancelled)
        else:
            assert answer is not begun
        if answer:
            assert call.done
            assert call.ended
            assert isinstance(call.error, Cancelled)
            self.cancelled.add(call)

    @rule(seconds=st.sampled_from((0.0, 0.005, 0.03, FAILURE_PAUSE, 0.5, 6.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.event("expire", self.now)
        timer = self.ledger.next_timer()
        assert timer is None or timer > self.now
        for call in self.placed:
            if call.deadline is not None and call.deadline <= self.now:
                assert call.done or self.ledger.explains, "its deadline has passed"
                assert call.error is not None or call.done, "nothing else can come of it"
                self.late.setdefault(call, self.now)
            if call in self.late and self.late[call] + EXPLAIN_PAUSE <= self.now:
                assert call.done, "whether or not it could be explained"
            failed = self.failed_at.get(call)
            if failed is None or call.return_exceptions or len(call.ranks) == 1:
                continue
            if failed + FAILURE_PAUSE <= self.now:
                assert call.done, "50 ms after the first failure"
            if call.on_error == "fail" and failed + call.grace <= self.now:
                over = self.over.setdefault(call, self.now)
                if not self.ledger.explains or over + EXPLAIN_PAUSE <= self.now:
                    assert call.ended, "the grace is over: the rest have left, or the group broke"
                else:
                    assert call.ended or call.stuck is not None, "it is being explained"

    @rule(number=st.integers(1, 3))
    def explain(self, number: int) -> None:
        """The owner has found out what some overdue calls wait for, or has taken its time."""
        for _ in range(min(number, len(self.ledger.overdue))):
            call = self.ledger.overdue.popleft()
            if call.stuck is not None:
                assert call.stuck.missing and self.over[call] <= self.now
                self.event("explained", call)
                assert call.ended, "the rest have left it, or the group broke"
                continue
            assert call.deadline is not None and call.deadline <= self.now
            self.event("explained", call)
            assert call.done or self.interrupts
            if not self.interrupts and self.alive() and not call.begun:
                assert call.ended

    @rule()
    def take_slow(self) -> None:
        while self.ledger.slow:
            call = self.ledger.slow.popleft()
            assert call.slow and call.slow[0] <= self.now

    @rule(data=st.data())
    def hangup(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(range(self.size)))
        self.gone.add(rank)  # nothing is read from it any more
        self.event("hangup", rank, self.now)

    @rule(data=st.data(), rarely=st.integers(0, 3))
    def die(self, data: st.DataObject, rarely: int) -> None:
        if rarely:
            return
        rank = data.draw(st.sampled_from(range(self.size)))
        self.gone.add(rank)
        owed = bool(self.ledger.inflight[rank]) or any(
            rank in call.missing() and not call.ended for call in self.placed
        )
        closing = self.ledger.closing
        self.event("died", rank, None)
        assert rank in self.ledger.dead
        assert not self.alive() or (closing and not owed)

    @rule(rarely=st.integers(0, 5))
    def break_group(self, rarely: int) -> None:
        if not rarely:
            self.event("break_group", Garbled(0, "test"))
            assert not self.alive()

    @rule(rarely=st.integers(0, 5), drop=st.booleans())
    def close(self, rarely: int, drop: bool) -> None:
        if rarely:
            return
        self.ledger.closing = True
        assert self.ledger.refusal() is not None
        if drop:
            self.event("drop_queued", Closed())
            for call in self.placed:
                if not call.begun:
                    assert call.done

    @rule()
    def barrier(self) -> None:
        call = Call("flush", b"", ())
        call.future = call
        before = [other for other in self.placed if not other.ended]
        self.event("barrier", call)
        if call.done:
            assert not before
        else:
            self.barriers.append((call, before))

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def each_rank_gets_its_calls_in_order_and_once(self) -> None:
        if not self.placed:
            return
        for rank, received in enumerate(self.received):
            ids = [call.id for call in received]
            assert ids == sorted(set(ids))
            due = [call for call in self.placed if rank in call.ranks and not call.dropped]
            assert received == due[: len(received)], "none is left out"
            assert not self.cancelled.intersection(received)

    @invariant()
    def the_window_is_kept(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for inflight in self.ledger.inflight:
            assert len(inflight) <= WINDOW_CALLS
            sizes = [len(call.body) for call in inflight.values()]
            if any(size > SMALL_BODY for size in sizes[1:]):
                assert sum(sizes) <= WINDOW_BYTES + SMALL_BODY * WINDOW_CALLS

    @invariant()
    def a_call_is_settled_once_and_for_all(self) -> None:
        if not hasattr(self, "ledger"):
            return
        while self.ledger.settled:
            call = self.ledger.settled.popleft()
            self.told[call] = self.told.get(call, 0) + 1
            assert self.interrupts or self.told[call] == 1
        for call in self.placed:
            assert call.done or call not in self.told or self.interrupts
            if call.ended and not self.interrupts:
                assert call.done
            if not call.done:
                continue
            assert call in self.told, "who watches it is told"
            outcome = self.outcome(call)
            assert self.outcomes.setdefault(call, outcome) == outcome, "its outcome has changed"

    def outcome(self, call: Call) -> Any:
        """What its caller gets, as `_answers.take` reads it."""
        if call.error is not None:
            return call.error
        answers = call.answers
        failed = {rank for rank, (kind, _) in answers.items() if kind == FAILED}
        if failed and not call.return_exceptions:
            return "failed"
        read = call.ranks
        if call.reply_from is not None and call.reply_from in answers:
            read = (call.reply_from,)
        for rank in read:
            assert answers[rank][1] == body_of(call, rank), "the answer to another call"
        return "values"

    @invariant()
    def nothing_is_open_in_a_broken_group(self) -> None:
        if not self.placed or self.alive():
            return
        assert all(call.done and call.ended for call in self.placed)
        assert not self.ledger.open
        assert not any(self.ledger.queues)

    @invariant()
    def a_barrier_is_settled_when_all_before_it_have_ended(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for call, before in self.barriers:
            assert call.done is all(other.ended for other in before)

    # -- the end ------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Every rank answers or dies: then every call has been settled."""
        if not hasattr(self, "ledger"):
            return
        self.ledger.explains = False
        for call in self.ledger.overdue:
            self.event("explained", call)
        for _ in range(10 * len(self.placed) + 10):
            for rank in range(self.size):
                if rank in self.gone:
                    if rank not in self.ledger.dead:
                        self.event("died", rank, None)
                    continue
                call = self.event("next_to_send", rank)
                if call is not None:
                    self.event("sent", rank, call)
                    self.under_way[rank] = None
                    self.received[rank].append(call)
                if self.owing(rank):
                    self.answer(rank, False)
        self.a_call_is_settled_once_and_for_all()
        self.each_rank_gets_its_calls_in_order_and_once()
        assert all(call.done and call.ended for call in self.placed), "somebody waits for ever"
        assert not self.ledger.open
        assert all(call.done for call, _ in self.barriers)
        assert not any(self.ledger.inflight)
        if self.alive():
            for rank, received in enumerate(self.received):
                assert received == [
                    call for call in self.placed if rank in call.ranks and not call.dropped
                ], "a call runs on every rank or on none"
        for call in self.placed:
            if call.error is not None:
                assert isinstance(call.error, (Expired, Lost, Broken, Closed, Cancelled))
        if isinstance(self.ledger.broken, Stuck):
            stuck = self.ledger.broken
            assert stuck.missing
            assert stuck.body == body_of(stuck.call, stuck.failed)
        self.now += 1000
        self.event("expire", self.now)
        assert self.ledger.next_timer() is None


def body_of(call: Call, rank: int) -> bytes:
    return b"%d of %d" % (call.id, rank)


SETTINGS = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_ledger_keeps_its_promises_in_any_order_of_events():
    run_state_machine_as_test(Machine, settings=SETTINGS)


# -- the same, struck by exceptions ---------------------------------------------------------------


class StruckMachine(Machine):
    """Each event may be struck. Its owner then calls it again, as the ledger's docstring allows."""

    interrupts = True

    countdown = 0

    @rule(countdown=st.integers(1, 40))
    def strike_soon(self, countdown: int) -> None:
        self.countdown = countdown

    def struck(self, name: str, *args: Any) -> Any:
        striker = Striker(self.countdown, _ledger)
        self.countdown = 0
        return striker.run(getattr(self.ledger, name), *args)

    def event(self, name: str, *args: Any) -> Any:
        try:
            return self.struck(name, *args)
        except Struck:
            return getattr(self.ledger, name)(*args)

    def do_place(self, calls: tuple[Call, ...]) -> bool:
        """Nobody places the calls again: they have their place, or nobody has heard of them."""
        try:
            self.struck("place", calls)
        except Struck:
            self.ledger.mend()
            known = [call.id in self.ledger.open for call in calls]
            assert known in ([True] * len(calls), [False] * len(calls)), "all of them or none"
            if not known[0]:
                return False
        return True

    def do_begin(self, call: Call) -> bool | None:
        """Nobody begins it again: it has its place, or nobody has heard of it."""
        try:
            if self.struck("begin", call):
                return True
        except Struck:
            self.ledger.mend()
            return False if call.id in self.ledger.open else None
        return False if self.do_place((call,)) else None

    def do_cancel(self, call: Call) -> bool | None:
        """Whoever was struck in `cancel` may never ask again: the call runs, or is settled."""
        try:
            answer: bool = self.struck("cancel", call)
        except Struck:
            self.ledger.mend()
            if call.error is not None and isinstance(call.error, Cancelled):
                self.cancelled.add(call)
            return None
        return answer


def test_the_ledger_keeps_its_promises_when_struck_by_exceptions():
    run_state_machine_as_test(StruckMachine, settings=SETTINGS)


# -- struck at every single point of one event ----------------------------------------------------


def scenario() -> tuple[Ledger, list[Call]]:
    """Two ranks, the window of each nearly full: something is sent, something begun, one queued."""
    ledger = Ledger(2)
    calls = [
        Call("m", b"x", (0, 1), deadline=50.0 + n, on_error="fail", grace=5.0) for n in range(4)
    ]
    calls.append(Call("m", b"x", (1,), deadline=70.0))
    for call in calls:
        call.future = call
        ledger.place((call,))
    for rank in (0, 1):
        for _ in range(2):
            first = ledger.next_to_send(rank)
            assert first is not None
            ledger.sent(rank, first)
    ledger.next_to_send(0)  # a part of it has left
    return ledger, calls


def answer_all(ledger: Ledger) -> None:
    """Both ranks take and answer everything that they are owed or still get."""
    for _ in range(20):
        for rank in (0, 1):
            call = ledger.next_to_send(rank)
            if call is not None:
                ledger.sent(rank, call)
            for owed in list(ledger.inflight[rank].values()):
                ledger.reply(rank, owed.id, OK, body_of(owed, rank), 10.0)


def new_calls() -> tuple[Call, ...]:
    made = tuple(Call("m", b"x", (0, 1), deadline=80.0) for _ in range(2))
    for call in made:
        call.future = call
    return made


def explain(ledger: Ledger) -> None:
    """Deadlines pass, and their owner finds out what the calls wait for."""
    ledger.explains = True
    ledger.expire(60.0)
    for call in list(ledger.overdue):
        ledger.explained(call)


# What is struck, and whether its owner comes again with the same event: a frame that was not
# consumed, a timer that is still due. A caller that was struck need not.
EVENTS: dict[str, tuple[Any, bool]] = {
    "place": (lambda ledger, calls: ledger.place(new_calls()), False),
    "barrier": (lambda ledger, calls: ledger.barrier(Call("flush", b"", ())), False),
    "cancel what is queued": (lambda ledger, calls: ledger.cancel(calls[3]), False),
    "cancel what has begun": (lambda ledger, calls: ledger.cancel(calls[2]), False),
    "drop_queued": (lambda ledger, calls: ledger.drop_queued(Closed()), False),
    "next_to_send": (lambda ledger, calls: ledger.next_to_send(1), True),
    "sent": (lambda ledger, calls: ledger.sent(0, calls[2]), True),
    "reply": (lambda ledger, calls: ledger.reply(0, 1, OK, b"1 of 0", 10.0), True),
    "failing reply": (lambda ledger, calls: ledger.reply(0, 1, FAILED, b"1 of 0", 10.0), True),
    "expire": (lambda ledger, calls: ledger.expire(60.0), True),
    "explained": (lambda ledger, calls: explain(ledger), True),
    "died": (lambda ledger, calls: ledger.died(0, None), True),
    "hangup": (lambda ledger, calls: ledger.hangup(0, 10.0), True),
    "break_group": (lambda ledger, calls: ledger.break_group(Garbled(0, "test")), True),
}


@pytest.mark.parametrize("name", EVENTS)
def test_struck_at_any_point_of_an_event_nobody_waits_for_ever(name):
    event, again = EVENTS[name]
    for point in range(1, 1000):
        ledger, calls = scenario()
        if point == 1:
            # Python 3.13 traces the opcodes of a function from its second call on.
            Striker(1 << 30, _ledger).run(event, *scenario())
        striker = Striker(point, _ledger)
        try:
            striker.run(event, ledger, calls)
        except Struck:
            if again:
                event(ledger, calls)
        ledger.mend()
        answer_all(ledger)
        flush = Call("flush", b"", ())
        ledger.barrier(flush)
        where = f"struck at point {point}"
        assert all(call.done and call.ended for call in calls), where
        assert flush.done, where
        assert not ledger.open, where
        for call in calls:
            assert call in ledger.settled, where
            if call.error is None:
                for rank, (kind, body) in call.answers.items():
                    assert body in (body_of(call, rank), b""), where
                    assert kind in (OK, FAILED), where
        if striker.countdown > 0:
            # Python 3.13 leaves out opcodes of functions that it has not traced before.
            assert point > 1 or sys.version_info >= (3, 13), "it was never struck"
            return
    raise AssertionError("the event does not end")
