"""Faults that ranks can have as processes and as threads; and what threads cannot have."""

from __future__ import annotations

import pytest
from contract_worker import Worker

from rankwise import CallTimeout, StartupError, WorkerGroup
from rankwise.testing import Refused, delay, drop, faults, hold_gil, kill, refuse


@pytest.mark.parametrize("at", ["receive", "run", "reply"])
def test_a_rank_refuses_its_second_call_and_lives_on(make, at):
    with faults(refuse(1, at=at, call=2)):
        group = make()
    assert group.call(Worker.get_rank) == [0, 1]
    with pytest.raises(Refused, match=f"rank 1 refuses at '{at}'"):
        group.call(Worker.get_rank)
    assert group.call(Worker.get_rank) == [0, 1]


@pytest.mark.parametrize("at", ["import", "construct"])
def test_a_rank_refuses_to_start(make, at):
    with faults(refuse(1, at=at)), pytest.raises(StartupError) as caught:
        make()
    assert (caught.value.rank, caught.value.phase) == (1, at)


def test_an_answer_that_was_dropped_is_missing_at_the_timeout(make, monkeypatch):
    monkeypatch.setattr("rankwise._keeper.TICK", 30.0)  # nobody finds out before that it is lost
    with faults(drop(1, call=2)):
        group = make()
    group.call(Worker.get_rank)
    with pytest.raises(CallTimeout) as caught:
        group.options(timeout=1.0).call(Worker.get_rank)
    assert (caught.value.answered, caught.value.missing) == ((0,), (1,))


def test_a_delayed_answer_comes(make):
    with faults(delay(0, 0.1, at="reply", call=1)):
        group = make()
    assert group.call(Worker.get_rank) == [0, 1]


@pytest.mark.parametrize("fault", [kill(0), hold_gil(0, 1), delay(0, 1, at="spawn")], ids=repr)
def test_threads_cannot_be_killed(fault):
    with faults(fault), pytest.raises(ValueError, match="threads of the driver"):
        WorkerGroup(Worker, 1, backend="inline")
