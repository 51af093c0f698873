"""Guarantee 3: no caller waits for ever, whatever it waits by and whenever the rank dies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time

import pytest
from drivers import in_thread, readable, until
from g03_no_caller_waits_forever_ranks import GARBAGE, Worker, lose_the_reply, write_raw

from rankwise import GroupBroken, WorkerDied, WorkerGroup

# Seconds in which a death is told. It takes a millisecond or two, which benchmarks/bounds.py
# measures, and on a busy machine what that has to do first.
HEARD = 5.0
LOST = 3.0  # and in which a lost answer is: test_lost_messages.py has the second that is promised


DEATHS = {"exit": 3, "abort": -signal.SIGABRT, "segfault": -signal.SIGSEGV, "kill": -signal.SIGKILL}


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 2, logs="off")
    yield made
    made.kill()


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, fd
    os.close(fd)


def all_hold(fifo, count):
    seen = b""
    while len(seen) < count:
        assert readable(fifo[1])
        seen += os.read(fifo[1], 64)


def by_result(future):
    return future.result()


def by_exception(future):
    error = future.exception()
    if error is None:
        raise AssertionError("no exception")
    raise error


def by_callback(future):
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    assert done.wait(20)
    assert future.done()
    return future.result(0)


def by_wait(future):
    done, _ = concurrent.futures.wait([future], timeout=20)
    assert done == {future}
    return future.result(0)


def by_as_completed(future):
    return next(concurrent.futures.as_completed([future], timeout=20)).result(0)


def by_await(future):
    async def main():
        return await future

    return asyncio.run(main())


def by_wrap_future(future):
    async def main():
        return await asyncio.wrap_future(future)

    return asyncio.run(main())


WAITERS = [
    by_result, by_exception, by_callback, by_wait, by_as_completed, by_await, by_wrap_future,
]  # fmt: skip


@pytest.mark.parametrize("waiter", WAITERS)
@pytest.mark.parametrize("stage", ["running", "queued"])
def test_a_death_ends_every_kind_of_wait(group, fifo, waiter, stage):
    futures = [group.submit("hold", fifo[0])]
    all_hold(fifo, 2)
    if stage == "queued":
        futures += [group.submit("echo", number) for number in range(200)]
    waits = in_thread(lambda: waiter(futures[-1]))
    until(lambda: waits.thread.is_alive())
    killed = time.monotonic()
    os.kill(group.pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        waits.value()
    assert time.monotonic() - killed < HEARD
    assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)
    assert all(future.done() or future.exception(5) for future in futures)


def test_a_death_ends_a_plain_call(group, fifo):
    waits = in_thread(lambda: group.call("hold", fifo[0]))
    all_hold(fifo, 2)
    killed = time.monotonic()
    os.kill(group.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        waits.value()
    assert time.monotonic() - killed < HEARD
    assert caught.value.rank == 0 and caught.value.method == "hold"
    assert caught.value.__notes__ == [
        f"{group.name} is broken and takes no more calls: make a new group"
    ]


def test_a_death_ends_flush(group, fifo):
    future = group.submit("hold", fifo[0])
    all_hold(fifo, 2)
    waits = in_thread(group.flush)
    os.kill(group.pids[0], signal.SIGKILL)
    assert waits.value(5) is None
    assert isinstance(future.exception(5), WorkerDied)


def test_a_death_ends_all_of_many_waiters(group, fifo):
    future = group.submit("hold", fifo[0])
    all_hold(fifo, 2)
    waits = [in_thread(lambda waiter=waiter: waiter(future)) for waiter in WAITERS * 3]
    calls = [in_thread(lambda: group.call("echo", 1)) for _ in range(5)]
    os.kill(group.pids[1], signal.SIGKILL)
    for wait in waits:
        with pytest.raises(WorkerDied):
            wait.value(5)
    for call in calls:
        with pytest.raises(GroupBroken):  # WorkerDied where it was open, GroupBroken where later
            try:
                call.value(5)
            except WorkerDied as died:
                raise GroupBroken("open when it died", first=died) from died


@pytest.mark.parametrize("how", DEATHS)
def test_the_call_in_which_a_rank_dies_says_how(group, how):
    began = time.monotonic()
    with pytest.raises(WorkerDied) as caught:
        in_thread(lambda: group[1].call("die", how)).value(5)
    assert time.monotonic() - began < HEARD  # a core dump may be written first
    assert caught.value.exitcode == DEATHS[how]
    assert (caught.value.rank, caught.value.method) == (1, "die")


def test_a_rank_that_dies_while_idle_is_told_to_the_next_call(group):
    os.kill(group.pids[1], signal.SIGKILL)
    until(lambda: not group.healthy, 5, "a death while idle is noticed without a call")
    with pytest.raises(GroupBroken) as caught:
        group.call("echo", 1)
    assert isinstance(caught.value.first, WorkerDied)
    assert caught.value.first.rank == 1
    assert caught.value.__cause__ is caught.value.first


def test_calls_made_right_after_a_death_all_end(group):
    """The race between a death and submits: none is left open."""
    stop = threading.Event()
    futures = []

    def submit():
        while not stop.is_set():
            try:
                futures.append(group.submit("echo", len(futures)))
            except GroupBroken:
                return
            if len(futures) > 200:
                futures[-100].exception(5)

    threads = [in_thread(submit) for _ in range(3)]
    until(lambda: len(futures) > 500)
    os.kill(group.pids[0], signal.SIGKILL)
    until(lambda: not group.healthy, 5)
    stop.set()
    for thread in threads:
        thread.value(5)
    done, open_ = concurrent.futures.wait(futures, timeout=5)
    assert not open_
    for future in done:
        assert future.exception(0) is None or isinstance(future.exception(0), WorkerDied)


def test_an_answer_that_was_given_before_the_death_arrives(group):
    """The answer to a call is not thrown away because the exit is heard of first."""

    def answer_and_die(worker):
        from rankwise.wire.worker_channel import WorkerChannel

        real = WorkerChannel.reply

        def reply(self, kind, call_id, body):
            real(self, kind, call_id, body)
            os._exit(0)

        WorkerChannel.reply = reply
        return "the last answer"

    assert in_thread(lambda: group[0].call(answer_and_die)).value(5) == "the last answer"
    until(lambda: not group.healthy, 5)


# -- a channel that loses or garbles ----------------------------------------------------------


def test_a_rank_that_is_idle_and_owes_an_answer_is_reported_within_a_second(group):
    group.call("echo", 1)
    began = time.monotonic()
    with pytest.raises(GroupBroken) as caught:
        in_thread(lambda: group[1].call(lose_the_reply, False)).value(5)
    assert time.monotonic() - began < LOST
    assert "rank 1" in str(caught.value) and "it has finished the call" in str(caught.value)


@pytest.mark.parametrize("waiter", WAITERS)
def test_every_kind_of_wait_hears_of_a_lost_answer(group, waiter):
    future = group[1].submit(lose_the_reply, False)
    began = time.monotonic()
    with pytest.raises(GroupBroken):
        in_thread(lambda: waiter(future)).value(5)
    assert time.monotonic() - began < LOST


def test_a_lost_answer_is_reported_while_another_rank_is_busy(group, fifo):
    busy = group[0].submit("hold", fifo[0])
    lost = group[1].submit(lose_the_reply, False)
    with pytest.raises(GroupBroken):
        in_thread(lost.result).value(5)
    with pytest.raises(GroupBroken):
        in_thread(busy.result).value(5)


def test_a_gap_in_the_answers_breaks_the_group_at_once(group):
    lost = group[1].submit(lose_the_reply, True)
    after = group[1].submit("echo", "not the answer to the call before")
    began = time.monotonic()
    for future in (lost, after):
        with pytest.raises(GroupBroken):
            in_thread(future.result).value(5)
    assert time.monotonic() - began < HEARD
    assert "rank 1" in str(group.failure)
    assert "idle" not in str(group.failure), "nobody had to look whether it is"


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_bad_frame_breaks_the_group_at_once_and_says_so(group, garbage):
    began = time.monotonic()
    with pytest.raises(GroupBroken) as caught:
        in_thread(lambda: group[0].call(write_raw, GARBAGE[garbage])).value(5)
    assert time.monotonic() - began < HEARD
    assert f"rank 0 (pid {group.pids[0]})" in str(caught.value)
    with pytest.raises(GroupBroken):
        group.call("echo", 1)


def test_a_frame_that_never_ends_is_not_waited_for(group):
    """A header that promises a terabyte: the true answer is swallowed as its body."""
    from rankwise._messages import HEADER, MAGIC, OK

    with pytest.raises(GroupBroken):
        in_thread(lambda: group[0].call(write_raw, HEADER.pack(MAGIC, OK, 0, 1, 2, 1 << 40))).value(
            8
        )


def test_a_closed_channel_without_an_exit_ends_the_wait(group):
    def close_and_stay(worker):
        import sys

        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["channel"]._sock.shutdown(2)
        threading.Event().wait()

    began = time.monotonic()
    with pytest.raises(GroupBroken):
        in_thread(lambda: group[0].call(close_and_stay)).value(5)
    assert time.monotonic() - began < HEARD


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_worker_that_loses_its_input_does_not_hang_the_caller(group, fifo, size):
    """Bytes of the next call vanish on the worker's side, out of its header or out of its body."""

    def eat(worker, fd_path, size):
        import select
        import sys

        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        sock = frame.f_locals["channel"]._sock
        fd = os.open(fd_path, os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        kept = b""
        while size > 10 and len(kept) < 1000:  # out of the body: the header is given back
            poll.poll(5000)
            kept += sock.recv(1000 - len(kept))
        frame.f_locals["channel"]._data = kept
        while size:
            poll.poll(5000)
            size -= len(sock.recv(size))

    first = group[0].submit(eat, fifo[0], size)
    all_hold(fifo, 1)
    second = group[0].submit("echo", "x" * 60_000)
    with pytest.raises((GroupBroken, WorkerDied)):
        in_thread(second.result).value(8)
    assert first.done()
