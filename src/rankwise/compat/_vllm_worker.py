"""What runs in a worker of `multiproc_worker_utils`.

    driver ==(name | callable | pickled callable)==> rankwise's loop > Served > run_task > method
    driver <==(value | exception)==================< rankwise's loop < logged, if it raises <--'

    _run_worker_process: the same worker behind two queues, for who brings a process (or a thread)
    of his own.

A worker process imports this file, so it imports little.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final, NoReturn, TextIO

    Method = str | bytes | Callable[..., object]

T = TypeVar("T")

NAME: Final = "VllmWorkerProcess"
_TERMINATE: Final = "TERMINATE"  # what a task queue or a result queue carries last
CYAN: Final = "\033[1;36m"
RESET: Final = "\033[0;0m"

logger = logging.getLogger("rankwise.compat.multiproc_worker_utils")

_in_user_code = True  # in the factory, then in each task


@dataclass
class Result(Generic[T]):
    """The outcome of the task `task_id`: its value, or the exception that it raised."""

    task_id: object
    value: T | None = None
    exception: BaseException | None = None


# -- in a process that rankwise has started ---------------------------------------------------


class Served:
    """The worker as rankwise's loop sees it: each of its attributes is a task of the real one."""

    __slots__ = ("_worker",)

    def __init__(self, worker: object) -> None:
        self._worker = worker

    def __getattribute__(self, name: str) -> Any:
        return partial(run_task, _real(self), name)

    # rankwise enters an object that is a context manager, which the original did not do; and an
    # orderly end is told to this one instead.
    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        logger.info("Worker exiting")


def _real(served: Served) -> object:
    return object.__getattribute__(served, "_worker")


def make_worker(environment: Mapping[str, str | None], blob: bytes) -> Served:
    """Make the worker of `blob`, a pickled `(worker_factory, vllm_config, rank)`.

    environment: what the driver has for the variables that rankwise sets; None: it has not. Each
        worker is a group of its own here, so RANK=0 and WORLD_SIZE=1 would be news to its code.

    A factory that fails ends the process, as it did in a `multiprocessing.Process`: whoever watches
    the process learns of it, and the traceback is the last thing that the process says.
    """
    import multiprocessing.process
    import signal

    global _in_user_code
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    multiprocessing.process.current_process().name = NAME
    signal.signal(signal.SIGINT, _interrupt)
    try:
        # Only now: what it imports must not see rankwise's own RANK.
        from rankwise.wire import codec

        worker_factory, vllm_config, rank = codec.loads(blob)
        worker = worker_factory(vllm_config, rank)
    except SystemExit as request:
        _leave_process(_exit_status(request))
    except BaseException:
        import traceback

        print(f"Process {NAME}:", file=sys.stderr)
        traceback.print_exc()
        _leave_process(1)
    logger.info("Worker ready; awaiting tasks")
    _in_user_code = False
    return Served(worker)


def run_task(worker: object, method: Method, /, *args: Any, **kwargs: Any) -> object:
    """Run one task. Its exception is logged and raised; SystemExit and KeyboardInterrupt end the
    process, the latter in order."""
    global _in_user_code
    _in_user_code = True
    try:
        return _bind(worker, method)(*args, **kwargs)
    except SystemExit as request:
        _leave_process(_exit_status(request))
    except KeyboardInterrupt:
        _end_in_order()
    except BaseException:
        _log_failure(NAME, method)
        raise
    finally:
        _in_user_code = False


def _interrupt(number: int, frame: object) -> None:
    """SIGINT: an idle worker ends in order, as the original's loop did."""
    if _in_user_code:
        raise KeyboardInterrupt
    _end_in_order()


def _end_in_order() -> NoReturn:
    from rankwise._serve import write_tunable_results

    write_tunable_results()
    logger.info("Worker exiting")
    _leave_process(0)


def given_worker(
    method: bytes | Callable[..., object], served: Served, /, *args: Any, **kwargs: Any
) -> object:
    """Run a callable (or a pickled one), which is given the real worker first."""
    return run_task(_real(served), method, *args, **kwargs)


