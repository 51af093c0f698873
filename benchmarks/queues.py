"""The design that rankwise succeeds: a task queue a worker, one result queue, and a thread.

Written afresh after its description: each worker takes `(id, method, args, kwargs)` from a
`multiprocessing` queue of its own, all put their results into one shared queue, a handler thread
takes them out and sets the event that the caller waits for.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from multiprocessing.context import SpawnContext


class _Pending(threading.Event):
    value: object = None


class Queues:
    """`world_size` spawned processes that answer `call(x)` with `x`."""

    def __init__(self, world_size: int) -> None:
        context: SpawnContext = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(world_size)]
        self._workers = [
            context.Process(target=serve, args=(tasks, self._results), daemon=True)
            for tasks in self._tasks
        ]
        for worker in self._workers:
            worker.start()
        self._open: dict[int, _Pending] = {}
        self._ids = itertools.count()
        self._handler = threading.Thread(target=self._handle, daemon=True)
        self._handler.start()

    def _handle(self) -> None:
        while (result := self._results.get()) is not None:
            number, value = result
            pending = self._open.pop(number)
            pending.value = value
            pending.set()

    def call(self, value: object) -> list[object]:
        waiting = []
        for tasks in self._tasks:
            number = next(self._ids)
            pending = _Pending()
            self._open[number] = pending
            tasks.put((number, "echo", (value,), {}))
            waiting.append(pending)
        for pending in waiting:
            pending.wait()
        return [pending.value for pending in waiting]

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for worker in self._workers:
            worker.join()
        self._results.put(None)
        self._handler.join()


def serve(tasks: multiprocessing.Queue, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    while (task := tasks.get()) is not None:
        number, _, args, _ = task
        results.put((number, args[0]))
