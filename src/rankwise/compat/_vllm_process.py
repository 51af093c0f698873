"""One worker process of `multiproc_worker_utils`: a group of one rank, seen as a process.

    WorkerProcess(...) > launch > launcher > make_worker      returns at once
    .submit, .wait     > the group's engine                   the call path of every group
    .sentinel          < pidfd of the worker: readable from the moment it ends
    .exitcode, .died() < the launcher's exit report
    .join()            > the end is seen > the group is closed: launcher, threads, descriptors

Who ends what: a killed worker breaks its group, whose launcher then goes by itself; a worker that
was asked to finish leaves a launcher that `join` (or the collection of this object, or the exit of
the interpreter) ends.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import select
import signal
import threading
import warnings
import weakref
from functools import partial
from typing import Any, cast

from rankwise import _procfs
from rankwise._answers import died
from rankwise._calls import Call, Closed, Garbled, Lost
from rankwise._deadline import check_timeout, deadline, left
from rankwise._messages import FAILED
from rankwise._methods import method_name
from rankwise._outcome import failure
from rankwise._spec import RANK_VARIABLES, check_spec
from rankwise.backends import launch
from rankwise.compat._vllm_worker import NAME, given_worker, make_worker
from rankwise.errors import RemoteError, WorkerDied
from rankwise.wire import codec
from rankwise.wire.culprit import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Generator

    from rankwise._engine import Engine
    from rankwise.backends.local import LocalEngine
    from rankwise.compat._vllm_worker import Method

START_PATIENCE = 10.0  # seconds until the launcher has said which process it started
REPORT_PATIENCE = 1.0  # seconds between the end of a process and the launcher's report of it
# One for all workers of this driver, so that sets iterate alike in all of them.
HASH_SEED = str(secrets.randbelow(1 << 32))

_alive: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


class WorkerProcess:
    """What of `multiprocessing.Process` a worker's owner uses; and the calls of that worker.

    Raises SerializationError where the factory or the configuration cannot travel.
    """

    name = NAME
    daemon = True

    def __init__(self, worker_factory: object, vllm_config: object, rank: int, logs: str) -> None:
        roots = {"worker_factory": worker_factory, "vllm_config": vllm_config, "rank": rank}
        try:
            blob = codec.dumps(tuple(roots.values()))
        except Exception as error:
            raise explain("what makes the worker", roots, error) from error
        seed = os.environ.get("PYTHONHASHSEED")
        spec = check_spec(
            make_worker,
            1,
            args=({key: os.environ.get(key) for key in (*RANK_VARIABLES, "PYTHONHASHSEED")}, blob),
            name=NAME,
            env=None if seed and seed.isdigit() else {"PYTHONHASHSEED": HASH_SEED},
            threads=None,
            logs=logs,
        )
        engine, boot = launch(spec)
        self.rank = rank
        self._engine = cast("LocalEngine", engine)
        self._ended_by: WorkerProcess | None = None
        self._pidfd: int | None = None
        self._sentinel: int | None = None
        self._lock = threading.Lock()
        weakref.finalize(self, _abandon, self._engine, rank).atexit = False
        _when_settled(self._engine, boot, partial(setattr, engine, "starting", False))
        if logs == "prefix":
            _show_original_prefix(self._engine)
        _alive.add(self)

    def __repr__(self) -> str:
        code = self.exitcode
        state = "alive" if code is None else f"exitcode {code}"
        return f"<WorkerProcess {self.name} rank={self.rank} pid={self._pid()} {state}>"

    # -- as a process -------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Its process id; None where it could not be started. Waits until it has been."""
        return self._pid(deadline(START_PATIENCE))

    ident = pid

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once the process has ended, for `connection.wait`."""
        sentinel = self._open_sentinel(deadline(START_PATIENCE))
        if sentinel is None:
            raise TimeoutError(f"the worker of rank {self.rank} was not started in time")
        return sentinel

    @property
    def exitcode(self) -> int | None:
        """None while it runs; its exit status, or minus the number of the signal that killed it."""
        if not self._await_end(0.0):
            return None
        report = self._engine.ranks.reports.get(0)
        if report is not None and report.exitcode is not None:
            return report.exitcode
        # The launcher, and with it the report, is gone: the kernel has sent the worker SIGKILL.
        return 1 if self._pid() is None else -signal.SIGKILL

    def is_alive(self) -> bool:
        return not self._await_end(0.0)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, `timeout` seconds at most. Then nothing is left of it."""
        if self._await_end(deadline(check_timeout(timeout))):
            self._engine.close(REPORT_PATIENCE)

    def terminate(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._open_sentinel(deadline(START_PATIENCE)) is None:
            self._engine.finish()  # its launcher is stuck; whatever it has begun ends with it
        elif self._pidfd is not None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def _pid(self, until: float | None = 0.0) -> int | None:
        ranks = self._engine.ranks
        if 0 not in ranks.pids:
            _wait_news(self._engine, lambda: 0 in ranks.pids or _is_over(self._engine), until)
        return ranks.pids.get(0)

    def _open_sentinel(self, until: float | None) -> int | None:
        """The sentinel; None where the process has not been started until then."""
        if self._sentinel is None:
            pid = self._pid(until)
            if pid is None and not _is_over(self._engine):
                return None
            with self._lock:
                if self._sentinel is None:
                    self._pidfd = self._open_pidfd(pid)
                    # Ended already, or never begun: something that is readable for good.
                    fd = os.eventfd(1, os.EFD_CLOEXEC) if self._pidfd is None else self._pidfd
                    weakref.finalize(self, os.close, fd).atexit = False
                    self._sentinel = fd
        return self._sentinel

    def _open_pidfd(self, pid: int | None) -> int | None:
        if pid is None or 0 in self._engine.ranks.reports:
            return None
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        process = _procfs.stat(pid)
        if process is not None and process.starttime == self._engine.ranks.starttimes[0]:
            return fd
        os.close(fd)  # it has ended, and its number is somebody else's
        return None

    def _await_end(self, until: float | None) -> bool:
        """Wait for the end of the process, and then for the report of it."""
        if 0 in self._engine.ranks.reports:
            return True
        sentinel = self._open_sentinel(until)
        if sentinel is None:
            return False
        poll = select.poll()
        poll.register(sentinel, select.POLLIN)
        seconds = left(until)
        if not poll.poll(None if seconds is None else seconds * 1000):
            return False
        reports = self._engine.ranks.reports
        soon = deadline(REPORT_PATIENCE)
        _wait_news(self._engine, lambda: 0 in reports or _is_gone(self._engine), soon)
        return True

    # -- its calls ----------------------------------------------------------------------------

    def make_call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call of a task. Raises SerializationError."""
        if isinstance(method, str):
            return Call(method, codec.encode_call(method, args, kwargs), (0,), shape=0)
        name = "pickled callable" if isinstance(method, bytes) else method_name(method)
        sent = partial(given_worker, method)
        return Call(name, codec.encode_call(sent, args, kwargs), (0,), shape=0)

    def submit(self, call: Call) -> None:
        """Send `call`, never blocks. Raises WorkerDied where the worker takes no more."""
        if self._engine.submit((call,)) is not None:
            raise self.died()

    def wait(self, call: Call, until: float | None) -> bool:
        return self._engine.wait(call, until)

    def await_call(self, call: Call, loop: AbstractEventLoop) -> Generator[object, None, None]:
        return self._engine.await_call(call, loop)

    def settle(self, call: Call) -> None:
        """Let everybody who waits for `call` go; the worker may go on with it."""
        _settle_early(self._engine, call)

    def finish_queued(self) -> None:
        """Ask the worker to end once it has done what was sent. Takes no more calls."""
        engine = self._engine
        if engine.refusal() is None:
            engine.refuse()
            done = Call("terminate", b"", ())
            done.watchers = [engine.send_exits]
            engine.barrier(done)
            engine.pump.tell()  # nobody else does where nothing was open

    def outcome(self, call: Call) -> tuple[object, BaseException | None]:
        """(value, exception) of the settled `call`. Unpickles: not under a lock."""
        if call.error is not None:
            return None, self.died(call)
        kind, body = call.answers[0]
        pid = self._engine.ranks.pid(0)
        if kind == FAILED:
            return None, failure(body, self.rank, pid, call.method)
        try:
            return codec.loads(body), None
        except Exception as reason:
            error = RemoteError(
                f"the result of rank {self.rank} (pid {pid}) in {call.method} could not be rebuilt "
                f"here: {type(reason).__name__}: {reason}",
                rank=self.rank,
                pid=pid,
                method=call.method,
                type_name=type(reason).__name__,
            )
            error.__cause__ = reason
            return None, error

    # -- its death ----------------------------------------------------------------------------

    def end_with(self, other: WorkerProcess) -> None:
        """This process is about to be ended because `other` died: that is what callers hear."""
        if other is not self and 0 not in self._engine.ranks.reports:
            self._ended_by = other

    def died(self, call: Call | None = None) -> WorkerDied:
        """A new WorkerDied, "worker died: ...", for `call`, or for one that is refused."""
        if self._ended_by is not None:
            error = self._ended_by.died()
            error.args = (f"{error}; rank {self.rank} was ended because of it",)
            return error
        error = died(self._lost(call), cast("Engine", _Told(self._engine.ranks.pid(0))))
        cause = self._engine.pump.ledger.broken
        if isinstance(cause, Garbled):
            error.args = (f"{error} ({cause.reason})",)
        elif 0 not in self._engine.ranks.reports:
            who = f"worker died: rank {self.rank} (pid {error.pid})"
            what = "takes no more tasks" if call is None else f"was not waited for in {call.method}()"
            error.args = (f"{who} was asked to end and {what}",)
        return error

    def _lost(self, call: Call | None) -> Lost:
        report = self._engine.ranks.reports.get(0)
        cause = self._engine.pump.ledger.broken
        if isinstance(cause, Lost):
            return Lost(self.rank, report, cause.method, cause.call_id)
        if call is None:
            return Lost(self.rank, report, None, None)
        return Lost(self.rank, report, call.method, call.id)


class _Told:
    """What `died` asks of an engine: the text begins with the original's words."""

    name = "worker died"

    def __init__(self, pid: int) -> None:
        self.ranks = self
        self._pid = pid

    def pid(self, rank: int) -> int:
        return self._pid


def _abandon(engine: LocalEngine, rank: int) -> None:
    """The WorkerProcess was collected. A finalizer: it may run inside any lock."""
    ended = 0 in engine.ranks.reports
    if engine.abandon() and not ended:
        warnings.warn(
            f"the worker of rank {rank} was collected while it ran, and is ended: keep its "
            "ProcessWorkerWrapper, or call terminate_worker()",
            ResourceWarning,
            stacklevel=2,
        )


def _terminate_all() -> None:
    """The interpreter exits: its workers are daemons. All get SIGTERM before any is waited for."""
    for process in list(_alive):
        if process._engine.inert is None and process._pid() is not None:
            process.terminate()


atexit.register(_terminate_all)


# -- what rankwise's core has no public word for ----------------------------------------------


def _wait_news(engine: LocalEngine, happened: Callable[[], bool], until: float | None) -> bool:
    """Wait for something that the launcher says."""
    return engine._wait_news(happened, until)


def _is_gone(engine: LocalEngine) -> bool:
    """Whether the launcher has ended: no more reports will come."""
    return engine._gone or engine._closed


def _is_over(engine: LocalEngine) -> bool:
    """Whether a rank that has not been started by now will not be."""
    return _is_gone(engine) or engine.pump.ledger.broken is not None


def _when_settled(engine: LocalEngine, call: Call, then: Callable[[], object]) -> None:
    """Call `then` once `call` is settled. It must not block: it runs where sockets are read."""
    with engine.pump.lock:
        if not call.done:
            call.watchers = [*(call.watchers or ()), then]
            return
    then()


def _settle_early(engine: LocalEngine, call: Call) -> None:
    """Settle `call` as closed, though it stays queued and runs; its answer is dropped."""
    with engine.pump.lock:
        if call.done:
            return
        call.error = Closed()
        engine.pump.ledger._finish(call)
    engine.pump.tell()
    engine.pump.rouse_leader()


def _show_original_prefix(engine: LocalEngine) -> None:
    """Show `(VllmWorkerProcess pid=7)` where rankwise says `(VllmWorkerProcess rank=0 pid=7)`.

    The lines have their prefix by the time they come here, each one its own, so what stands at the
    start of a line is never the user's text.
    """
    shown = re.compile(rb"^((?:\x1b\[\d+m)?\(%b) rank=0 " % NAME.encode(), re.MULTILINE)
    printer = engine._printer
    put = printer.put

    def put_renamed(stream: int, data: bytes) -> None:
        renamed = shown.sub(rb"\1 ", data)
        put(stream, renamed)
        if len(renamed) < len(data):
            engine._shown(len(data) - len(renamed))  # the launcher counts what it has sent

    printer.put = put_renamed  # type: ignore[method-assign]
