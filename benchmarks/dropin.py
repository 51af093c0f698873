"""The drop-in for the queue design's module, used as that one is.

A worker object a rank, futures settled by a ResultHandler, a monitor beside it; one
`execute_method` a rank, then `get` of all.
"""

from __future__ import annotations

from collections.abc import Callable

from rankwise.compat.multiproc_worker_utils import (
    ProcessWorkerWrapper,
    ResultHandler,
    WorkerMonitor,
)


class DropIn:
    """`world_size` workers made by `factory(None, rank)`, which `call(method, x)` calls."""

    def __init__(self, world_size: int, factory: Callable[[object, int], object]) -> None:
        self._handler = ResultHandler()
        self._workers = [
            ProcessWorkerWrapper(self._handler, factory, None, rank) for rank in range(world_size)
        ]
        self._monitor = WorkerMonitor(self._workers, self._handler)
        self._handler.start()
        self._monitor.start()

    def call(self, method: str, value: object) -> list[object]:
        futures = [worker.execute_method(method, value) for worker in self._workers]
        return [future.get() for future in futures]

    def close(self) -> None:
        self._monitor.close()
        self._monitor.join()
