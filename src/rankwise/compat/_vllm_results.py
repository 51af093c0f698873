"""Results on their way to who waits for them.

    answer of a worker > _arrived > ResultQueue > ResultHandler.run > future            nobody waits
    answer of a worker > Pending.attend, in the waiter's own thread > future    somebody does

In the module that this one succeeds every result passes through the handler's thread. Here that is
the way of a result that nobody waits for. Who waits in `get()`, or awaits, reads the worker's
socket himself, once the handler has been started, and settles the future as the handler would have
done: out of `tasks` first. Whoever comes first to decode an answer takes its ticket.

A task is not watched at first: its caller is about to wait for it, and a thread of ours that wakes
for the answer too would only be in his way (for eight workers, eight of them). The handler looks at
the open tasks every 10 ms, and has those watched that it has seen before.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar, cast

from rankwise._deadline import check_timeout, deadline, left
from rankwise.compat._vllm_worker import Result

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator

    from rankwise._calls import Call
    from rankwise.compat._vllm_handler import ResultHandler
    from rankwise.compat._vllm_process import WorkerProcess

T = TypeVar("T")


class Pending:
    """A task that was sent to a worker; its answer, once the call is settled."""

    __slots__ = (
        "__weakref__", "_ticket", "_waiting", "call", "handler", "looks", "process", "task_id",
    )  # fmt: skip

    def __init__(
        self, task_id: object, call: Call, process: WorkerProcess, handler: ResultHandler
    ) -> None:
        self.task_id = task_id
        self.call = call
        self.process = process
        self.handler = handler
        self._waiting: list[None] = []  # one item a waiter; lists change in one step
        self._ticket = [None]
        self.looks = 0  # of the handler
        # Weak: a channel keeps the call that it was sending when its worker died, and a process
        # that its own calls keep alive is never collected. `handler.sent` has us while we matter.
        call.watchers = [partial(_arrived, weakref.ref(self))]

    def watch(self) -> None:
        """Have the answer read as it comes, unless somebody waits for it and reads it himself."""
        if not self._waiting:
            self.process.watch(self.call)

    def take(self) -> bool:
        """Whether the caller is to decode it: True for one caller alone."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def result(self) -> Result[Any]:
        value, exception = self.process.outcome(self.call)
        return Result(self.task_id, value, exception)

    def settle(self) -> None:
        """Decode the answer and settle its future, unless somebody else is at it."""
        if self.take():
            try:
                self.handler.settle(self.result())
            except BaseException:  # ^C, say
                self._ticket.append(None)
                raise

    def attend(self, until: float | None) -> None:
        """Wait for the answer, reading the worker's socket, and settle the future with it."""
        if not self.handler.running:
            return  # nothing is settled before the handler runs
        self._waiting.append(None)
        try:
            if self.process.wait(self.call, until):
                self.settle()
        finally:
            self._leave()

    def look(self) -> None:
        """Settle the future if the answer is there. Never waits."""
        if self.handler.running:
            self.process.look(self.call)
            if self.call.done:
                self.settle()

    async def attend_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """The same in an event loop."""
        if not self.handler.running:
            return
        self._waiting.append(None)
        try:
            if not self.call.done:
                await _Arrival(self, loop)
            self.settle()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._waiting.pop()
        if not self.call.done:
            self.process.watch(self.call)  # patience ran out, and may be all that there was
        elif self.task_id in self.handler.tasks:
            self.handler.result_queue.put(self)  # we were interrupted: then it is the handler's

    def close(self) -> Result[Any]:
        """The handler ends: the result that is there by now, or that it will not come."""
        if self.call.done:
            return self.result()
        return Result(self.task_id, exception=self.process.died(self.call))

    def release(self) -> None:
        """The future has been settled: let go who still waits for the answer."""
        if not self.call.done:
            self.process.settle(self.call)


def _arrived(pending: weakref.ref[Pending]) -> None:
    """The call is settled. Runs where the sockets are read: it may only pass the word on."""
    self = pending()
    if self is None or self.task_id not in self.handler.sent:
        return  # its future has been settled without it
    if not (self._waiting and self.handler.running):
        self.handler.result_queue.put(self)


class _Arrival(NamedTuple):
    pending: Pending
    loop: asyncio.AbstractEventLoop

    def __await__(self) -> Generator[object, None, None]:
        return self.pending.process.await_call(self.pending.call, self.loop)


class ResultQueue(SimpleQueue[Any]):
    """Takes `Result` objects, and gives them; what a worker has answered is decoded by `get`."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        while True:
            item = super().get(block, timeout)
            if not isinstance(item, Pending):
                return item
            if item.take():
                return item.result()

    def get_nowait(self) -> Any:
        return self.get(False)


class ResultFuture(threading.Event, Generic[T]):
    """A task's outcome to come, for threads: set once `result` is there."""

    def __init__(self) -> None:
        super().__init__()
        self.result: Result[T] | None = None
        self.pending: Pending | None = None

    def is_set(self) -> bool:
        pending = self.pending
        if pending is not None and not super().is_set():
            pending.look()
        return super().is_set()

    def set_result(self, result: Result[T]) -> None:
        """Settle it, and let everybody go who waits for it."""
        self.result = result
        self.set()
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is settled, `timeout` seconds at most. Returns whether it is."""
        pending = self.pending
        if pending is None or super().is_set():
            return super().wait(timeout)
        until = deadline(check_timeout(timeout))
        pending.attend(until)
        return super().wait(left(until))

    def get(self) -> T:
        """Wait, and return the task's value or raise its exception.

        Raises WorkerDied, a ChildProcessError that begins with "worker died", where none will come.
        """
        self.wait()
        result = self.result
        assert result is not None
        if result.exception is not None:
            raise result.exception
        return cast("T", result.value)


def _set_future_result(
    future: ResultFuture[Any] | asyncio.Future[Any], result: Result[Any]
) -> None:
    """Settle either kind of future, from any thread. One whose loop is closed is left alone."""
    if isinstance(future, ResultFuture):
        future.set_result(result)
        return
    from asyncio import _get_running_loop

    loop = future.get_loop()
    if loop.is_closed():
        return
    if _get_running_loop() is loop:
        _settle_in_loop(future, result)
        return
    with suppress(RuntimeError):  # it is closed just now
        loop.call_soon_threadsafe(_settle_in_loop, future, result)


def _settle_in_loop(future: asyncio.Future[Any], result: Result[Any]) -> None:
    if future.done():
        return  # its task was cancelled
    if result.exception is None:
        future.set_result(result.value)
        return
    try:
        future.set_exception(result.exception)
    except TypeError as error:  # asyncio takes no StopIteration, and the caller would wait for ever
        future.set_exception(RuntimeError(f"the task raised {result.exception!r}: {error}"))
