"""Ranks as processes of this machine: the engine that owns a launcher, a pump and a keeper.

    construction   validate > pickle target and arguments > launcher > Boot ==> ready
    a death        launcher ==Exited=> keeper > Pump.deaths > ledger broken > ending
    ending         Exit frames > 0.3 s > SIGTERM > 1 s > Finish (SIGKILL) > Gone > descriptors

Who ends what, in this order: the workers (by their own exit, or by the launcher), the launcher (by
its own exit after Gone, or SIGKILL), the printer, the keeper's thread, the callback thread, the
descriptors. `close` walks that order whatever it finds already done; a broken group's keeper walks
its first half by itself.

It is one file, though a long one, for now: starting, hearing and ending share the same few fields,
and the order in which they end is what a reader has to see at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from functools import partial

from rankwise import _lifetime, _procfs
from rankwise._answers import broken
from rankwise._callbacks import Callbacks
from rankwise._calls import Call, Closed, Error, Garbled
from rankwise._deadline import clock, deadline, left
from rankwise._interrupts import is_interrupt
from rankwise._keeper import Keeper
from rankwise._messages import (
    EXIT,
    Exited,
    Finish,
    Gone,
    Output,
    Preloaded,
    Shown,
    Signal,
    Spawned,
    SpawnFailed,
)
from rankwise._pump import Pump
from rankwise._ranks import Ranks
from rankwise.backends.launching import start_launcher
from rankwise.errors import describe_exit
from rankwise.logs.show import Printer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Generator
    from typing import Any

    from rankwise._future import GroupFuture
    from rankwise._spec import GroupSpec

logger = logging.getLogger("rankwise")

SPIN = 100e-6  # seconds: at a call every 5 ms, 2 % of a core
BROKEN_TERM = 0.3  # seconds that the ranks of a broken group have to exit by themselves
TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
LAUNCHER_PATIENCE = 1.0  # a launcher that does not answer for so long is stopped, or gone
STARTUP_LOOK = 0.02  # seconds between two looks at the phases of a group that starts
LAST_ID = 1 << 62


class LocalEngine:
    """One group of processes. Made by `start_local`; ended by `close` or `kill`."""

    def __init__(self, spec: GroupSpec, stack: ExitStack) -> None:
        self.spec = spec
        self.name = spec.name
        self.world_size = spec.world_size
        started = start_launcher(spec, stack)
        self.infos = started.infos
        self.ranks = Ranks(spec.world_size, started.status)
        stack.callback(self.ranks.forget_status)
        self.spin = SPIN if spec.spin == "auto" else float(spec.spin)
        self.pump = Pump(started.sockets, self.spin)
        stack.callback(self.pump.close)
        self.pump.announce = self._announce
        self._control = started.control
        self._launcher = started.launcher
        self.control_fd = started.control.fileno()
        self.launcher_pidfd = started.launcher_pidfd
        self.pump.outer.register(self.control_fd, 1)
        self.pump.outer.register(self.launcher_pidfd, 1)
        self._on_failure = spec.on_failure
        self._callbacks = Callbacks(spec.name)
        if spec.on_failure is not None:
            self._callbacks.ensure()
        self._printer = Printer(spec.name, self._shown)
        stack.callback(self._printer.close)
        self.keeper = Keeper(self, spec.name)
        self.next_step: float | None = clock()
        self.starting = True
        self._phases: dict[int, str] = {}
        self._began = clock()
        self._news = threading.Condition()  # ends of ranks, and of the launcher
        self._gone = False
        self._heard = 0.0  # when the launcher last said something
        self._end_at = [0.0, 0.0]  # of a broken group: SIGTERM, SIGKILL; 0: not begun
        self._finishing = False
        self._to_launcher: list[object] = []
        self._closing = threading.RLock()
        self._closed = False
        self._limit: float | None = None  # no end takes longer: a shorter close, a kill, the exit
        self._stack = stack
        self.keeper.start()
        self._stack = stack.pop_all()
        _lifetime.adopt(self)

    # -- calls --------------------------------------------------------------------------------

    def run(self, call: Call) -> Error | None:
        return self.pump.run(call)

    def submit(self, calls: tuple[Call, ...]) -> Error | None:
        return self.pump.submit(calls)

    def barrier(self, call: Call) -> None:
        self.pump.check_entry()
        with self.pump.lock:
            self.pump.ledger.barrier(call)
            self.pump.rearm_if_unled()

    def wait(self, call: Call, until: float | None) -> bool:
        return self.pump.wait(call, until)

    def await_call(self, call: Call, loop: AbstractEventLoop) -> Generator[object, None, None]:
        return self.pump.port(loop).wait(call)

    def cancel(self, call: Call) -> bool:
        self.pump.check_entry()
        try:
            return self._cancel(call)
        except BaseException:
            self.pump.kick()  # the keeper finishes what was begun
            raise

    def _cancel(self, call: Call) -> bool:
        with self.pump.lock:
            dropped = self.pump.ledger.cancel(call)
            if not dropped and not call.ended:
                self.ranks.cancel(call)
        self.pump.spread()
        return dropped

    def watch(self, future: GroupFuture[Any]) -> None:
        self.pump.check_entry()
        self._callbacks.ensure()

    def defer(self, job: Callable[[], object]) -> None:
        self._callbacks.ensure()
        self._callbacks.put(job)

    def refusal(self) -> Error | None:
        ledger = self.pump.ledger
        return Closed(ledger.exiting) if self._closed else ledger.refusal()

    def owed(self) -> dict[int, Call]:
        if self.pump.inert is not None:
            return {}
        with self.pump.lock:
            return dict(self.pump.ledger.owed())

    def unfetched(self, future: GroupFuture[Any]) -> None:
        _lifetime.log_unfetched(future)

    def _announce(self, call: Call) -> None:
        future = call.future
        if future is not None and future.watched:  # type: ignore[attr-defined]
            self._callbacks.put(future.announce)  # type: ignore[attr-defined]
        call.future = None

    # -- what the launcher says: the keeper's thread ------------------------------------------

    def hear(self) -> None:
        """Deal with what the launcher has said, or with its end."""
        try:
            messages = self._control.receive()
        except (EOFError, ValueError, OSError) as error:
            self._launcher_lost(error)
            return
        self._heard = clock()
        for message in messages:
            match message:
                case Spawned(rank, pid, starttime):
                    self.ranks.pids[rank] = pid
                    self.ranks.starttimes[rank] = starttime
                case Output(stream, data):
                    self._printer.put(stream, data)
                case Exited():
                    self._exited(message)
                case SpawnFailed(rank, reason):
                    self._break(Garbled(rank, f"could not be started: {reason}"))
                case Preloaded(seconds, refused):
                    self._preloaded(seconds, refused)
                case Gone(left):
                    if left:
                        self._log(logging.ERROR, "%s: the kernel keeps %s", self.name, left)
                    self._stop_hearing()
                    self._gone = True
        self._tell_news()

    def _exited(self, report: Exited) -> None:
        self.ranks.reports[report.rank] = report
        self.pump.sockets.deaths[report.rank] = report

    def _preloaded(self, seconds: float, refused: str | None) -> None:
        if refused is None:
            self._log(logging.INFO, "%s: the launcher has preloaded in %.2f s", self.name, seconds)
        else:
            self._log(
                logging.WARNING, "%s: the ranks are spawned, not forked: %s", self.name, refused
            )

    def _log(self, level: int, *message: object) -> None:
        """Log, but not by the keeper: a handler of the user's may block or raise."""
        if logger.isEnabledFor(level):
            self.defer(partial(logger.log, level, *message))

    def _launcher_lost(self, reason: Exception) -> None:
        """The launcher has ended before it said Gone: the ranks have a SIGKILL from the kernel."""
        self._stop_hearing()
        orphans = self.kill_ranks()
        if not self._finishing:
            # Its descriptors close before it ends.
            _lifetime.wait_readable(self.launcher_pidfd, 0.1)
            self._launcher.poll()
            ended = describe_exit(self._launcher.returncode)
            self._break(Garbled(-1, f"process {self._launcher.pid} {ended} ({reason})"))
            self.pump.spread()
        for pidfd in orphans:  # nobody of ours can wait for them, but they may be watched
            _lifetime.wait_readable(pidfd, LAUNCHER_PATIENCE)
            os.close(pidfd)
        self._gone = True
        self._tell_news()

    def _stop_hearing(self) -> None:
        self.pump.outer.unregister(self.control_fd)
        self.pump.outer.unregister(self.launcher_pidfd)

    def _tell_news(self) -> None:
        with self._news:
            self._news.notify_all()

    def _break(self, cause: Error) -> None:
        with self.pump.lock:
            self.pump.ledger.break_group(cause)

    def kill_ranks(self) -> list[int]:
        """SIGKILL each rank's process group ourselves: the launcher cannot any more.

        Returns a pidfd of each rank that still ends.
        """
        orphans = []
        for rank, pid in list(self.ranks.pids.items()):
            process = _procfs.stat(pid)
            if process is not None and process.starttime != self.ranks.starttimes[rank]:
                continue  # the number has gone to somebody else
            with suppress(ProcessLookupError, PermissionError):
                orphans.append(os.pidfd_open(pid))
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return orphans

    # -- the ending of a broken group, and progress at start: the keeper's thread -------------

    def step(self, now: float) -> None:
        """Do what is due: phases of a start, stages of a broken group's end, queued messages."""
        self._flush_control()
        self.next_step = None
        if self.starting:
            self._log_phases(now)
            self.next_step = now + STARTUP_LOOK
        with self.pump.lock:
            ledger = self.pump.ledger
            cause, closing = ledger.broken, ledger.closing
            reports, ledger.reports = ledger.reports, type(ledger.reports)()
        for report in reports:  # not by this thread: a handler of the user's may block or raise
            self.defer(partial(_lifetime.log_failure, *report))
        if self._limit is not None:
            if now < self._limit:
                self.next_step = self._limit
            elif closing:
                with self.pump.lock:
                    self.pump.ledger.end_barriers()
                self.pump.spread()
        if cause is not None:
            self._report_failure(cause)
        if cause is None or self._gone or closing:
            return  # whoever closes does the ending
        if not self._end_at[0]:
            self._end_at = [now + BROKEN_TERM, now + BROKEN_TERM + TERM_GRACE]
            self.send_exits()
            self.pump.spread()
        term, kill = self._end_at
        alive = self.ranks.alive()
        if not alive or now >= kill:
            self.finish()
        elif now >= term:
            self.send(Signal(alive, signal.SIGTERM))
            self._end_at[0] = float("inf")
        self.next_step = min(self._end_at)
        if self._finishing:
            self.next_step = None

    def _report_failure(self, cause: Error) -> None:
        """Have `on_failure` called, once, on the callback thread."""
        with self.pump.lock:
            on_failure, self._on_failure = self._on_failure, None
        if on_failure is not None and not isinstance(cause, Closed) and not self.starting:
            self.defer(lambda: on_failure(broken(cause, self)))

    def _log_phases(self, now: float) -> None:
        for rank in range(self.world_size):
            phase = self.ranks.phase(rank)
            if self.ranks.pid(rank) and self._phases.get(rank) != phase:
                self._phases[rank] = phase
                self._log(
                    logging.INFO,
                    "%s: rank %d (pid %d): %s, after %.2f s",
                    self.name, rank, self.ranks.pid(rank), phase, now - self._began,
                )  # fmt: skip

    # -- talking to the launcher: any thread --------------------------------------------------

    def send(self, message: object) -> None:
        """Have the keeper send `message`: the control channel belongs to its thread alone."""
        self._to_launcher.append(message)
        self.pump.kick()

    def _shown(self, nbytes: int) -> None:
        if not self._closed:
            self.send(Shown(nbytes))

    def _flush_control(self) -> None:
        while self._to_launcher:
            self._control.send(self._to_launcher.pop(0))
        if not self._control.flush():
            self.pump.outer.modify(self.control_fd, 1 | 4)
        elif not self._gone:
            self.pump.outer.modify(self.control_fd, 1)

    def send_exits(self) -> None:
        """Tell every rank to end in order, after what it was sent. Best effort."""
        farewell = Call("exit", b"", (), kind=EXIT)
        farewell.id = LAST_ID
        with self.pump.lock:
            for channel in self.pump.sockets.channels:
                channel.send_farewell(farewell)

    def finish(self) -> None:
        """Have the launcher SIGKILL what is left, report and go."""
        if not self._finishing:
            self._finishing = True
            self.send(Finish())

    # -- closing ------------------------------------------------------------------------------

    def hurry(self, until: float | None) -> None:
        """Whoever is closing already waits no longer than `until`."""
        if until is None or self._closed:
            return
        with self._news:
            self._limit = until if self._limit is None else min(until, self._limit)
            self._news.notify_all()
        self.pump.kick()  # the keeper ends the calls then

    def close(self, timeout: float | None, *, drop: bool = False) -> None:
        """See WorkerGroup.close. `drop`: without the queued calls, and the cancel flags set."""
        self.pump.check_entry()
        interrupted: BaseException | None = None
        until = deadline(timeout)
        self.hurry(until)
        with self._closing:
            if self._closed:
                return
            try:
                self._end_calls(until, drop)
                self._end_ranks(until)
            except BaseException as error:  # ^C: no more waiting, and raised when all is done
                interrupted = error
            interrupted = self._end_firmly() or interrupted
        if interrupted is not None:
            raise interrupted

    def kill(self) -> None:
        """End everything at once."""
        self.pump.check_entry()
        self.hurry(clock())
        with self._closing:
            interrupted = self._end_firmly()
        if interrupted is not None:
            raise interrupted

    def _end_firmly(self) -> BaseException | None:
        """End what is left, however often a signal handler strikes. Returns what it raised last."""
        interrupted = None
        while not self._closed:
            try:
                self._end_launcher()
                self._end_all()
            except BaseException as error:
                if not is_interrupt(error):
                    raise
                interrupted = error
        return interrupted

    def _end_calls(self, until: float | None, drop: bool) -> None:
        with self.pump.lock:
            ledger = self.pump.ledger
            ledger.closing = True
            if drop:
                ledger.drop_queued(Closed())
            open_calls = list(ledger.open.values())
        if drop:
            for call in open_calls:
                self.ranks.cancel(call)
        self.pump.tell()
        drained = Call("close", b"", ())
        self.barrier(drained)
        self.pump.wait(drained, until)

    def _end_ranks(self, until: float | None) -> None:
        self.send_exits()
        if self.pump.ledger.broken is not None:
            soon = clock() + BROKEN_TERM
            until = soon if until is None else min(until, soon)
        if self._wait_news(self._all_exited, until):
            return
        self._break(Closed())
        self.pump.tell()
        self.send(Signal(self.ranks.alive(), signal.SIGTERM))
        self._wait_own(self._all_exited, deadline(TERM_GRACE))

    def _end_launcher(self) -> None:
        with self.pump.lock:
            self.pump.ledger.closing = True
            cause = self.pump.ledger.broken
        if cause is not None:
            self._report_failure(cause)
        self._break(Closed())
        self.pump.spread()
        self.finish()
        self._heard = clock()
        while not self._gone and clock() < self._heard + LAUNCHER_PATIENCE:
            # It says Dying while the kernel still frees a rank's memory, some 30 ms a GB.
            self._wait_own(lambda: self._gone, self._heard + LAUNCHER_PATIENCE)
        if not self._gone:
            self._kill_launcher()
            self._wait_own(lambda: self._gone, deadline(LAUNCHER_PATIENCE))
        if not _lifetime.wait_readable(self.launcher_pidfd, LAUNCHER_PATIENCE):
            self._kill_launcher()
        self._launcher.wait()

    def _kill_launcher(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.launcher_pidfd, signal.SIGKILL)
        for pidfd in self.kill_ranks():
            _lifetime.wait_readable(pidfd, LAUNCHER_PATIENCE)
            os.close(pidfd)

    def _end_all(self) -> None:
        self._printer.drain(LAUNCHER_PATIENCE)  # since it last got on
        self._printer.close()
        self.keeper.stop()
        self._callbacks.close()
        self._closed = True
        _lifetime.disown(self)
        self._stack.close()

    def _all_exited(self) -> bool:
        return self._gone or len(self.ranks.reports) == self.world_size

    def _wait_news(self, happened: Callable[[], bool], until: float | None) -> bool:
        with self._news:
            while not happened():
                limits = [limit for limit in (until, self._limit) if limit is not None]
                soonest = min(limits, default=None)
                if soonest is not None and clock() >= soonest:
                    return False
                self._news.wait(left(soonest))
            return True

    def _wait_own(self, happened: Callable[[], bool], until: float | None) -> bool:
        with self._news:
            return self._news.wait_for(happened, left(until))

    def refuse(self) -> None:
        self.pump.check_entry()
        with self.pump.lock:
            self.pump.ledger.closing = True

    @property
    def inert(self) -> str | None:
        return self.pump.inert

    # -- not by the caller --------------------------------------------------------------------

    def learn_pids(self) -> None:
        """Wait, briefly, until the pid of every rank is known."""
        # A rank may be ready before the keeper has heard the launcher say which process it is.
        self._wait_own(
            lambda: self._gone or len(self.ranks.pids) == self.world_size,
            deadline(LAUNCHER_PATIENCE if self.pump.ledger.broken is None else 0.0),
        )

    def break_calls(self) -> None:
        """Settle every open call: the interpreter is about to exit."""
        with self.pump.lock:
            self.pump.ledger.exit()
        self.pump.spread()
        self.hurry(clock() + _lifetime.EXIT_TIMEOUT)  # whoever is closing already

    def abandon(self) -> bool:
        """The group was collected: end without waiting. False where it has ended already.

        It runs in a finalizer, that is inside any lock.
        """
        if self._closed:
            return False
        self.keeper.abandoned = True
        self.pump.kick()
        return True

    def become_inert(self, owner: int) -> None:
        """This is a forked child's copy: close its descriptors, touch nothing else."""
        self.pump.inert = (
            f"{self.name} belongs to process {owner}; this is a forked child of it (pid "
            f"{os.getpid()}), which must make a group of its own"
        )
        self._closed = True
        self._launcher.returncode = 0  # else its destructor would warn of a child not waited for
        self._stack.close()


def start_local(spec: GroupSpec) -> LocalEngine:
    """Start the launcher of `spec`; its ranks wait for their boot call."""
    if sys.platform != "linux":
        raise RuntimeError(
            f"backend='local' needs Linux 5.4 or newer, and this is {sys.platform}: "
            "backend='inline' works everywhere"
        )
    with ExitStack() as stack:
        return LocalEngine(spec, stack)
