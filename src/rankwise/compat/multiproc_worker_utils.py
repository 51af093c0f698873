"""A drop-in for `vllm.executor.multiproc_worker_utils`: change the import line, and no more.

    execute_method > _TaskQueue ==frame==> worker process > your method           (_vllm_worker)
    ResultFuture   < Pending < ResultHandler, or the waiter  <==frame==  answer   (_vllm_results,
                                                                              _vllm_handler)
    WorkerMonitor  < WorkerProcess.sentinel: one ends, and all are ended          (_vllm_process)
    set_multiprocessing_worker_envs: before all this, in the parent           (_vllm_environment)

Each ProcessWorkerWrapper is a rankwise group of one rank, so it has what every group has: no queue
that a dying worker can leave locked, workers that go with their driver, answers that cannot be lost
on the way, and a death that says who, how and what was last heard. `docs/migrating-from-vllm.md`
tells what differs from the original.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from rankwise.compat._vllm_calls import make_call
from rankwise.compat._vllm_environment import mp_context, set_multiprocessing_worker_envs
from rankwise.compat._vllm_handler import ResultHandler
from rankwise.compat._vllm_process import WorkerProcess
from rankwise.compat._vllm_results import Pending, ResultFuture, _set_future_result
from rankwise.compat._vllm_worker import (
    _TERMINATE,
    CYAN,
    RESET,
    Result,
    T,
    _add_prefix,
    _run_worker_process,
    logger,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from rankwise.compat._vllm_worker import Method

__all__ = [
    "CYAN",
    "JOIN_TIMEOUT_S",
    "RESET",
    "_TERMINATE",
    "ProcessWorkerWrapper",
    "Result",
    "ResultFuture",
    "ResultHandler",
    "T",
    "WorkerMonitor",
    "_add_prefix",
    "_run_worker_process",
    "_set_future_result",
    "logger",
    "set_multiprocessing_worker_envs",
]

JOIN_TIMEOUT_S = 2

_task_ids = itertools.count(1)


class ProcessWorkerWrapper:
    """One worker process, and the calls of its methods.

    result_handler: where its results go; its `tasks` has the open ones.
    worker_factory: called in the worker as `worker_factory(vllm_config, rank)`; what `__main__`
        defines travels by value. Where it fails, the process ends.
    rank: shows in errors.

    Returns at once, while the process starts. Raises SerializationError for a factory or a
    configuration that cannot travel.
    """

    #: How a worker's output is shown: "prefix", "inherit" (lines as they are, JSON say) or "off".
    logs = "prefix"

    def __init__(
        self,
        result_handler: ResultHandler,
        worker_factory: Callable[[Any, int], object],
        vllm_config: Any,
        rank: int,
    ) -> None:
        self.mp = mp_context()
        self.rank = rank
        self.result_queue = result_handler.result_queue
        self.tasks = result_handler.tasks
        self.process = WorkerProcess(worker_factory, vllm_config, rank, self.logs)
        self._task_queue = _TaskQueue(self.process, result_handler)

    def execute_method(self, method: Method, *args: Any, **kwargs: Any) -> ResultFuture[Any]:
        """Send a task, and return its future at once.

        method: a name, or a callable (or one pickled by cloudpickle), given the worker first.
        Raises SerializationError for what cannot travel, MemoryError where there is no room for it,
        ChildProcessError for a worker that has ended or was asked to.
        """
        future: ResultFuture[Any] = ResultFuture()
        self._enqueue_task(future, method, args, kwargs)
        return future

    async def execute_method_async(self, method: Method, *args: Any, **kwargs: Any) -> Any:
        """Send a task, and await its value in the running loop. Raises as `execute_method`."""
        from asyncio import get_running_loop

        loop = get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        pending = self._enqueue_task(future, method, args, kwargs)
        try:
            await pending.attend_in(loop)
        except BaseException:
            future.cancel()
            raise
        return await future

    def _enqueue_task(
        self,
        future: ResultFuture[Any] | asyncio.Future[Any],
        method: Method,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Pending:
        task_id = next(_task_ids)
        self.tasks[task_id] = future
        try:
            return self._task_queue.send(task_id, method, args, kwargs)
        except BaseException as error:
            self._task_queue.forget(task_id)
            if isinstance(error, ValueError) and self._task_queue.closed:
                raise self.process.died() from None
            raise

    def terminate_worker(self) -> None:
        """Ask the worker to finish after what is queued; kill it where it was asked before."""
        try:
            self._task_queue.put(_TERMINATE)
        except ValueError:
            self.process.kill()
        self._task_queue.close()

    def kill_worker(self) -> None:
        """Take no more tasks, and kill the process."""
        self._task_queue.close()
        self.process.kill()


class _TaskQueue:
    """Takes `(task_id, method, args, kwargs)`, or "TERMINATE" to end the worker."""

    def __init__(self, process: WorkerProcess, handler: ResultHandler) -> None:
        self._process = process
        self._handler = handler
        self._ended = False

    @property
    def closed(self) -> bool:
        return self._ended or self._handler.closed

    def put(self, item: Any) -> None:
        """Send a task. Raises ValueError where the queue is closed, WorkerDied where the worker is
        no more, SerializationError before anything is sent."""
        if isinstance(item, str) and item == _TERMINATE:
            self._check_open()
            self._process.finish_queued()
        else:
            self.send(*item)  # pyright: ignore[reportArgumentType]

    def send(
        self, task_id: object, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pending:
        """`put`, for a task: gives the way to its answer."""
        self._check_open()
        call = make_call(method, args, kwargs, self._process.arena)
        pending = Pending(task_id, call, self._process, self._handler)
        future = self._handler.tasks.get(task_id)
        if isinstance(future, ResultFuture):
            future.pending = pending
        self._handler.expect(pending)
        self._process.submit(call, self._handler.running)
        return pending

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError("the task queue is closed")

    def forget(self, task_id: object) -> None:
        """A task was not sent after all."""
        self._handler.forget(task_id)

    def close(self) -> None:
        self._ended = True


class WorkerMonitor(threading.Thread):
    """Ends all workers when one of them ends. A daemon thread, not started by its constructor."""

    def __init__(
        self, workers: Sequence[ProcessWorkerWrapper], result_handler: ResultHandler
    ) -> None:
        super().__init__(name="rankwise-monitor", daemon=True)
        self.workers = workers
        self.result_handler = result_handler
        self._first = threading.Lock()  # taken, for good, by who ends the workers

    def run(self) -> None:
        """Sleep until any worker ends; then, unless `close` was called, end the others."""
        from multiprocessing.connection import wait

        ended = wait([worker.process.sentinel for worker in self.workers])
        if self._first.acquire(blocking=False):
            self._end_the_others([w for w in self.workers if w.process.sentinel in ended])
        for worker in self.workers:
            worker.process.join(JOIN_TIMEOUT_S)

    def _end_the_others(self, ended: list[ProcessWorkerWrapper]) -> None:
        for worker in ended:
            worker.process.join(JOIN_TIMEOUT_S)
        for worker in self.workers:
            process = worker.process
            if process.exitcode is not None and process.exitcode != 0:
                logger.error(
                    "Worker %s pid %s died, exit code: %s",
                    process.name,
                    process.pid,
                    process.exitcode,
                )
        logger.info("Killing local vLLM worker processes")
        # What the callers of the others hear is who died first, not that we killed theirs.
        first = min(ended, key=lambda worker: not worker.process.exitcode).process
        for worker in self.workers:
            if isinstance(worker.process, WorkerProcess):
                worker.process.end_with(first)
        for worker in self.workers:
            worker.kill_worker()
        self.result_handler.close()  # last: by now no task can come in

    def close(self) -> None:
        """Ask all workers to finish, and close the handler. A second call does nothing."""
        if self._first.acquire(blocking=False):
            logger.info("Terminating local vLLM worker processes")
            for worker in self.workers:
                worker.terminate_worker()
            self.result_handler.close()
