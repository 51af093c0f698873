"""`rankwise.testing.faults`: what is planned goes wrong where and when it is planned, no more."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise

import pytest
from planned_faults_ranks import Worker
from untold import not_ready

from rankwise import (
    CallTimeout,
    GroupBroken,
    RemoteError,
    StartupError,
    WorkerDied,
    WorkerGroup,
    worker_info,
)
from rankwise.testing import Refused, delay, drop, faults, hold_gil, kill, refuse

START = {
    "spawn": {"start_method": "spawn"},
    "forkserver": {"start_method": "forkserver", "preload": ("json",)},
}

methods = pytest.mark.parametrize("method", START)


@pytest.fixture
def start(worker_group):
    def start(*plan, size=2, method="spawn", **options):
        return worker_group(Worker, size, faults=plan, logs="off", **START[method], **options)

    return start


# -- kill -----------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("at", ["spawn", "import", "construct"])
def test_a_rank_is_killed_while_it_starts(start, at, method):
    with pytest.raises(StartupError) as caught:
        start(kill(1, at=at), method=method)
    assert caught.value.rank == 1
    assert caught.value.exitcode == -signal.SIGKILL
    assert caught.value.phase == at


@methods
@pytest.mark.parametrize("at", ["receive", "run", "reply"])
def test_a_rank_is_killed_at_its_third_call(start, at, method):
    group = start(kill(1, at=at, call=3), method=method)
    assert group.call("echo", 1) == [1, 1]
    assert group[0].call("echo", 2) == 2  # no call of rank 1's
    assert group.call("echo", 3) == [3, 3]
    with pytest.raises(WorkerDied) as caught:
        group.call("echo", 4)
    assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)
    assert caught.value.method == "echo"


def test_a_rank_may_be_killed_by_another_signal(start):
    group = start(kill(None, call=1, signal=signal.SIGTERM))
    with pytest.raises(WorkerDied) as caught:
        group.call("echo", 1)
    assert caught.value.signal == signal.SIGTERM


# -- delay, hold_gil ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "at"), [(delay, "spawn"), (delay, "import"), (hold_gil, "construct")]
)
def test_a_start_is_held_up(start, fault, at):
    error = not_ready(
        lambda limit: start(fault(1, 30, at=at), start_timeout=limit),
        lambda error: error.phases == {1: at},
    )
    assert error.phases == {1: at}


@pytest.mark.parametrize("fault", [delay, hold_gil])
def test_a_call_is_held_up_and_then_answered(start, fault):
    """For longer than a lost message would take to be reported: it is none."""
    groups = [start(fault(1, 2.5, at=at, call=2)) for at in ("receive", "run", "reply")]
    for group in groups:
        group.call("echo", 0)
    began = time.monotonic()
    futures = [group.options(timeout=1.0).submit("echo", 1) for group in groups]
    for group, future in zip(groups, futures, strict=True):
        with pytest.raises(CallTimeout) as caught:
            future.result()
        assert caught.value.missing == (1,)
        assert group[1].call("echo", 2) == 2
        assert 2.5 <= time.monotonic() - began < 20
        assert group.call("all_that_ran") == [[0, 1], [0, 1, 2]]


def test_hold_gil_stops_every_thread_of_the_rank_and_delay_does_not(start):
    def beat(worker):
        import threading

        worker.beats = []

        def run():
            while True:
                worker.beats.append(time.monotonic())
                time.sleep(0.01)

        threading.Thread(target=run, daemon=True).start()

    def longest(worker):
        times = [*worker.beats, time.monotonic()]
        return max(after - before for before, after in pairwise(times))

    for fault, holds in ((hold_gil, True), (delay, False)):
        with start(fault(0, 0.8, call=2), size=1) as group:
            group.call(beat)
            (gap,) = group.call(longest)
            assert (gap > 0.75) is holds


# -- drop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "words", "ran"),
    [
        ("reply", r"the answer to echo\(\) \(call 3\) was lost: the rank says that it has", True),
        ("receive", r"echo\(\) \(call 3\) was lost: the rank is idle and has read all", False),
    ],
)
def test_a_message_that_is_dropped_is_reported_soon(start, at, words, ran):
    group = start(drop(1, at=at, call=2))
    group.call("echo", 0)
    began = time.monotonic()
    with pytest.raises(GroupBroken, match=words) as caught:
        group.call("echo", 1)
    assert time.monotonic() - began < 3.0  # test_lost_messages.py has the second itself
    assert f"rank 1 (pid {group.pids[1]})" in str(caught.value)


# -- refuse ---------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("at", ["import", "construct"])
def test_a_rank_refuses_to_start(start, at, method):
    with pytest.raises(StartupError, match="rank 1 refuses at") as caught:
        start(refuse(1, at=at), method=method)
    assert (caught.value.rank, caught.value.phase) == (1, at)
    assert isinstance(caught.value.__cause__, Refused)


def test_a_rank_refuses_to_be_spawned(start):
    with pytest.raises(StartupError) as caught:
        start(refuse(1, at="spawn"))
    assert (caught.value.rank, caught.value.phase, caught.value.exitcode) == (1, "spawn", 1)
    assert "rankwise: rank 1 refuses at 'spawn', as planned" in caught.value.log_tail


@pytest.mark.parametrize("at", ["receive", "run", "reply"])
def test_a_rank_refuses_a_call_and_lives_on(start, at):
    group = start(refuse(1, at=at, call=2), refuse(0, at=at, call=3, error=KeyError("mine")))
    assert group.call("echo", 0) == [0, 0]
    with pytest.raises(Refused, match=f"rank 1 refuses at '{at}', as planned") as caught:
        group.call("echo", 1)
    assert isinstance(caught.value.__cause__, RemoteError)
    with pytest.raises(KeyError, match="mine"):
        group.call("echo", 2)
    assert group.call("echo", 3) == [3, 3]
    ran = at == "reply"
    assert group.call("all_that_ran") == [[0, 1, 2, 3] if ran else [0, 1, 3],
                                          [0, 1, 2, 3] if ran else [0, 2, 3]]  # fmt: skip


def test_a_users_own_exception_class_is_raised(start):
    class Mine(Exception):
        pass

    group = start(refuse(None, error=Mine("text")))
    with pytest.raises(Mine, match="text"):
        group.call("echo", 1)


# -- which groups have them -----------------------------------------------------------------------


def test_groups_that_are_made_outside_have_no_faults_and_know_nothing_of_them():
    with WorkerGroup(Worker, 1, logs="off") as before:
        with faults(refuse(0), refuse(0, at="reply")):
            assert before.call("echo", 1) == [1]
        with WorkerGroup(Worker, 1, logs="off") as after:
            assert after.call("echo", 1) == [1]
            modules = after[0].call(lambda worker: [*__import__("sys").modules])
            assert "rankwise.testing._inject" not in modules


def test_a_group_keeps_its_faults_after_the_block(start):
    with faults(refuse(None, call=1)):
        group = start()
    with pytest.raises(Refused):
        group.call("echo", 1)
    assert group.call("echo", 2) == [2, 2]


def test_a_block_inside_another_adds_to_it(start):
    with faults(refuse(0, call=1)), faults(refuse(0, call=2)):
        group = start(refuse(0, call=3), size=1)
    for number in range(3):
        with pytest.raises(Refused):
            group.call("echo", number)
    assert group.call("echo", 4) == [4]


@methods
def test_the_ranks_own_code_sees_nothing_of_the_plan(start, method):
    group = start(delay(0, 0), method=method)
    assert not set(group.call("environment")[0]) - {"RANKWISE_TEST_SESSION"}


def test_a_plan_for_a_rank_that_is_not_there_is_an_error(start):
    with pytest.raises(ValueError, match=r"kill rank 2 at 'run'.*the group has ranks 0 to 1"):
        start(kill(2))


def test_worker_info_and_large_payloads_go_through_a_faulty_channel(start):
    group = start(delay(1, 0.0), delay(1, 0.0, at="reply"), delay(1, 0.0, at="receive"))
    data = os.urandom(1 << 20)
    assert group.call("echo", data) == [data, data]
    assert group.call(lambda worker: worker_info().rank) == [0, 1]
