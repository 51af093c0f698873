"""What counts as lost: looks at a rank that owes an answer, as lists."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise._lookout import Lookout, Sight


def sight(idle=True, finished=False, unheard=0, rank=1, call_id=7):
    return Sight(rank, call_id, "forward", idle, finished, unheard)


def reasons(looks):
    """What each look finds. A look is (served when it began, what it saw, served when it ended)."""
    lookout = Lookout()
    return [[(lost.rank, lost.reason) for lost in lookout.look(*look)] for look in looks]


def found(looks):
    """The number of the look that finds something, or None."""
    return next((at for at, lost in enumerate(reasons(looks)) if lost), None)


def test_a_call_that_an_idle_rank_still_owes_when_all_was_fed_is_lost():
    assert found([(5, [sight()], 5), (7, [sight()], 7)]) == 1


def test_an_answer_that_the_rank_has_written_and_nobody_has_got_is_lost_while_it_runs_others():
    seen = sight(idle=False, finished=True)
    assert found([(5, [seen], 5), (7, [sight(idle=False, finished=True, unheard=90)], 7)]) == 1


def test_one_look_is_never_enough():
    assert found([(5, [sight()], 500)]) is None


def test_what_a_leader_may_still_hold_is_waited_for():
    """It polled before look 1 and may have the answer in hand: its own round does not count."""
    assert found([(5, [sight()], 5), (5, [sight()], 5), (6, [sight()], 6)]) is None
    # A round that ended while look 1 was under way had begun before it.
    assert found([(5, [sight()], 6), (7, [sight()], 7), (8, [sight()], 8)]) == 2


def test_an_answer_that_lies_in_the_drivers_socket_is_not_lost():
    waiting = sight(finished=True, unheard=30)
    assert found([(at, [waiting], at) for at in range(0, 100, 10)]) is None


@pytest.mark.parametrize("unheard", [0, 30])
def test_a_rank_that_neither_sleeps_nor_has_finished_may_still_answer(unheard):
    """It runs, is stopped over an unread call, waits for the interpreter's lock or for memory."""
    busy = sight(idle=False, unheard=unheard)
    assert found([(at, [busy], at) for at in range(0, 100, 10)]) is None


def test_an_answer_between_two_looks_clears_the_suspicion():
    looks = [(5, [sight()], 5), (8, [], 8), (9, [sight()], 9), (10, [sight()], 10)]
    assert found(looks) is None


def test_a_suspicion_is_of_one_call_and_does_not_pass_on_to_the_next():
    calls = [(at, [sight(call_id=at)], at) for at in range(0, 100, 10)]
    assert found(calls) is None


def test_ranks_are_told_apart():
    looks = [
        (0, [sight(rank=0), sight(rank=2, idle=False)], 0),
        (4, [sight(rank=0, call_id=8), sight(rank=2)], 4),
        (8, [sight(rank=2)], 8),
    ]
    assert reasons(looks)[:2] == [[], []]
    assert [rank for rank, _ in reasons(looks)[2]] == [2]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (sight(), "forward() (call 7) was lost: the rank is idle and has read all"),
        (sight(finished=True), "the answer to forward() (call 7) was lost: the rank says that it"),
        (sight(idle=False, finished=True), "is busy with a later one, but no answer has come"),
    ],
)
def test_the_reason_names_the_call_and_what_was_seen(seen, words):
    ((rank, reason),) = reasons([(0, [seen], 0), (2, [seen], 2)])[1]
    assert rank == 1 and words in reason


class Model:
    """One rank and its driver. Every answer is written once, or (`loses`) never.

    rank    unread > read (in hand, page even) > written > finished on its page > asleep
    driver  in its socket > in a leader's hand > fed
    """

    def __init__(self, loses):
        self.loses = loses
        self.call = "unread"
        self.page_finished = self.asleep = False
        self.answer = "not there"
        self.leading = False
        self.served = 0

    def do(self, what):
        match what:
            case "rank":  # its next step
                if self.call == "unread":
                    self.call, self.asleep = "read", False
                elif self.call == "read":
                    self.call = "answered"
                    if not self.loses:
                        self.answer = "here"
                elif not self.page_finished:
                    self.page_finished = True
                else:
                    self.asleep = True
            case "leader":  # its next step: poll and take, then feed
                if not self.leading:
                    self.leading = True
                    if self.answer == "here":
                        self.answer = "held"
                else:
                    self.leading = False
                    self.served += 1
                    if self.answer == "held":
                        self.answer = "fed"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.booleans(),
    st.lists(st.sampled_from(["rank", "leader", "look 1", "look 2", "look 3"]), max_size=60),
)
def test_no_order_of_steps_takes_an_answer_for_lost_that_was_written(loses, steps):
    """A look is not atomic: its readings (served, owed, the page, the socket, served) are apart."""
    model = Model(loses)
    model.asleep = True  # as ranks are before a call
    lookout = Lookout()
    reading = []
    for step in steps:
        if not step.startswith("look"):
            model.do(step)
        elif step == "look 1":
            reading = [model.served]
            reading.append(model.answer != "fed")
        elif step == "look 2" and len(reading) == 2:
            reading.append((model.asleep and model.call != "unread", model.page_finished))
        elif step == "look 3" and len(reading) == 3:
            before, owed, (idle, finished) = reading
            seen = sight(idle, finished, unheard=30 if model.answer == "here" else 0)
            after = model.served
            if lookout.look(before, [seen] if owed else [], after):
                assert loses
            reading = []


def test_whatever_was_lost_is_found_in_three_looks_each_with_a_round_of_a_leader():
    model = Model(loses=True)
    for _ in range(4):
        model.do("rank")
    lookout = Lookout()
    for number in range(3):
        lost = lookout.look(model.served, [sight(True, True)], model.served)
        assert bool(lost) is (number == 2)
        model.do("leader")
        model.do("leader")
