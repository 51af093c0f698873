"""Deadlines that explain, and calls that are told of because they take long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import re
import signal
import statistics
import time

import pytest
from drivers import in_thread, open_fifo, remove_fifo, until
from time_limits_ranks import Worker
from untold import explained, late, not_ready, untold

from rankwise import CallTimeout, WorkerGroup, _slow, worker_info
from rankwise._messages import STACK_SIGNAL


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 3, logs="off")
    yield made
    made.kill()  # not close(): a test that has failed has not opened its gate


@pytest.fixture
def gate(tmp_path):
    path = str(tmp_path / "gate")
    os.mkfifo(path)
    yield path
    remove_fifo(path)


def open_gate(path):
    os.close(open_fifo(path))


def launcher_of(group):
    with open(f"/proc/{group.pids[0]}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def blocks(pid):
    with open(f"/proc/{pid}/status") as status:
        mask = re.search(r"^SigBlk:\s*([0-9a-f]+)$", status.read(), re.M)[1]
    return bool(int(mask, 16) >> (STACK_SIGNAL - 1) & 1)


def dumped(pid):
    """Bytes of stacks that a rank has ever written."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if "rankwise-crash" in os.readlink(f"/proc/{pid}/fd/{fd}"):
            with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                return int(re.search(r"pos:\s*(\d+)", info.read())[1])
    raise AssertionError("it has no such file")


# -- the deadline -----------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_deadline_says_who_has_answered_and_what_the_others_do(start_method, gate):
    with WorkerGroup(Worker, 3, logs="off", start_method=start_method) as group:
        error = explained(
            lambda: group.options(timeout=1.0).call(Worker.load, gate),
            again=lambda: (open_gate(gate), group.flush()),
        )
        open_gate(gate)
        assert re.fullmatch(
            r"load\(\) has 2 of 3 answers after 1\.0 s; waiting for rank 1 of workers\n"
            rf"  rank 1: pid {group.pids[1]}, running load\(\) for \d\.\d s, "
            r"in time_limits_ranks\.py:\d+ wait_at; "
            r'last line: "compiling kernels"; asleep, \d+% CPU',
            str(error),
        )
        assert (error.answered, error.missing) == ((0, 2), (1,))
        assert (error.states, error.last_lines) == ({1: "running"}, {1: "compiling kernels"})
        assert 0.5 < error.seconds[1] < 10
        assert error.cpu[1] < 0.5
        assert "in wait_at" in error.stacks[1]
        again = pickle.loads(pickle.dumps(error))
        assert (again.stacks, again.cpu, str(again)) == (error.stacks, error.cpu, str(error))
        assert group.call(Worker.pid) == group.pids


def test_a_rank_that_computes_is_told_from_one_that_waits(group, gate, tmp_path):
    waits = group[0].options(timeout=1.5).submit(Worker.wait_at, gate)
    spins = group[1].options(timeout=1.5).submit(Worker.spin, str(tmp_path / "mark"))
    errors = [future.exception(20) for future in (waits, spins)]
    assert errors[1].cpu[1] > 5 * errors[0].cpu[0], "they share the cores with whatever else runs"
    (tmp_path / "mark").touch()
    open_gate(gate)


def test_a_call_that_is_queued_says_behind_what(group, gate):
    group[1].submit(Worker.wait_at, gate)
    until(lambda: group.health()[1].method == "wait_at", what="it waits")
    # The first is on its way to the rank; behind 64 of them it is still in the driver.
    for ahead in (0, 80):
        for _ in range(ahead):
            group[1].submit(Worker.pid)
        error = explained(lambda: group[1].options(timeout=0.3).call(Worker.pid))
        assert re.search(
            r"pid\(\) has 0 of 1 answers after 0\.3 s; waiting for rank 1 of workers\n  rank 1: "
            r"pid \d+, queued behind wait_at\(\), running for \d+\.\d s, in time_limits_ranks",
            str(error),
        )
        assert error.states == {1: "queued"}
        assert "in wait_at" in error.stacks[1]
    open_gate(gate)


