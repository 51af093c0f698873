"""GroupFuture is a concurrent.futures.Future that can be awaited."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
import weakref

import pytest
from contract_worker import INTERRUPTS, LAST_WINDOW, Worker

from rankwise import CallTimeout, GroupFuture
from rankwise._calls import Call


def test_it_is_a_future_of_the_standard_library(group):
    future = group.submit(Worker.get_rank)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == [0, 1, 2]
    assert future.exception() is None
    assert future.done()
    assert not future.running()
    assert not future.cancelled()


def test_its_repr_says_what_it_is_and_where_it_stands(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    assert repr(future) == "<GroupFuture of pass_gate() on workers: running>"
    gate.open(0, 1, 2)
    future.result()
    assert repr(future) == "<GroupFuture of pass_gate() on workers: finished>"


def test_wait_and_as_completed_work_with_nobody_in_result(group, gate):
    futures = group.submit_each(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    gate.open(2)
    done, rest = concurrent.futures.wait(
        futures, timeout=20, return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert done == {futures[2]}
    assert rest == set(futures[:2])
    completed = concurrent.futures.as_completed(futures, timeout=20)
    assert next(completed) is futures[2]
    gate.open(0)
    assert next(completed) is futures[0]
    gate.open(1)
    assert next(completed) is futures[1]


def test_wait_stops_at_the_first_exception(group, gate):
    futures = group.submit_each(Worker.fail_or_wait, [1], gate.path)
    done, _ = concurrent.futures.wait(
        futures, timeout=20, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    assert futures[1] in done
    gate.open(0, 2)
    assert isinstance(futures[1].exception(), ValueError)
    group.flush()


def test_a_callback_runs_on_the_groups_own_thread(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    heard = concurrent.futures.Future()
    future.add_done_callback(
        lambda future: heard.set_result((future.result(), threading.current_thread().name))
    )
    gate.open(0, 1, 2)
    value, thread = heard.result(timeout=20)
    assert value == [0, 1, 2]
    assert "workers" in thread
    assert thread != threading.current_thread().name


def test_a_callback_of_a_finished_future_runs_at_once_here(group):
    future = group.submit(Worker.get_rank)
    future.result()
    threads = []
    future.add_done_callback(lambda future: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


def test_callbacks_run_in_order_and_one_that_fails_stops_none(group, gate, caplog):
    future = group[0].submit(Worker.pass_gate, gate.path)
    heard = []
    last = threading.Event()
    future.add_done_callback(lambda future: heard.append(1))
    future.add_done_callback(lambda future: 1 / 0)
    future.add_done_callback(lambda future: heard.append(2))
    future.add_done_callback(lambda future: last.set())
    gate.open(0)
    assert last.wait(20)
    assert heard == [1, 2]
    assert "exception calling callback" in caplog.text


def test_a_log_handler_that_fails_ends_no_callbacks(group, gate, monkeypatch):
    """It is called where a callback has failed; those of other futures must go on."""

    def refuse(record):
        raise ValueError("no log today")

    told = []
    monkeypatch.setattr("sys.excepthook", lambda *error: told.append(error[0]))
    for name in ("rankwise", "concurrent.futures"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [refuse])
    future = group[0].submit(Worker.pass_gate, gate.path)
    future.add_done_callback(lambda future: 1 / 0)
    after = group[0].submit(Worker.get_rank)
    heard = threading.Event()
    after.add_done_callback(lambda future: heard.set())
    gate.open(0)
    assert heard.wait(20)
    assert told == [ValueError]


def test_a_callback_may_call_the_group(group, gate):
    future = group[0].submit(Worker.pass_gate, gate.path)
    heard = concurrent.futures.Future()
    future.add_done_callback(lambda future: heard.set_result(group.call(Worker.get_rank)))
    gate.open(0)
    assert heard.result(timeout=20) == [0, 1, 2]


def test_the_result_is_made_once(group):
    future = group.submit(Worker.made_with)
    assert future.result() is future.result()
    failed = group.submit(Worker.fail, ValueError)
    assert failed.exception() is failed.exception()


def test_its_traceback_shows_where_it_was_asked_for_and_nothing_of_ours(group):
    future = group.submit(Worker.fail, ValueError)
    assert future.exception().__traceback__ is None
    for _ in range(2):  # nor does it grow
        with pytest.raises(ValueError) as caught:
            future.result()
        assert [frame.name for frame in caught.traceback] == [
            "test_its_traceback_shows_where_it_was_asked_for_and_nothing_of_ours", "result",
        ]  # fmt: skip


def test_many_threads_may_wait_for_one_future(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiters = [pool.submit(future.result) for _ in range(8)]
        gate.open(0, 1, 2)
        assert [waiter.result(timeout=20) for waiter in waiters] == [[0, 1, 2]] * 8


def test_nobody_but_the_group_settles_it(group):
    future = group.submit(Worker.get_rank)
    for settle in (
        lambda: future.set_result(1),
        lambda: future.set_exception(ValueError()),
        future.set_running_or_notify_cancel,
    ):
        with pytest.raises(RuntimeError, match="settled by its group alone"):
            settle()
    assert future.result() == [0, 1, 2]


def test_submit_never_blocks(group, gate):
    first = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    futures = [group.submit(Worker.echo, bytes(100_000)) for _ in range(LAST_WINDOW * 2)]
    assert not any(future.done() for future in futures)
    gate.open(0, 1, 2)
    assert futures[-1].result(timeout=60)[0][1] == (bytes(100_000),)
    assert first.done()


def test_a_future_that_is_dropped_is_collected(group):
    future = group.submit(Worker.get_rank)
    future.result()
    seen = weakref.ref(future)
    del future
    limit = time.monotonic() + 10
    while seen() is not None:  # a thread of the group has it in hand, perhaps
        assert time.monotonic() < limit
        gc.collect()


def test_a_callback_that_is_added_while_another_thread_waits_is_called(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    waiter = threading.Thread(target=future.result)
    waiter.start()
    called = threading.Event()
    time.sleep(0.05)  # it waits by then, or all the better
    future.add_done_callback(lambda future: called.set())
    gate.open(0, 1, 2)
    assert called.wait(20)
    waiter.join(20)


def test_a_callback_that_is_added_before_somebody_waits_is_called(group, gate):
    future = group.submit(Worker.pass_gate, gate.path)
    called = threading.Event()
    future.add_done_callback(lambda future: called.set())
    gate.open(0, 1, 2)
    future.result()
    assert called.wait(20)


def test_a_handler_that_asks_for_the_value_while_it_is_decoded_spoils_it_for_nobody(group):
    future = group.submit(Worker.interrupting)
    within = []
    INTERRUPTS.append(lambda: within.append(future.result()))
    assert future.result() == ["rebuilt"] * 3
    assert within == [["rebuilt"] * 3]
    assert future.result() is within[0]


# -- event loops ----------------------------------------------------------------------------------

# The group keeps one descriptor of a closed loop, until the next loop comes or its own close.
awaits = pytest.mark.leaks_allowed("the epoll of a closed loop")


@awaits
@pytest.mark.parametrize("way", ["result", "await", "wait", "as_completed", "a callback"])
def test_what_was_waited_for_is_collected_without_a_cycle(group, gate, way):
    """It is gone with its last name, and so is its call with the arguments: the garbage collector
    need not look for them."""
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    seen = weakref.ref(future)
    opener = threading.Timer(0.05, gate.open, (0, 1, 2))
    opener.start()
    if way == "result":
        future.result()
    elif way == "wait":
        concurrent.futures.wait([future])
    elif way == "as_completed":
        assert list(concurrent.futures.as_completed([future])) == [future]
    elif way == "a callback":
        called = threading.Event()
        future.add_done_callback(lambda future: called.set())
        assert called.wait(20)
    else:

        async def main(future):
            await future

        asyncio.run(main(future))
    opener.join()
    gc.collect()
    gc.disable()
    try:
        del future
        limit = time.monotonic() + 10
        while seen() is not None or any(
            type(each) is Call and each.method == "pass_gate" for each in gc.get_objects()
        ):
            assert time.monotonic() < limit  # a thread of the group has it in hand, perhaps
            time.sleep(0.001)
    finally:
        gc.enable()


@awaits
def test_it_can_be_awaited(group):
    async def main():
        assert await group.submit(Worker.get_rank) == [0, 1, 2]
        assert await group[1].submit(Worker.get_rank) == 1
        with pytest.raises(KeyError) as caught:
            await group.submit(Worker.fail, KeyError, "k")
        assert caught.value.__notes__
        return await asyncio.gather(*(group.submit(Worker.add, n, 0) for n in range(100)))

    assert asyncio.run(main()) == [[n, n + 1, n + 2] for n in range(100)]


@awaits
def test_it_can_be_awaited_after_it_is_done_and_twice(group):
    future = group.submit(Worker.get_rank)
    future.result()

    async def main():
        return await future, await future

    assert asyncio.run(main()) == ([0, 1, 2], [0, 1, 2])


@awaits
def test_several_tasks_may_await_one_future(group, gate):
    async def main():
        future = group.submit(Worker.pass_gate, gate.path)

        async def wait():
            return await future

        waiters = [asyncio.create_task(wait()) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.open, 0, 1, 2)
        return await asyncio.gather(*waiters)

    assert asyncio.run(main()) == [[0, 1, 2]] * 5


@awaits
def test_it_can_be_wrapped_for_asyncio(group):
    async def main():
        return await asyncio.wrap_future(group.submit(Worker.get_rank))

    assert asyncio.run(main()) == [0, 1, 2]


@awaits
def test_a_deadline_reaches_who_awaits(group, gate):
    async def main():
        with pytest.raises(CallTimeout, match=r"0 of 3 answers after 0\.1 s"):
            async with asyncio.timeout(10):
                await group.options(timeout=0.1).submit(Worker.pass_gate, gate.path)
        await asyncio.to_thread(gate.open, 0, 1, 2)
        assert await group.submit(Worker.get_rank) == [0, 1, 2]

    asyncio.run(main())


@awaits
def test_a_cancelled_waiter_leaves_at_once_and_cancels(group, gate):
    async def main():
        future = group.submit(Worker.cancelled_at_gate, gate.path)
        await asyncio.to_thread(gate.entered, 0, 1, 2)

        async def wait():
            return await future

        waiter = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert not future.done()
        gate.open(0, 1, 2)
        return await asyncio.to_thread(future.result)

    assert asyncio.run(main()) == [True] * 3


@awaits
def test_a_cancelled_waiter_of_a_queued_call_drops_it(group, gate):
    group.call(Worker.take_seen)

    async def main():
        group.submit(Worker.pass_gate, gate.path)
        await asyncio.to_thread(gate.entered, 0, 1, 2)
        for number in range(LAST_WINDOW + 5):
            group.submit(Worker.note, number)
        future = group.submit(Worker.note, "dropped")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await future
        assert future.cancelled()
        gate.open(0, 1, 2)
        return await group.submit(Worker.take_seen)

    assert all("dropped" not in seen for seen in asyncio.run(main()))


@awaits
def test_awaiting_a_cancelled_future_is_asyncios_cancelled_error(group, gate):
    group.submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    for number in range(LAST_WINDOW + 5):
        group.submit(Worker.note, number)
    future = group.submit(Worker.note, "dropped")
    assert future.cancel()

    async def main():
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(main())
    gate.open(0, 1, 2)
    group.call(Worker.take_seen)


@awaits
def test_two_loops_in_two_threads(group):
    def run():
        async def main():
            return [await group.submit(Worker.add, n, 0) for n in range(50)]

        return asyncio.run(main())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for got in [pool.submit(run) for _ in range(2)]:
            assert got.result(timeout=30) == [[n, n + 1, n + 2] for n in range(50)]
    assert issubclass(GroupFuture, concurrent.futures.Future)
