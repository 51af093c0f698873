"""One worker process of `multiproc_worker_utils`: a group of one rank, seen as a process.

    WorkerProcess(...) > launch > launcher > make_worker      returns at once
    .submit, .wait     > the group's engine                   the call path of every group
    .sentinel          < pidfd of the worker: readable from the moment it ends
    .exitcode, .died() < the launcher's exit report
    .join()            > the end is seen > the group is closed: launcher, threads, descriptors

A killed worker breaks its group, whose launcher then goes by itself; one that was asked to finish
leaves a launcher that `join`, the collection of this object or the interpreter's exit ends.
"""

from __future__ import annotations

import atexit
import os
import secrets
import select
import signal
import threading
import warnings
import weakref
from contextlib import suppress
from functools import partial
from typing import cast

from rankwise._calls import Call
from rankwise._deadline import check_timeout, deadline, left
from rankwise._environment import cpu_budget
from rankwise._spec import RANK_VARIABLES, check_spec
from rankwise.backends import launch
from rankwise.compat._vllm_calls import answered, worker_died
from rankwise.compat._vllm_engine import (
    is_gone,
    is_over,
    open_pidfd,
    settle_early,
    show_original_prefix,
    submit_call,
    wait_news,
    when_settled,
)
from rankwise.compat._vllm_worker import NAME, make_worker
from rankwise.errors import WorkerDied
from rankwise.wire import codec
from rankwise.wire.culprit import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Generator

    from rankwise.backends.local import LocalEngine

START_PATIENCE = 10.0  # seconds until the launcher has said which process it started
REPORT_PATIENCE = 1.0  # seconds between the end of a process and the launcher's report of it
# Seconds that a waiter polls before it sleeps, where worker and driver can have a core each: enough
# for a round trip of 22 us. Where the two share a core after all, the 100 us of a group's default
# would make it 245; and eight workers on two cores took 280 us without, 530 with 100.
SPIN = 20e-6
# One for all workers of this driver, so that sets iterate alike in all of them.
HASH_SEED = str(secrets.randbelow(1 << 32))

_alive: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
_owner = 0


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
            spin=SPIN if len(_alive) + 1 < cpu_budget() else 0.0,
        )
        engine, boot = launch(spec)
        self.rank = rank
        self._engine = cast("LocalEngine", engine)
        self.arena = self._engine.arena  # where large arguments lie; None: they go by the socket
        self._ended_by: WorkerProcess | None = None
        self._pidfd: int | None = None
        self._sentinel: int | None = None
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _abandon, self._engine, rank)
        self._finalizer.atexit = False
        when_settled(self._engine, boot, partial(setattr, engine, "starting", False))
        if logs == "prefix":
            show_original_prefix(self._engine, NAME)
        _see_to_at_exit(self)

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
            self._finalizer.detach()
            _alive.discard(self)

    def terminate(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._open_sentinel(deadline(START_PATIENCE)) is None:
            self._engine.link.finish()  # its launcher is stuck; whatever it has begun ends with it
        elif self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _pid(self, until: float | None = 0.0) -> int | None:
        ranks = self._engine.ranks
        if 0 not in ranks.pids:
            wait_news(self._engine, lambda: 0 in ranks.pids or is_over(self._engine), until)
        return ranks.pids.get(0)

    def _open_sentinel(self, until: float | None) -> int | None:
        """The sentinel; None where the process has not been started until then."""
        if self._sentinel is None:
            pid = self._pid(until)
            if pid is None and not is_over(self._engine):
                return None
            with self._lock:
                if self._sentinel is None:
                    self._pidfd = None if pid is None else open_pidfd(self._engine, pid)
                    # Ended already, or never begun: something that is readable for good.
                    fd = os.eventfd(1, os.EFD_CLOEXEC) if self._pidfd is None else self._pidfd
                    weakref.finalize(self, os.close, fd).atexit = False
                    self._sentinel = fd
        return self._sentinel

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
        wait_news(self._engine, lambda: 0 in reports or is_gone(self._engine), soon)
        return True

    # -- its calls ----------------------------------------------------------------------------

    def submit(self, call: Call, awaited: bool) -> None:
        """Send `call`, never blocks. Raises WorkerDied where the worker takes no more.

        awaited: somebody is about to wait for the answer, so nobody else need watch for it.
        """
        if submit_call(self._engine, call, awaited) is not None:
            raise self.died()

    def wait(self, call: Call, until: float | None) -> bool:
        return self._engine.wait(call, until)

    def look(self, call: Call) -> None:
        """Read what the worker has sent, if `call` is open and nobody reads. Never waits."""
        with suppress(ValueError):  # the group is closed just now: `call` has been settled
            if not call.done:
                self._engine.pump.lead_once()

    def watch(self, call: Call) -> None:
        """Have `call` settled as soon as its answer comes, though nobody waits for it."""
        with self._engine.pump.lock:
            if not call.done:
                self._engine.pump.lead.led_by_loop(call, False)

    def await_call(self, call: Call, loop: AbstractEventLoop) -> Generator[object, None, None]:
        return self._engine.await_call(call, loop)

    def settle(self, call: Call) -> None:
        """Let everybody who waits for `call` go; the worker may go on with it."""
        settle_early(self._engine, call)

    def finish_queued(self) -> None:
        """Ask the worker to end once it has done what was sent. Takes no more calls."""
        engine = self._engine
        if engine.refusal() is None:
            engine.refuse()
            done = Call("terminate", b"", ())
            done.watchers = [engine.ending.send_exits]
            engine.barrier(done)
            engine.pump.tell()  # nobody else does where nothing was open

    def outcome(self, call: Call) -> tuple[object, BaseException | None]:
        """(value, exception) of the settled `call`. Unpickles: not under a lock."""
        if call.error is not None:
            return None, self.died(call)
        return answered(call, self.rank, self._engine)

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
        return worker_died(self._engine, self.rank, call)


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


def _see_to_at_exit(process: WorkerProcess) -> None:
    # Registered after the core's own hook, which a group's start registers: so it runs before it.
    global _owner
    if _owner != os.getpid():
        _owner = os.getpid()
        _alive.clear()  # in a forked child: they are its parent's
        atexit.register(_terminate_all, _owner)
    _alive.add(process)


def _terminate_all(owner: int) -> None:
    """The interpreter exits: its workers are daemons. All get SIGTERM before one is waited for."""
    if owner == os.getpid():
        for process in list(_alive):
            if process._pid() is not None:
                process.terminate()
