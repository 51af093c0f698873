"""docs/protocol.md is the ledger: it makes each transition that the page names, and no other.

A transition is what one event does to one call, flush, rank or group: (from, event, to). The tables
that are read are those whose second column is *event of the ledger*.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from test_ledger import SETTINGS, Machine, body_of, ranks_of_a_group
from test_ledger import small_windows as small_windows

from rankwise._calls import Call, Closed, Expired, Garbled
from rankwise._ledger import EXPLAIN_PAUSE, FAILURE_PAUSE, HANGUP_PAUSE, Ledger
from rankwise._messages import FAILED, OK

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
SUBJECTS = ("call", "flush", "rank", "group")

Transition = tuple[str, str, str, str]  # of what, from, event, to


def named() -> set[Transition]:
    """The page's transitions; broken goes with each cause that its row has in backquotes."""
    found: list[Transition] = []
    subject = ""
    reading = False
    for line in PAGE.splitlines():
        if line.startswith("#"):
            subject = line.split()[-1]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            reading = False
        elif cells[1] == "event of the ledger":
            reading = True
            assert subject in SUBJECTS, f"a table of what is no {SUBJECTS}: {subject}"
        elif reading and not line.startswith("|-"):
            before, events, after, text = cells
            ends = after.split(", ")
            if after == "broken":
                ends = [f"broken: {cause}" for cause in re.findall(r"`([A-Z]\w+)`:", text)]
            events_named = re.findall(r"`(\w+)`", events)
            found += product([subject], before.split(", "), events_named, ends)
    assert len(found) == len(set(found)), "named twice"
    return set(found)


NAMED = named()


def state_of_call(call: Call) -> str:
    if not call.id:
        return "new"
    if call.ended:
        assert call.done
        return "ended"
    if call.done:
        return "settled"
    if isinstance(call.error, Expired):
        return "overdue"
    return "begun" if call.begun else "placed"


def states(ledger: Ledger, calls: list[Call], flushes: list[Call]) -> dict[object, tuple[str, str]]:
    """What there is, and the state that each is in."""
    found: dict[object, tuple[str, str]] = {call: ("call", state_of_call(call)) for call in calls}
    for flush in flushes:
        waits = flush in ledger._barriers
        found[flush] = "flush", "settled" if flush.done else "waiting" if waits else "new"
    for rank in range(ledger.world_size):
        dead, hung = rank in ledger.dead, rank in ledger.hung
        found[rank] = "rank", "dead" if dead else "hung up" if hung else "heard"
    found["group"] = "group", "closing" if ledger.closing else "open"
    if ledger.broken is not None:
        found["group"] = "group", f"broken: {type(ledger.broken).__name__}"
    return found


