"""ResultHandler: the thread that settles futures, and sees to the tasks that nobody waits for.

result_queue > run > settle > out of `tasks` > the future
sent, looked at twice > Pending.watch > its answer comes through result_queue
close > "TERMINATE" > run ends > every open future is settled: "worker died"
"""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import Empty
from typing import Any

from rankwise._deadline import clock
from rankwise.compat._vllm_results import Pending, ResultFuture, ResultQueue, _set_future_result
from rankwise.compat._vllm_worker import _TERMINATE, Result, logger
from rankwise.errors import WorkerDied

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Final

LOOK: Final = 0.01  # seconds between two looks at the open tasks
ENOUGH: Final = 2  # looks at a task before it is watched
LINGER: Final = 50  # looks in vain before the thread sleeps until there is a new task

_WAKE: Final = object()


class ResultHandler(threading.Thread):
    """Settles the futures of all workers. A daemon thread; `start()` is the caller's to call.

    result_queue: takes `Result` objects. tasks: the open ones, task id -> ResultFuture or
    asyncio.Future; an entry goes when its future is settled.
    """

    def __init__(self) -> None:
        super().__init__(name="rankwise-results", daemon=True)
        self.result_queue = ResultQueue()
        self.tasks: dict[object, ResultFuture[Any] | asyncio.Future[Any]] = {}
        self.running = False  # from now on who waits may settle his future himself
        self.closed = False
        self.sent: dict[object, Pending] = {}
        self._order = threading.Lock()
        self._dozing = False
        self._idle_looks = 0
        self._look_at = 0.0

    def run(self) -> None:
        self.running = True
        try:
            for result in iter(self._next, _TERMINATE):
                try:
                    self.settle(result)
                except Exception:
                    # What was put here is no Result, say. The answers behind it matter more.
                    logger.exception("a result could not be handed over")
                del result  # the thread, while it waits, keeps no value alive
        finally:
            self.running = False
            self._settle_all()

    def _next(self) -> Any:
        """The next of the queue. Until it comes, look after the tasks that nobody waits for."""
        while True:
            # First the word, then the look at `sent`; `expect` does it the other way round, so
            # that one of us sees the other.
            self._dozing = self._idle_looks >= LINGER
            if self._dozing and self._young():
                self._dozing = False
            result: Any = _WAKE
            with suppress(Empty):
                result = self.result_queue.get(True, None if self._dozing else LOOK)
            if clock() >= self._look_at:
                self._look()
            if result is not _WAKE:
                return result

    def _look(self) -> None:
        self._look_at = clock() + LOOK
        young = self._young()
        self._idle_looks = 0 if young else self._idle_looks + 1
        for pending in young:
            pending.looks += 1
            if pending.looks == ENOUGH:
                pending.watch()

    def _young(self) -> list[Pending]:
        """The open tasks that may not be watched yet. (Not kept by the thread while it waits.)"""
        return [pending for pending in list(self.sent.values()) if pending.looks < ENOUGH]

    def close(self) -> None:
        """End the thread. Every task that is open then gets a ChildProcessError."""
        with self._order:
            self.closed = True
        self.result_queue.put(_TERMINATE)
        if self.ident is None and not self.running:
            self._settle_all()  # it was never started, and nobody is to wait for ever

    def expect(self, pending: Pending) -> None:
        """`pending`, whose future is in `tasks`, is about to be sent. ValueError: we are closed."""
        # Either close() comes first and the task is refused, or this does and `_settle_all` finds
        # it: no task can slip in between and wait for ever.
        with self._order:
            if self.closed:
                raise ValueError("the ResultHandler is closed")
            self.sent[pending.task_id] = pending
            if self._dozing:
                self._dozing = False
                self.result_queue.put(_WAKE)

    def forget(self, task_id: object) -> None:
        self.tasks.pop(task_id, None)
        self.sent.pop(task_id, None)

    def settle(self, result: Result[Any]) -> None:
        """Settle the future of `result`; one that is not known is nobody's any more."""
        self.sent.pop(result.task_id, None)
        future = self.tasks.pop(result.task_id, None)
        if future is not None:
            _set_future_result(future, result)

    def _settle_all(self) -> None:
        for task_id in list(self.tasks):
            future = self.tasks.pop(task_id, None)
            pending = self.sent.pop(task_id, None)
            if future is None:
                continue
            if pending is None:
                error = WorkerDied("worker died: the ResultHandler was closed")
                _set_future_result(future, Result(task_id, exception=error))
            else:
                _set_future_result(future, pending.close())
                pending.release()