def _bind(worker: object, method: Method) -> Callable[..., object]:
    if isinstance(method, str):
        try:
            found: Callable[..., object] = getattr(worker, method)
        except AttributeError as error:
            raise NotImplementedError(f"Method {method!r} is not implemented.") from error
        return found
    if isinstance(method, bytes):
        from rankwise.wire import codec

        return partial(codec.loads(method), worker)
    return partial(method, worker)


def _log_failure(process: str, method: Method) -> None:
    shown = "a pickled callable" if isinstance(method, bytes) else method
    logger.exception("Exception in worker %s while processing method %s.", process, shown)


def _exit_status(request: SystemExit) -> int:
    if request.code is None:
        return 0
    if isinstance(request.code, int):
        return request.code & 0xFF
    print(request.code, file=sys.stderr)
    return 1


def _leave_process(status: int) -> NoReturn:
    """End the process now: rankwise's own loop would take SystemExit for a task's failure."""
    import atexit

    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)


# -- in a process or thread of somebody else's ------------------------------------------------


def _run_worker_process(
    worker_factory: Callable[[Any, int], object],
    task_queue: Any,
    result_queue: Any,
    vllm_config: Any,
    rank: int,
) -> None:
    """A worker's loop: `(task_id, method, args, kwargs)` from one queue, `Result` to the other.

    The queues may be multiprocessing's, or `queue.Queue` where this runs in a thread. It prefixes
    `sys.stdout` and `sys.stderr`, and ends when "TERMINATE" comes, at a KeyboardInterrupt, or with
    a task's SystemExit. What the factory raises is raised.
    """
    import multiprocessing

    from rankwise._serve import write_tunable_results

    process = multiprocessing.current_process().name
    pid = os.getpid()
    _add_prefix(sys.stdout, process, pid)
    _add_prefix(sys.stderr, process, pid)
    worker = worker_factory(vllm_config, rank)
    del worker_factory
    logger.info("Worker ready; awaiting tasks")
    try:
        for task_id, method, args, kwargs in iter(task_queue.get, _TERMINATE):
            result: Result[object] = Result(task_id)
            try:
                result.value = _bind(worker, method)(*args, **kwargs)
            except SystemExit:
                raise
            except KeyboardInterrupt:
                break
            except BaseException as error:
                _log_failure(process, method)
                result.exception = error
            result_queue.put(_fit_to_travel(result, result_queue))
            del result  # a worker that waits keeps nothing of the last task alive
    except KeyboardInterrupt:
        pass
    except Exception:
        logger.exception("Worker failed")
    write_tunable_results()
    logger.info("Worker exiting")


def _fit_to_travel(result: Result[object], queue: object) -> Result[object]:
    """`result`, or the failure to send in its place where it would be lost on its way.

    A multiprocessing queue pickles in a thread, which drops what it cannot pickle; and an exception
    that cannot be rebuilt kills the thread that receives it.
    """
    if not type(queue).__module__.startswith("multiprocessing"):
        return result  # it stays within the process
    from multiprocessing.reduction import ForkingPickler

    try:
        data = ForkingPickler.dumps(result)
        if result.exception is not None:
            ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]
        return result
    except Exception as reason:
        from rankwise.errors import RemoteError, SerializationError

        if result.exception is None:
            why: Exception = SerializationError(f"the result cannot be pickled: {reason}")
        else:
            name = type(result.exception).__qualname__
            why = RemoteError(f"{name}: {result.exception}", pid=os.getpid(), type_name=name)
        return Result(result.task_id, exception=why)


def _add_prefix(file: TextIO, worker_name: str, pid: int) -> None:
    """Have `file.write` put `(worker_name pid=PID) `, in cyan, before each line.

    A line that is written in parts gets it once; an empty write does nothing. `file.start_new_line`
    says whether the next character begins a line. A line and its prefix are one write.
    """
    prefix = f"{CYAN}({worker_name} pid={pid}){RESET} "
    stream: Any = file
    write = stream.write

    def write_with_prefix(text: str) -> int:
        if text:
            lines = text[:-1].replace("\n", "\n" + prefix) + text[-1]
            write(prefix + lines if stream.start_new_line else lines)
            stream.start_new_line = text[-1] == "\n"
        return len(text)

    stream.start_new_line = True
    stream.write = write_with_prefix