def test_a_stopped_rank_is_named_as_stopped(group):
    assert group.call(Worker.pid) == group.pids
    os.kill(group.pids[2], signal.SIGSTOP)
    error = explained(lambda: group.options(timeout=1.0).call(Worker.pid))
    os.kill(group.pids[2], signal.SIGCONT)
    assert error.states == {2: "stopped"}
    assert error.stacks == {2: None}
    assert error.reasons == {2: "it is stopped"}
    assert group.call(Worker.pid) == group.pids


def test_a_rank_that_does_not_tell_its_stack_costs_a_tenth_of_a_second_and_no_more(group, tmp_path):
    let_go = tmp_path / "let go"
    blocked = group[1].submit(Worker.block, 0.2, str(let_go))
    until(lambda: blocks(group.pids[1]), what="it blocks all signals")
    for _ in range(10):
        began = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            group[1].options(timeout=0.2).call(Worker.pid)
        took = time.monotonic() - began
        assert took < 2, "0.2 s, 0.1 s for the rank, and what a busy machine adds"
        assert caught.value.stacks == {1: None}
        assert "queued behind block(), running for" in str(caught.value)
        if "it blocked signals 61 and 62 for 100 ms" in caught.value.reasons.get(1, ""):
            break
        assert late(caught.value), caught.value
    else:
        raise AssertionError("the launcher had no tenth of a second for it, ten times")
    assert took > 0.29
    let_go.touch()
    assert blocked.result() == "done"


def test_an_answer_that_comes_while_the_deadline_is_explained_is_too_late(group):
    for _ in range(5):  # 50 ms are much for a machine that stalls
        future = group[1].options(timeout=0.4).submit(Worker.block, 0.45)
        error = future.exception(20)
        assert group[1].call(Worker.pid) == group.pids[1]
        if error is not None:
            break
    assert isinstance(error, CallTimeout)


def test_a_rank_that_the_question_wakes_is_told_of_as_it_was_before(group):
    """C code that sleeps returns early from a signal: the answer may come before the stack."""
    assert group.call(Worker.pid) == group.pids
    view = group[1].options(timeout=0.5)
    error = explained(lambda: view.call(Worker.sleep_in_c, 5), again=group.flush)
    assert error.states == {1: "running"}
    assert "in sleep_in_c" in error.stacks[1]
    assert group[1].call(Worker.pid) == group.pids[1]


def test_nobody_else_waits_while_a_deadline_is_explained(group, tmp_path):
    """The stack of a rank that blocks the signal is waited for by nobody's thread and no loop."""
    let_go = tmp_path / "let go"
    blocked = group[1].submit(Worker.block, 0.2, str(let_go))
    until(lambda: blocks(group.pids[1]), what="it blocks all signals")

    async def main():
        late = group[1].options(timeout=0.1).submit(Worker.pid)
        loop = asyncio.get_running_loop()
        gaps, answers = [], 0
        waiter = asyncio.ensure_future(asyncio.wait([asyncio.ensure_future(_outcome(late))]))
        while not waiter.done():
            before = loop.time()
            assert await group[0].submit(Worker.pid) == group.pids[0]
            await asyncio.sleep(0)
            gaps.append(loop.time() - before)
            answers += 1
        done, _ = waiter.result()
        return done.pop().result(), gaps, answers

    error, gaps, answers = asyncio.run(main())
    let_go.touch()
    assert isinstance(error, CallTimeout) and late(error)
    assert answers > 5
    assert statistics.median(gaps) < 0.08, "no call of the loop waited for the stack"
    assert blocked.result() == "done"


async def _outcome(future):
    try:
        return await future
    except CallTimeout as error:
        return error


