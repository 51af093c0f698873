"""A deadline settles the call, patience leaves it open; no call ever gets another's answer."""

from __future__ import annotations

import re

import pytest
from contract_worker import Worker
from untold import explained

from rankwise import CallTimeout, WorkerGroupError


def test_a_deadline_settles_the_future_with_a_call_timeout(group, gate):
    futures = []

    def attempt():
        futures.append(group.options(timeout=1.0).submit(Worker.pass_gate, gate.path))
        gate.entered(0, 1, 2)
        futures[-1].result(timeout=10)

    error = explained(attempt, again=lambda: (gate.open(0, 1, 2), group.flush()))
    assert isinstance(error, TimeoutError)
    assert isinstance(error, WorkerGroupError)
    assert "() has 0 of 3 answers after 1.0 s" in str(error)
    assert futures[-1].done()
    assert (error.method, error.answered, error.missing) == ("pass_gate", (), (0, 1, 2))
    assert error.states == {0: "running", 1: "running", 2: "running"}
    assert all(0 < error.seconds[rank] < 60 for rank in range(3))
    assert all("in pass_gate" in error.stacks[rank] for rank in range(3))
    assert error.reasons == {}
    gate.open(0, 1, 2)
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_deadline_ends_a_blocking_call_by_itself(group, gate):
    with pytest.raises(CallTimeout, match=r"\(\) has \d of \d answers after 0\.\d+ s"):
        group[0].options(timeout=0.1).call(Worker.pass_gate, gate.path)
    gate.open(0)
    assert group[0].call(Worker.get_rank) == 0


def test_the_message_says_who_has_not_answered_and_what_he_does(group, gate):
    def attempt():
        future = group.options(timeout=1.5).submit(Worker.pass_gate, gate.path)
        gate.entered(0, 1, 2)
        gate.open(0)
        future.result(timeout=10)

    error = explained(attempt, again=lambda: (gate.open(1, 2), group.flush()))
    lines = str(error).splitlines()
    assert lines[0] == (
        "pass_gate() has 1 of 3 answers after 1.5 s; waiting for ranks 1, 2 of workers"
    )
    for line, rank in zip(lines[1:], (1, 2), strict=True):
        assert re.match(
            rf"  rank {rank}: pid {group.pids[rank]}, running pass_gate\(\) for [0-9.]+ s, "
            r"in contract_worker\.py:\d+ pass_gate",
            line,
        )
    assert error.answered == (0,)
    gate.open(1, 2)


def test_a_call_that_no_rank_has_begun_is_queued(group, gate):
    group[0].submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    future = group[0].options(timeout=0.05).submit(Worker.note, "late")
    with pytest.raises(CallTimeout, match=r"\(\) has \d of \d answers after 0\.\d+ s") as caught:
        future.result(timeout=10)
    assert "queued behind pass_gate(), running for " in str(caught.value)
    assert caught.value.states == {0: "queued"}
    assert caught.value.seconds == {0: 0.0}
    gate.open(0)
    group[0].call(Worker.take_seen)


def test_patience_raises_and_leaves_the_future_open(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    with pytest.raises(CallTimeout) as caught:
        future.result(timeout=0.05)
    said = "result(0.05) has waited its 0.05 s, and the call goes on; waiting for ranks 0, 1, 2"
    assert f"has 0 of 3 answers: {said}" in str(caught.value)
    assert caught.value.stacks == {0: None, 1: None, 2: None}, "patience interrupts no worker"
    assert caught.value.missing == (0, 1, 2)
    with pytest.raises(CallTimeout, match=r"exception\(0\) has waited no longer"):
        future.exception(timeout=0)
    assert not future.done()
    assert future.running()
    gate.open(0, 1, 2)
    assert future.result() == [0, 1, 2]


def test_negative_patience_is_none_at_all(group, gate):
    future = group[0].submit(Worker.pass_gate, gate.path)
    with pytest.raises(CallTimeout):
        future.result(timeout=-1)
    gate.open(0)
    assert future.result() == 0


def test_a_late_answer_reaches_no_other_call(group, gate):
    late = group.options(timeout=0.05).submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    with pytest.raises(CallTimeout, match=r"\(\) has \d of \d answers after 0\.\d+ s"):
        late.result(timeout=10)
    others = [group.submit(Worker.add, number, 0) for number in range(100, 150)]
    gate.open(0, 1, 2)
    for number, future in enumerate(others, 100):
        assert future.result() == [number, number + 1, number + 2]
    with pytest.raises(CallTimeout):
        late.result()


def test_a_deadline_that_has_passed_when_it_is_submitted(group, gate):
    group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    for timeout in (0, -5):
        with pytest.raises(CallTimeout):
            group.options(timeout=timeout).call(Worker.get_rank)
    gate.open(0, 1, 2)
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_timeout_that_is_not_reached_changes_nothing(group):
    assert group.options(timeout=60).call(Worker.get_rank) == [0, 1, 2]
    assert group.options(timeout=float("inf")).call(Worker.get_rank) == [0, 1, 2]
    assert group.options(timeout=None).submit(Worker.get_rank).result(float("inf")) == [0, 1, 2]


def test_submit_each_has_a_deadline_for_each(group, gate):
    futures = group.options(timeout=1.5).submit_each(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    gate.open(1)
    with pytest.raises(CallTimeout, match="waiting for rank 0"):
        futures[0].result(timeout=10)
    assert futures[1].result() == 1
    gate.open(0, 2)


def test_return_exceptions_does_not_swallow_the_deadline(group, gate):
    view = group.options(timeout=0.05, return_exceptions=True)
    with pytest.raises(CallTimeout, match=r"\(\) has \d of \d answers after 0\.\d+ s"):
        view.submit(Worker.pass_gate, gate.path).result(timeout=10)
    gate.open(0, 1, 2)


@pytest.mark.parametrize("timeout", ["1", True, [1]])
def test_wrong_patience_names_the_argument(group, gate, timeout):
    future = group[0].submit(Worker.pass_gate, gate.path)
    with pytest.raises(TypeError, match="timeout must be seconds"):
        future.result(timeout)
    with pytest.raises(TypeError, match="timeout must be seconds"):
        group.flush(timeout)
    gate.open(0)
    future.result()
