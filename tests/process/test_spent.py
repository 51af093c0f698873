"""A rank that has left its loop, or has no thread, descriptor or time left: told, and soon."""

from __future__ import annotations

import os
import resource
import time

import pytest
from drivers import until
from spent_ranks import ForksToo, Worker

from rankwise import CallTimeout, GroupBroken, WorkerDied, WorkerGroup

MONTH = 30 * 86400.0  # seconds: more milliseconds than an int has


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 2, logs="off")
    yield made
    made.kill()


def leave_the_loop(group):
    """Rank 1 is sent nonsense, which it does not go on after; then its interpreter waits."""
    group[1].call(Worker.keep_a_thread)
    group._seat.engine.pump.sockets.channels[1].sock.send(b"x" * 64)


def test_a_rank_that_has_left_its_loop_is_not_waited_for_though_its_process_lives(group):
    leave_the_loop(group)
    with pytest.raises((WorkerDied, GroupBroken), match="rank 1"):
        group.options(timeout=20).call(Worker.echo, 1)


def test_a_rank_that_has_left_its_loop_does_not_hold_up_close(group):
    leave_the_loop(group)
    waiting = group.submit(Worker.nap, 0.3)
    began = time.monotonic()
    group.close(None)
    assert time.monotonic() - began < 20
    assert waiting.done()


def test_a_late_value_for_which_no_thread_can_be_started_fails_alone(group):
    with pytest.raises(RuntimeError, match="can't start new thread"):
        group[0].call(Worker.late_without_threads)
    assert group.call(Worker.echo, 1) == [1, 1]


def test_a_child_that_a_late_value_forked_answers_nothing(group):
    assert group.call(Worker.late_that_forks) == ["the parent"] * 2
    assert group.call(Worker.late_that_forks) == ["the parent"] * 2
    assert group.healthy


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_child_that_comes_out_of_the_constructor_is_no_rank(start_method):
    with WorkerGroup(ForksToo, 2, logs="off", start_method=start_method) as group:
        for number in range(20):
            assert group.call(Worker.echo, number) == [number] * 2
        assert sorted(group.call(Worker.pid)) == sorted(group.pids)


def test_limits_of_a_month_are_waited_with(group):
    future = group.submit(Worker.nap, 0.2)
    assert future.result(MONTH) == ["slept"] * 2
    assert group.options(timeout=MONTH).call(Worker.nap, 0.2) == ["slept"] * 2
    group.submit(Worker.nap, 0.2)
    group.flush(MONTH)
    last = group.submit(Worker.nap, 0.2)
    group.close(MONTH)
    assert last.result() == ["slept"] * 2
    assert [report.exitcode for report in group._seat.engine.ranks.reports.values()] == [0, 0]


def test_a_start_may_take_a_month():
    with WorkerGroup(Worker, 1, start_timeout=MONTH) as group:
        assert group.call(Worker.echo, 1) == [1]


def test_a_driver_without_descriptors_loses_one_result_and_not_the_group(group):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, limits[1]))
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(os.dup(0))
        try:
            answers = group.call(Worker.large, 3 << 20)
        except Exception as error:
            assert not isinstance(error, GroupBroken), error
        else:
            assert list(map(len, answers)) == [3 << 20] * 2  # what it needs was imported before
        assert group.call(Worker.echo, 1) == [1, 1]
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert list(map(len, group.call(Worker.large, 3 << 20))) == [3 << 20] * 2
    until(lambda: group.healthy, 1)


def test_answers_that_come_while_a_result_is_decoded_are_counted(group):
    """The leader puts them into the very dict that the decoding lets go of."""
    future = group.options(reply_from=0).submit(Worker.echo, 1)
    answers = future._call.answers
    assert future.result() == 1
    assert future._call.answers is answers
    group.flush(20)
    with pytest.raises(CallTimeout):
        group.options(timeout=0.05).call(Worker.nap, 0.3)
