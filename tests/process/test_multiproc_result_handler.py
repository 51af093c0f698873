"""ResultHandler and its futures: who settles what, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import os

import pytest
from drivers import SECONDS, in_thread, until
from vllm_workers import handler, start, value

from rankwise import WorkerDied
from rankwise.compat.multiproc_worker_utils import (
    Result,
    ResultFuture,
    _set_future_result,
)

__all__ = ["handler", "start"]  # fixtures


def test_nothing_is_settled_before_the_handler_is_started(start, handler):
    worker = start()
    future = worker.execute_method("worker_method", 1)
    caller = in_thread(future.get)
    until(lambda: handler.result_queue.qsize() == 1, what="the answer has come")
    assert not future.is_set()
    assert list(handler.tasks.values()) == [future]
    handler.start()
    assert caller.value() == (0, 1)
    assert not handler.tasks


def test_a_future_is_settled_though_nobody_waits_for_it(start, handler):
    handler.start()
    worker = start()
    future = worker.execute_method("worker_method", 1)
    until(lambda: not handler.tasks)
    assert future.result == Result(future.result.task_id, (0, 1))
    second = worker.execute_method("worker_method", 2)
    until(second.is_set)
    assert second.get() == (0, 2)


def test_the_result_queue_takes_results(handler):
    future = ResultFuture()
    failed = ResultFuture()
    handler.tasks.update({"a": future, "b": failed})
    handler.result_queue.put(Result("unknown", value=0))
    handler.result_queue.put("no result at all")
    handler.result_queue.put(Result("a", value=1))
    handler.result_queue.put(Result("b", exception=KeyError("b")))
    handler.start()
    assert value(future) == 1
    with pytest.raises(KeyError):
        value(failed)
    assert not handler.tasks


@pytest.mark.parametrize("started", [False, True])
def test_closing_the_handler_lets_every_waiter_go(start, handler, tmp_path, started):
    fifo = tmp_path / "begun"
    os.mkfifo(fifo)
    if started:
        handler.start()
    worker = start(rank=2)
    future = worker.execute_method("block", str(fifo))
    caller = in_thread(future.get)
    own = handler.tasks["own"] = ResultFuture()
    assert fifo.read_text() == "begun"
    handler.close()
    with pytest.raises(WorkerDied, match=r"^worker died: rank 2 .*block\(\)"):
        caller.value()
    with pytest.raises(ChildProcessError, match=r"^worker died"):
        value(own)
    with pytest.raises(ChildProcessError, match=r"^worker died: rank 2 .*ResultHandler"):
        worker.execute_method("worker_method", 1)
    assert worker.process.is_alive()
    assert not handler.tasks


def test_an_impatient_waiter_leaves_and_the_result_still_comes(start, handler, tmp_path):
    fifo = str(tmp_path / "go")
    os.mkfifo(fifo)
    handler.start()
    future = start().execute_method("read", fifo)
    assert not future.wait(0)
    assert not future.wait(0.01)
    with open(fifo, "w") as go:
        go.write("text")
    until(lambda: not handler.tasks)
    assert future.get() == "text"


def test_a_cancelled_asyncio_caller_leaves_at_once(start, handler, tmp_path):
    fifo = str(tmp_path / "go")
    os.mkfifo(fifo)
    handler.start()
    worker = start()

    async def main():
        coroutine = worker.execute_method_async("read", fifo)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(coroutine, 0.05)
        with open(fifo, "w") as go:
            go.write("text")
        assert await worker.execute_method_async("worker_method", 1) == (0, 1)

    asyncio.run(asyncio.wait_for(main(), SECONDS))
    until(lambda: not handler.tasks)


def test_set_future_result_settles_both_kinds():
    future = ResultFuture()
    _set_future_result(future, Result("id", value=1))
    assert future.get() == 1

    async def main():
        loop = asyncio.get_running_loop()
        made = [loop.create_future() for _ in range(4)]
        await asyncio.to_thread(_set_future_result, made[0], Result("id", value=1))
        await asyncio.to_thread(_set_future_result, made[1], Result("id", exception=KeyError()))
        _set_future_result(made[2], Result("id", exception=StopIteration()))
        made[3].cancel()
        await asyncio.to_thread(_set_future_result, made[3], Result("id", value=1))
        return await asyncio.gather(*made, return_exceptions=True)

    one, error, stopped, cancelled = asyncio.run(main())
    kinds = [type(each) for each in (error, stopped, cancelled)]
    assert (one, kinds) == (1, [KeyError, RuntimeError, asyncio.CancelledError])

    loop = asyncio.new_event_loop()
    orphan = loop.create_future()
    loop.close()
    _set_future_result(orphan, Result("id", value=1))
    assert not orphan.done()
