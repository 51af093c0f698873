"""A group that starts again by hand: fresh objects, the same arguments, the same handles."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from contract_worker import Worker
from group_restart_ranks import Counting, FailsWhen, stuck_but_one

from rankwise import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    Restart,
    StartupError,
    WorkerGroup,
    current_call,
)

Make = Callable[..., WorkerGroup]


def test_objects_are_fresh_and_handles_go_on(make: Make) -> None:
    group = make(Counting, 2, args=(["a"],))
    one, some, patient = group[1], group[[0]], group.options(timeout=30)
    assert group.call(Counting.count) == [1, 1]
    assert group.call(Counting.count) == [2, 2]
    group.restart()
    assert group.call(Counting.count) == [1, 1]
    assert (one.call(Counting.count), some.call(Counting.count)) == (2, [2])
    assert patient.call(Counting.count) == [3, 3]
    assert patient.submit(Counting.get).result() == [["a"], ["a"]]
    assert group.healthy and group.failure is None and len(group.health()) == 2


def test_calls_made_before_it_are_answered(make: Make) -> None:
    group = make(Counting, 2, args=([],))
    futures = [group.submit(Counting.count) for _ in range(20)]
    group.restart()
    assert [future.result() for future in futures] == [[n, n] for n in range(1, 21)]


def test_a_restart_ends_calls_as_close_does(make: Make, gate: Any) -> None:
    """What runs is not cancelled and what is queued is not dropped: they have their time."""
    group = make(Worker, 1, args=("a",), kwargs={"b": 2})
    running = group[0].submit(Worker.cancelled_at_gate, gate.path)
    gate.entered(0)
    behind = [group[0].submit(Worker.get_rank) for _ in range(100)]
    other = threading.Thread(target=group.restart)
    other.start()
    while group.healthy:
        threading.Event().wait(0.005)
    with pytest.raises((GroupBroken, GroupClosed), match="being restarted"):
        group.submit(Worker.get_rank)
    gate.open(0)
    assert running.result(20) is False
    assert [future.result(20) for future in behind] == [0] * 100
    other.join(20)
    group.wait_ready(timeout=20)


def test_a_restart_cancels_what_has_had_its_time(make: Make) -> None:
    group = make(Worker, 1, args=("a",), kwargs={"b": 2})
    running = group[0].submit(until_cancelled)
    group.restart(timeout=0.01)
    assert isinstance(running.exception(20), GroupClosed)
    assert group[0].call(Worker.get_rank) == 0


def test_a_kill_does_not_wait_for_a_restart_that_waits_for_a_call(make: Make) -> None:
    group = make(Worker, 1, args=("a",), kwargs={"b": 2})
    running = group[0].submit(until_cancelled)
    errors: list[BaseException] = []

    def restart() -> None:
        try:
            group.restart(timeout=None)
        except GroupClosed as error:
            errors.append(error)

    other = threading.Thread(target=restart)
    other.start()
    while group.healthy:
        threading.Event().wait(0.005)
    group.kill()
    assert running.done()
    other.join(20)
    assert len(errors) == 1


def test_arguments_are_as_they_are_at_the_restart(make: Make) -> None:
    made_of = ["a"]
    group = make(Counting, 1, args=(made_of,))
    made_of.append("b")
    assert group[0].call(Counting.get) == ["a"]
    group.restart()
    assert group[0].call(Counting.get) == ["a", "b"]


def test_on_restart_reloads_before_anybody_else_calls(make: Make) -> None:
    seen: list[Any] = []

    def reload(ranks: Any) -> None:
        seen.append((len(ranks), ranks.call(Counting.count), ranks[0].call(Counting.count)))
        with pytest.raises((GroupBroken, GroupClosed), match="being restarted"):
            group.call(Counting.count)
        with pytest.raises(RuntimeError, match="on_restart"):
            group.restart()

    group = make(Counting, 2, args=([],), restart=Restart(0, on_restart=reload))
    group.restart()
    assert seen == [(2, [1, 1], 2)]
    assert group.call(Counting.count) == [3, 2]


@pytest.mark.parametrize("kind", [KeyError, SystemExit, asyncio.CancelledError])
def test_an_on_restart_that_raises_is_a_failed_start(make: Make, kind: type[BaseException]) -> None:
    """Whatever it raises: the new ranks are not left to nobody."""
    seen: list[Any] = []

    def reload(ranks: Any) -> None:
        seen.append(ranks)
        raise kind("state")

    group = make(Counting, 1, args=([],), restart=Restart(0, on_restart=reload))
    with pytest.raises(StartupError, match=f"on_restart raised {kind.__name__}") as raised:
        group.restart()
    assert isinstance(raised.value.__cause__, kind)
    assert not group.healthy
    with pytest.raises(GroupClosed):
        seen[0].call(Counting.count)
    with pytest.raises((GroupBroken, GroupClosed)):
        group.call(Counting.count)


def until_cancelled(worker: Any) -> None:
    while not current_call().cancelled():
        threading.Event().wait(0.01)


def test_a_restart_that_failed_may_be_tried_again(make: Make) -> None:
    told = [False]
    group = make(FailsWhen, 1, args=(told,))
    told[0] = True
    with pytest.raises(StartupError, match="told to"):
        group.restart()
    assert not group.healthy
    told[0] = False
    group.restart()
    assert group.healthy


def test_a_closed_group_does_not_start_again(make: Make) -> None:
    group = make(Worker, 1, args=("a",), kwargs={"b": 2})
    group.close()
    with pytest.raises(GroupClosed):
        group.restart()
    with pytest.raises(GroupClosed):
        group.wait_ready()


def test_wait_ready_returns_at_once_where_calls_are_taken(make: Make) -> None:
    group = make(Counting, 1, args=([],))
    group.wait_ready(timeout=0)


def test_wait_ready_waits_for_the_restart_of_another_thread(make: Make) -> None:
    begun, go = threading.Event(), threading.Event()

    def reload(ranks: Any) -> None:
        begun.set()
        assert go.wait(20)

    group = make(Counting, 1, args=([],), restart=Restart(0, on_restart=reload))
    other = threading.Thread(target=group.restart)
    other.start()
    assert begun.wait(20)
    with pytest.raises(CallTimeout, match=r"not ready"):
        group.wait_ready(timeout=0.01)
    second = threading.Thread(target=group.restart)  # waits for the one that is under way
    second.start()
    go.set()
    group.wait_ready(timeout=20)
    assert group.call(Counting.count) == [1]
    other.join(20)
    second.join(20)


def test_a_close_ends_a_restart(make: Make) -> None:
    begun = threading.Event()
    errors: list[BaseException] = []

    def reload(ranks: Any) -> None:
        begun.set()
        ranks.call(until_cancelled)

    def restart() -> None:
        try:
            group.restart()
        except BaseException as error:
            errors.append(error)

    group = make(Counting, 1, args=([],), restart=Restart(0, on_restart=reload))
    other = threading.Thread(target=restart)
    other.start()
    assert begun.wait(20)
    group.close(timeout=1)
    other.join(20)
    assert isinstance(errors[0], (StartupError, GroupClosed))
    with pytest.raises(GroupClosed):
        group.call(Counting.count)


def test_a_group_that_gave_up_on_a_rank_starts_again(make: Make) -> None:
    """A broken group, with a rank stuck in its call, is as new after a restart."""
    started = threading.Event()
    restart = Restart(1, 0.0, on_restart=lambda view: started.set())
    group = make(Counting, 2, args=([],), restart=restart)
    with pytest.raises(ValueError, match="first"):
        group.options(grace=0.05).call(stuck_but_one)
    assert started.wait(30)
    group.wait_ready(timeout=30)
    assert group.call(Counting.count) == [1, 1]


def test_restart_takes_only_a_restart() -> None:
    with pytest.raises(TypeError, match=r"restart must be a rankwise\.Restart"):
        WorkerGroup(Counting, 1, restart=3, backend="inline")  # type: ignore[arg-type]