def test_many_deadlines_at_once_are_all_explained(group, gate):
    held = group.submit(Worker.load, gate, (0, 1, 2))
    until(lambda: all(each.method == "load" for each in group.health()), what="they wait")
    view = group.options(timeout=0.3)
    futures = [view.submit(Worker.pid) for _ in range(200)]
    before = dumped(group.pids[0])
    errors = [future.exception(20) for future in futures]
    for error in errors:
        assert error.missing == (0, 1, 2)
        assert late(error) or all("in wait_at" in error.stacks[rank] for rank in range(3))
    one = max(len(error.stacks[0] or "") for error in errors)
    assert one, "no question was answered in time"
    assert dumped(group.pids[0]) - before <= 5 * one, "one question served them all"

    def let_through():
        """One writer lets all through who wait then, and those to come need another."""
        with contextlib.suppress(OSError):  # nobody reads
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        return held.done()

    until(let_through, what="all have left the gate")


def test_a_program_that_polls_with_short_deadlines_does_not_flood_its_workers(group, gate):
    group[0].submit(Worker.wait_at, gate)
    until(lambda: group.health()[0].method == "wait_at", what="it waits")
    view = group[0].options(timeout=0.005)
    one = len(explained(lambda: view.call(Worker.pid)).stacks[0])
    before, began = dumped(group.pids[0]), time.monotonic()
    for _ in range(40):
        error = explained(lambda: view.call(Worker.pid))
        assert "in wait_at" in error.stacks[0]
    took = time.monotonic() - began
    assert (dumped(group.pids[0]) - before) / one <= took / 0.1 + 1
    open_gate(gate)


def test_a_deadline_is_kept_by_a_group_whose_launcher_is_stopped(group, gate):
    assert group.call(Worker.pid) == group.pids
    launcher = launcher_of(group)
    os.kill(launcher, signal.SIGSTOP)
    try:
        for _ in range(5):
            began = time.monotonic()
            with pytest.raises(CallTimeout) as caught:
                group.options(timeout=1.0).call(Worker.load, gate)
            assert time.monotonic() - began < 4
            open_gate(gate)
            group.flush()
            if caught.value.reasons:  # a keeper that is late itself has none
                break
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert caught.value.answered == (0, 2)
    assert caught.value.reasons == {1: "the launcher does not answer"}
    assert "running load() for" in str(caught.value)


def test_a_close_and_a_death_do_not_wait_for_an_explanation(group):
    for end in (lambda: os.kill(group.pids[1], signal.SIGKILL), group.kill):
        if not group.healthy:
            break
        group[1].submit(Worker.block, 30)
        until(lambda: blocks(group.pids[1]), what="it blocks all signals")
        future = group[1].options(timeout=0.05).submit(Worker.pid)
        asker = in_thread(lambda future=future: future.exception(20))
        end()
        assert asker.value(20) is not None


def test_patience_interrupts_nobody(group):
    assert group.call(Worker.pid) == group.pids
    future = group[0].submit(Worker.sleep_in_c, 3.0)
    with pytest.raises(CallTimeout) as caught:
        future.result(timeout=0.5)
    assert "result(0.5) has waited its 0.5 s" in str(caught.value)
    assert caught.value.states == {0: "running"}
    assert caught.value.stacks == {0: None}
    assert future.result() >= 3.0
    assert dumped(group.pids[0]) == 0


# -- slow calls -------------------------------------------------------------------------------


def slow_ones(caplog):
    return [each.getMessage() for each in caplog.records if "takes longer" in each.getMessage()]


