"""Calls from event loops: asyncio's and uvloop's, one and several."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest
from asyncio_ranks import Worker
from drivers import Watch, in_thread, remove_fifo, until
from kernel import children

from rankwise import GroupClosed, StartupError, WorkerDied, WorkerGroup

uvloop = pytest.importorskip("uvloop")

pytestmark = pytest.mark.leaks_allowed(
    "the shared group keeps the epoll of a loop that has closed until the next comes, or its own"
    " close, and its callback thread starts with the first callback"
)

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def shared():
    group = WorkerGroup(Worker, 2)
    group.submit("echo", 0).add_done_callback(lambda future: future.result())
    group.flush()  # its callback thread is there from here on, and nothing that a test has left
    yield group
    group.kill()


@pytest.fixture
def group(shared):
    yield shared
    assert shared.options(timeout=10).call("echo", "still usable") == ["still usable"] * 2


@pytest.fixture(params=LOOPS)
def run(request):
    """asyncio.run with either loop, bounded."""

    def run(main, seconds=20):
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:

            async def bounded():
                return await asyncio.wait_for(main, seconds)

            return runner.run(bounded())

    return run


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    yield path
    remove_fifo(path)


def let_go(path, text="held", times=1):
    for _ in range(times):
        with open(path, "wb") as file:
            file.write(text.encode())


def test_a_future_is_awaited(group, run):
    async def main():
        return await group.submit("echo", 5), await group[1].submit("echo", 6)

    assert run(main()) == ([5, 5], 6)


def test_a_future_may_be_awaited_twice_and_by_several_tasks(group, run):
    async def main():
        future = group.submit("echo", 5)

        async def wait():
            return await future

        return await asyncio.gather(*(wait() for _ in range(10))), await future

    assert run(main()) == ([[5, 5]] * 10, [5, 5])


def test_a_failure_is_raised_in_the_awaiting_task(group, run):
    async def main():
        with pytest.raises(LookupError, match="here"):
            await group[0].submit("fails", "here")
        return True

    assert run(main())


def test_a_thousand_calls_gathered_come_home_in_order(group, run):
    async def main():
        async def one(number):
            return await group.submit("echo", number)

        return await asyncio.gather(*(one(number) for number in range(1000)))

    assert run(main()) == [[number] * 2 for number in range(1000)]


def test_several_loops_in_several_threads(group):
    def loop(kind, number):
        async def main():
            for step in range(200):
                assert await group.submit("echo", (number, step)) == [(number, step)] * 2
            return number

        with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
            return runner.run(main())

    threads = [in_thread(lambda k=k, n=n: loop(k, n)) for n, k in enumerate([*LOOPS] * 3)]
    plain = in_thread(lambda: [group.call("echo", n) for n in range(500)])
    assert [thread.value(30) for thread in threads] == list(range(6))
    assert plain.value(30) == [[n, n] for n in range(500)]


def test_wait_for_leaves_at_once_and_cancels_the_call(group, run, fifo):
    async def main():
        held = group[0].submit("hold", fifo)
        running = group[1].submit("cancelled")
        began = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(held, 0.05)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(running, 0.05)
        assert time.monotonic() - began < 5
        assert not held.done()
        assert await asyncio.to_thread(running.result, 5) == "saw it"
        await asyncio.to_thread(let_go, fifo)
        assert held.result(5) == "held"
        return True

    assert run(main())


def test_a_cancelled_task_drops_a_queued_call_on_all_ranks(group, run, fifo):
    group.call(lambda worker: setattr(worker, "ran", []))

    async def main():
        held = group[0].submit("hold", fifo)
        filler = [group[0].submit("echo", b"x" * 100_000) for _ in range(200)]

        async def wait():
            await group[0].submit(lambda worker: worker.ran.append("cancelled one"))

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.02)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 5
        await asyncio.to_thread(let_go, fifo)
        await held
        for future in filler:
            await future
        return await group[0].submit(lambda worker: worker.ran)

    assert run(main()) == []


def test_a_loop_that_is_blocked_does_not_keep_a_threads_call(group, run, fifo):
    async def main():
        task = asyncio.create_task(asyncio.wait_for(group.submit("echo", "slow loop"), 10))
        await asyncio.sleep(0)  # it awaits now
        other = in_thread(lambda: [group.call("echo", n) for n in range(50)])
        assert other.value(5) == [[n, n] for n in range(50)]  # this blocks the loop
        callback = threading.Event()
        group.submit("echo", 1).add_done_callback(lambda future: callback.set())
        assert callback.wait(5)
        return await task

    assert run(main()) == ["slow loop"] * 2


def test_calls_in_the_loops_own_thread_while_tasks_await(group, run):
    async def main():
        tasks = [
            asyncio.create_task(asyncio.wait_for(group.submit("echo", n), 10)) for n in range(20)
        ]
        await asyncio.sleep(0)
        assert group.call("echo", "plain") == ["plain"] * 2
        return await asyncio.gather(*tasks)

    assert run(main()) == [[n, n] for n in range(20)]


def test_a_loop_that_was_closed_while_a_call_was_open_is_forgotten(group, fifo):
    for kind in LOOPS.values():
        loop = kind()

        async def main():
            future = group[0].submit("hold", fifo)
            task = asyncio.ensure_future(asyncio.wait_for(future, 20))
            await asyncio.sleep(0.01)
            return future, task

        future, task = loop.run_until_complete(main())
        task._log_destroy_pending = False
        loop.close()
        let_go(fifo)
        assert in_thread(lambda future=future: future.result(5)).value(8) == "held"
        assert group.options(timeout=5).call("echo", 1) == [1, 1]


def test_as_completed_and_wrap_future_work(group, run):
    async def main():
        futures = [group.submit("echo", n) for n in range(20)]
        wrapped = [asyncio.wrap_future(future) for future in futures]
        first = [await future for future in asyncio.as_completed(wrapped)]
        return sorted(value[0] for value in first)

    assert run(main()) == list(range(20))


def test_the_loop_is_not_held_up_by_a_thousand_calls(group, run):
    async def main():
        worst = 0.0
        stop = False

        async def tick():
            nonlocal worst
            while not stop:
                began = time.monotonic()
                await asyncio.sleep(0.001)
                worst = max(worst, time.monotonic() - began)

        ticker = asyncio.create_task(tick())
        for _ in range(20):
            await asyncio.gather(
                *(asyncio.wait_for(group.submit("echo", 1), 10) for _ in range(50))
            )
        stop = True
        await ticker
        return worst

    assert any(run(main()) < 0.5 for _ in range(3)), "a machine that stalls has a better round"


def test_a_death_is_raised_in_every_awaiting_task(run, fifo):
    async def main():
        async with WorkerGroup.start(Worker, 2, logs="off") as group:
            tasks = [asyncio.ensure_future(asyncio.wait_for(group.submit("hold", fifo), 20))
                     for _ in range(5)]  # fmt: skip
            await asyncio.sleep(0.05)
            began = time.monotonic()
            os.kill(group.pids[1], signal.SIGKILL)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began < 5
            return [type(error) for error in errors]

    assert run(main()) == [WorkerDied] * 5


def test_start_can_be_awaited_and_aclose_does_not_block_the_loop(run, fifo):
    async def main():
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                await asyncio.sleep(0.005)
                beats += 1

        beating = asyncio.create_task(beat())
        group = await WorkerGroup.start(Worker, 2)
        assert beats > 2
        assert await group.submit("echo", 1) == [1, 1]
        future = group[0].submit("hold", fifo)
        closing = asyncio.create_task(group.aclose(None))
        before = beats
        while beats - before <= 5:
            await asyncio.sleep(0.005)
        assert not closing.done()
        await asyncio.to_thread(let_go, fifo)
        await closing
        assert future.done()
        with pytest.raises(GroupClosed):
            group.submit("echo", 1)
        beating.cancel()
        return True

    assert run(main())


def test_a_start_that_fails_raises_startup_error(run):
    async def main():
        with pytest.raises(StartupError, match="no such model") as caught:
            await WorkerGroup.start(Worker, 2, kwargs={"fail": True}, logs="off")
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(StartupError):
            async with WorkerGroup.start(Worker, 2, kwargs={"fail": True}, logs="off"):
                raise AssertionError("the body must not run")
        return True

    assert run(main())


def test_a_wrong_argument_is_raised_by_start_itself():
    with pytest.raises((TypeError, ValueError)):
        WorkerGroup.start(Worker, 0)
    with pytest.raises(TypeError):
        WorkerGroup.start(Worker, 2, no_such_option=1)


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.05, 0.1, 0.2])
def test_a_start_that_is_cancelled_leaves_nothing(run, fifo, after):
    before = children(os.getpid())

    async def main():
        async def start():
            return await WorkerGroup.start(Worker, 2, args=(fifo,), logs="off")

        task = asyncio.create_task(start())
        await asyncio.sleep(after)
        with Watch(children(os.getpid()) - before) as watch:
            task.cancel()
            began = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - began < 6
            assert await asyncio.to_thread(watch.left, 3) == []
        return True

    assert run(main())
    until(lambda: children(os.getpid()) <= before, 5)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("rankwise-")
                       and "workers" in t.name] or True, 5)  # fmt: skip


def test_leaving_the_block_with_an_exception_closes_and_raises_it(run):
    async def main():
        with pytest.raises(KeyError):
            async with WorkerGroup.start(Worker, 2) as group:
                pids = group.pids
                raise KeyError("mine")
        with Watch(pids) as watch:
            assert watch.left(0) == []
        return True

    assert run(main())