class Watch:
    """A ledger's events, each of which makes only transitions that the page names."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.calls: list[Call] = []
        self.flushes: list[Call] = []
        self.made: set[Transition] = set()
        self._cause: object = None

    def event(self, name: str, *args: Any) -> Any:
        ledger = self.ledger
        for arg in args:
            if isinstance(arg, Call) and not arg.id:
                (self.flushes if name == "barrier" else self.calls).append(arg)
            elif name == "place":
                self.calls += arg
        before = states(ledger, self.calls, self.flushes)
        if name == "closing":
            ledger.closing = True
            value = None
        else:
            value = getattr(ledger, name)(*args)
        breaks = ledger.broken is not None and not before["group"][1].startswith("broken")
        for each, (subject, after) in states(ledger, self.calls, self.flushes).items():
            if before[each][1] != after:
                event = "break_group" if breaks and subject in ("call", "flush") else name
                made = subject, before[each][1], event, after
                assert made in NAMED, f"the page does not name it: {made}"
                self.made.add(made)
        assert self._cause in (None, ledger.broken), "the first cause is the one that stays"
        self._cause = ledger.broken
        return value


# -- no other -------------------------------------------------------------------------------------


class WatchedMachine(Machine):
    @initialize(size=ranks_of_a_group)
    def start(self, size: int) -> None:
        Machine.start(self, size, True)  # both backends explain
        self.watch = Watch(self.ledger)

    def event(self, name: str, *args: Any) -> Any:
        return self.watch.event(name, *args)

    @precondition(lambda self: self.placed)
    @rule(rarely=st.integers(0, 7))
    def exit(self, rarely: int) -> None:
        if not rarely:
            self.event("exit")
            self.barriers.clear()


def test_no_order_of_events_makes_a_transition_that_the_page_does_not_name() -> None:
    run_state_machine_as_test(WatchedMachine, settings=settings(SETTINGS, max_examples=200))


# -- each of them ---------------------------------------------------------------------------------


class Story(Watch):
    """Two ranks, and what happens to their calls, in few words. It is told at second `now`."""

    def __init__(self) -> None:
        super().__init__(Ledger(2))
        self.ledger.explains = True
        self.now = 0.0

    def call(self, *, send: bool = False, ranks: tuple[int, ...] = (0, 1), **options: Any) -> Call:
        call = Call("m", b"x", ranks, on_error="fail", grace=5.0, **options)
        self.event("place", (call,))
        if send:
            for rank in ranks:
                assert self.event("next_to_send", rank) is call
                self.event("sent", rank, call)
        return call

    def reply(self, call: Call, rank: int, kind: int = OK) -> None:
        self.event("reply", rank, call.id, kind, body_of(call, rank), self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.event("expire", self.now)

    def overdue(self, *, send: bool) -> Call:
        call = self.call(send=send, deadline=self.now + 1.0)
        self.wait(1.0)
        return call

    def fail(self) -> Call:
        """One rank has failed, the other stays in the call, and the grace is over."""
        call = self.call(send=True)
        self.reply(call, 0, FAILED)
        self.wait(5.0)
        return call

    def flush(self) -> None:
        self.event("barrier", Call("flush", b"", ()))


def tell_of_answers(story: Story) -> None:
    story.flush()
    begun = Call("m", b"x", (0, 1), reply_from=0)
    assert story.event("begin", begun)
    story.event("all_sent")
    story.flush()
    story.reply(begun, 0)
    story.reply(begun, 1)
    both = story.call(send=True)
    story.reply(both, 0)
    story.reply(both, 1)
    story.reply(story.call(send=True), 0, FAILED)
    story.wait(FAILURE_PAUSE)


def tell_of_time(story: Story) -> None:
    for send in (False, True):
        story.event("explained", story.overdue(send=send))
        story.overdue(send=send)
        story.wait(EXPLAIN_PAUSE)
    story = other(story)  # where nothing else is open that a flush would wait for
    story.overdue(send=False)
    story.flush()
    story.wait(EXPLAIN_PAUSE)
    late = story.overdue(send=False)
    story.flush()
    story.event("explained", late)


def tell_of_wishes(story: Story) -> None:
    for make in (story.call, lambda: story.overdue(send=False)):
        story.flush()
        call = make()
        story.flush()
        story.event("cancel", call)
        make()
        story.flush()
        story.event("drop_queued", Garbled(0, "test"))
    story.call(send=True)
    story.flush()
    story.event("end_barriers")


def tell_of_an_exit(story: Story) -> None:
    story.call(send=True)
    for send in (True, False):
        story.call(send=send, deadline=1.0)
    story.wait(1.0)
    story.call()
    story.flush()
    story.event("exit")


def tell_of_a_break(story: Story) -> None:
    settled = story.call(send=True, reply_from=0)
    story.reply(settled, 0)
    story.call(send=True)
    story.overdue(send=False)
    story.call()
    story.flush()
    story.event("break_group", Garbled(0, "test"))
    other(story).event("break_group", Closed())


def tell_of_deaths(story: Story) -> None:
    story.call(send=True)
    story.event("hangup", 0, story.now)
    story.event("died", 0, None)
    story.event("died", 1, None)


def tell_of_nonsense(story: Story) -> None:
    story.event("reply", 0, 77, OK, b"", story.now)
    story = other(story)
    story.call(send=True)
    story.event("hangup", 0, story.now)
    story.wait(HANGUP_PAUSE)


def tell_of_a_stuck_rank(story: Story) -> None:
    story.event("explained", story.fail())
    story = other(story)
    story.fail()
    story.wait(EXPLAIN_PAUSE)


def other(story: Story) -> Story:
    """Another group in the same story."""
    fresh = Story()
    fresh.made = story.made
    if story.ledger.closing:
        fresh.event("closing")
    return fresh


TOLD = [value for name, value in list(globals().items()) if name.startswith("tell_of")]


def stories(closing: bool) -> set[Transition]:
    made: set[Transition] = set()
    for tell in TOLD:
        story = Story()
        story.made = made
        if closing:
            story.event("closing")
        tell(story)
    return made


def test_each_transition_that_the_page_names_is_made_by_its_event() -> None:
    assert len(NAMED) > 40
    assert {each[0] for each in NAMED} == set(SUBJECTS)
    assert set(NAMED) - stories(False) - stories(True) == set()