def test_a_slow_call_is_logged_once_with_its_stacks_and_goes_on(group, gate, caplog):
    assert group.call(Worker.pid) == group.pids
    for _ in range(5):
        future = group.options(slow_after=0.7).submit(Worker.load, gate)
        until(lambda: slow_ones(caplog), what="it is logged")
        assert not future.done()
        (text,) = slow_ones(caplog)
        if not untold(text):
            break
        caplog.clear()
        open_gate(gate)
        future.result()
    assert re.match(
        r"load\(\) takes longer than 0\.7 s: it has 2 of 3 answers; waiting for rank 1 of workers\n"
        r"  rank 1: pid \d+, running load\(\) for \d+\.\d s, in time_limits_ranks\.py:\d+ wait_at; "
        r'last line: "compiling kernels"',
        text,
    )
    assert [(each.name, each.levelno) for each in caplog.records] == [("rankwise", logging.WARNING)]
    with pytest.raises(CallTimeout):
        future.result(timeout=0.7)
    open_gate(gate)
    assert future.result() == [0, "", 2]
    assert len(slow_ones(caplog)) == 1


def test_a_call_that_is_fast_enough_is_not_logged(group, caplog):
    view = group.options(slow_after=5)
    assert [view.call(Worker.pid) for _ in range(50)] == [group.pids] * 50
    assert group[0].call(Worker.sleep_in_c, 0.5) >= 0.5
    assert not slow_ones(caplog)


def test_a_queued_call_may_be_slow_too(group, gate, caplog):
    group[1].submit(Worker.wait_at, gate)
    until(lambda: group.health()[1].method == "wait_at", what="it waits")
    future = group[1].options(slow_after=0.2).submit(Worker.pid)
    until(lambda: slow_ones(caplog), what="it is logged")
    assert "rank 1: pid" in slow_ones(caplog)[0]
    assert "queued behind wait_at(), running for" in slow_ones(caplog)[0]
    open_gate(gate)
    assert future.result() == group.pids[1]


def test_by_default_a_call_is_logged_after_a_minute_and_nobody_is_interrupted(
    group, caplog, monkeypatch
):
    assert group.call(Worker.pid) == group.pids
    monkeypatch.setattr(_slow, "SLOW_AFTER", 0.6)
    future = group[1].submit(Worker.sleep_in_c, 2.4)
    until(lambda: slow_ones(caplog), what="it is logged")
    assert re.match(
        r"sleep_in_c\(\) takes longer than 0\.6 s: it has 0 of 1 answers; waiting for rank 1 of "
        r"workers\n  rank 1: pid \d+, running sleep_in_c\(\) for \d\.\d s; asleep(, \d+% CPU)?$",
        slow_ones(caplog)[0],
    )
    assert future.result() >= 2.4
    assert dumped(group.pids[1]) == 0
    assert len(slow_ones(caplog)) == 1
    # What has taken 2.4 s may take so long again.
    assert group[1].call(Worker.sleep_in_c, 2.4) >= 2.4
    assert len(slow_ones(caplog)) == 1


def test_never_is_never(group, caplog, monkeypatch):
    monkeypatch.setattr(_slow, "SLOW_AFTER", 0.2)
    group[1].options(slow_after=float("inf")).call(Worker.sleep_in_c, 0.8)
    assert not slow_ones(caplog)


# -- starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("logs", ["off", "prefix"])
def test_a_start_that_takes_too_long_says_where_each_rank_is(logs, gate):
    class Stuck:
        def __init__(self):
            print("loading weights", flush=True)
            if worker_info().rank == 1:
                self.load()

        def load(self):
            with open(gate) as file:
                file.read()

    began = time.monotonic()
    error = not_ready(
        lambda limit: WorkerGroup(Stuck, 2, start_timeout=limit, logs=logs),
        lambda error: error.last_lines == {1: "loading weights"} and bool(error.stacks[1]),
    )
    assert time.monotonic() - began < 60
    assert re.search(
        r"1 of 2 ranks were not ready after [139] s \(start_timeout\):\n"
        r"  rank 1: pid \d+, construct, in test_time_limits\.py:\d+ load; "
        r'last line: "loading weights"; asleep, \d+% CPU$',
        str(error),
    )
    assert error.phases == {1: "construct"}
    assert "in load" in error.stacks[1]
    assert error.last_lines == {1: "loading weights"}
    assert error.log_tail == "loading weights\n"
