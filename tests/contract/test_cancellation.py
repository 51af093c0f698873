"""cancel(): a queued call leaves on all ranks, a sent one runs on all and can see the flag."""

from __future__ import annotations

import concurrent.futures

import pytest
from contract_worker import LAST_WINDOW, Worker


def fill(group, gate):
    """Calls to all ranks, more than are sent ahead; the first waits at the gate."""
    first = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    return [first, *(group.submit(Worker.note, ("ahead", i)) for i in range(LAST_WINDOW + 8))]


def test_a_queued_call_leaves_on_all_ranks(group, gate):
    group.call(Worker.take_seen)
    futures = fill(group, gate)
    last = group.submit(Worker.note, "cancelled")
    assert not last.running()
    assert last.cancel() is True
    assert last.cancel() is True, "again it says the same"
    assert last.cancelled()
    assert last.done()
    with pytest.raises(concurrent.futures.CancelledError):
        last.result()
    with pytest.raises(concurrent.futures.CancelledError):
        last.exception()
    after = group.submit(Worker.note, "after")
    gate.open(0, 1, 2)
    after.result(timeout=20)
    assert all(future.done() for future in futures)
    for seen in group.call(Worker.take_seen):
        assert "cancelled" not in seen
        assert seen[-1] == "after"
        assert len(seen) == LAST_WINDOW + 9


def test_cancelling_what_one_rank_has_seen_says_false_and_it_runs_on_all(group, gate):
    group.call(Worker.take_seen)
    group[0].submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    for number in range(LAST_WINDOW + 8):
        group[0].submit(Worker.note, number)
    future = group.submit(Worker.note, "both")  # queued for rank 0, sent to 1 and 2
    assert future.cancel() is False
    assert not future.cancelled()
    gate.open(0)
    future.result(timeout=20)
    assert [seen[-1] for seen in group.call(Worker.take_seen)] == ["both"] * 3


def test_a_running_call_sees_the_flag_and_its_future_stays_open(group, gate):
    future = group.submit(Worker.cancelled_at_gate, gate.path)
    gate.entered(0, 1, 2)
    assert future.cancel() is False
    assert not future.done()
    assert not future.cancelled()
    gate.open(0, 1, 2)
    assert future.result() == [True] * 3


def test_the_flag_is_that_calls_alone(group, gate):
    future = group.submit(Worker.cancelled_at_gate, gate.path)
    gate.entered(0, 1, 2)
    after = group.submit(Worker.described)
    future.cancel()
    gate.open(0, 1, 2)
    assert [cancelled for _, _, _, cancelled, _ in after.result()] == [False] * 3
    future.result()


def test_a_finished_call_cannot_be_cancelled(group):
    future = group.submit(Worker.get_rank)
    assert future.result() == [0, 1, 2]
    assert future.cancel() is False
    assert future.result() == [0, 1, 2]


def test_cancelling_one_of_submit_each_leaves_the_others(group, gate):
    fill(group, gate)
    futures = group.submit_each(Worker.get_rank)
    assert futures[1].cancel() is True
    gate.open(0, 1, 2)
    assert futures[0].result() == 0
    assert futures[2].result() == 2
    assert futures[1].cancelled()
    group.call(Worker.take_seen)


def test_callbacks_and_wait_hear_of_a_cancellation(group, gate):
    fill(group, gate)
    future = group.submit(Worker.get_rank)
    heard = concurrent.futures.Future()
    future.add_done_callback(heard.set_result)
    assert future.cancel()
    assert heard.result(timeout=20) is future
    done, _ = concurrent.futures.wait([future], timeout=20)
    assert done == {future}
    gate.open(0, 1, 2)
    group.flush()
    group.call(Worker.take_seen)


def test_more_calls_are_cancelled_than_a_rank_can_be_told_of_at_once(group, gate):
    """One rank is behind: what is queued for it is told when it comes, and its own is not lost."""
    first = group[1].submit(Worker.cancelled_at_gate, gate.path)
    gate.entered(1)
    rest = [group.submit(Worker.cancelled_now) for _ in range(400)]
    for future in rest:  # rank 0 has answered each, and 2 too
        while len(future._call.answers) < 2:
            pass
    assert not any(future.cancel() for future in rest)
    for _ in range(300):
        assert first.cancel() is False
    gate.open(1)
    assert first.result(timeout=20) is True
    assert [future.result(timeout=20)[1] for future in rest] == [True] * 400
