"""Ranks as processes of this machine: the engine that wires a launcher, a pump and a keeper.

    construction   validate > pickle target and arguments > launcher > Boot ==> ready
    a call         run, submit > Pump ==frame==> worker          (`_pump.py`)
    a death        launcher ==Exited=> link > Sockets.deaths > ledger broken > ending
    the end        `ending.py`, which also says who ends what, and in which order

The keeper's thread drives `step` and `link.hear`; everything else runs in the caller's thread.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from functools import partial

from rankwise import _lifetime
from rankwise._callbacks import USERS_PATIENCE, Callbacks
from rankwise._calls import Call, Cancelled, Closed, Error
from rankwise._deadline import clock, deadline
from rankwise._environment import cpu_budget
from rankwise._interrupts import is_interrupt
from rankwise._keeper import Keeper
from rankwise._pump import NEVER, Pump
from rankwise._ranks import Ranks
from rankwise._spin import spin_for
from rankwise._status import PHASES, READY, SPAWN
from rankwise.backends.ending import Ending
from rankwise.backends.launching import start_launcher
from rankwise.backends.link import PATIENCE, LauncherLink
from rankwise.backends.reports import Reports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Generator
    from typing import Any

    from rankwise._future import GroupFuture
    from rankwise._report import RankReport
    from rankwise._spec import GroupSpec
    from rankwise.backends.launching import Held

logger = logging.getLogger("rankwise")

STARTUP_LOOK = 0.02  # seconds between two looks at the phases of a group that starts


class LocalEngine:
    """One group of processes. Made by `start_local`; ended by `close` or `kill`."""

    def __init__(self, spec: GroupSpec, stack: ExitStack, warm: Held | None) -> None:
        self.spec = spec
        self.name = spec.name
        self.world_size = spec.world_size
        started = start_launcher(spec, stack, warm)
        self.infos = started.infos
        self.ranks = Ranks(spec.world_size, started.status)
        stack.callback(self.ranks.forget_status)
        self.spin = spin_for(spec.spin, spec.world_size + 1, cpu_budget())
        self.pump = Pump(started.sockets, self.spin, started.status, started.news)
        self.arena = self.pump.sockets.arena = started.arena
        stack.callback(self.pump.close)
        self.on_break: Callable[[Error], object] | None = None
        self.outlook: str | None = None
        self.retired = False
        self.callbacks = Callbacks(spec.name)
        self.pump.teller.announce = self.callbacks.announce
        self.reports = Reports(self)
        self.pump.ledger.explains = True
        self.link = LauncherLink(self, started)
        stack.callback(self.link.printer.close)
        self.keeper = Keeper(self, spec.name)
        self.next_step: float | None = clock()
        self.starting = True
        self._looking = True  # for changes of phase
        self._phases = [SPAWN - 1] * spec.world_size  # the last that was logged
        self._began = clock()
        self.ending = Ending(self)
        if spec.on_failure is not None:
            self.callbacks.ensure()
        try:
            self.keeper.start()
        except BaseException:
            self.callbacks.close(USERS_PATIENCE)
            raise
        self.ending.stack = stack.pop_all()
        _lifetime.adopt(self)

    # -- calls --------------------------------------------------------------------------------

    def check_entry(self) -> None:
        self.pump.check_entry()

    def check_restart(self) -> None:
        self.pump.check_entry()
        with self.pump.lock:
            leader = self.pump.lead.current()
        if leader is not None and leader.thread == threading.get_ident():
            raise RuntimeError(
                f"a signal handler has interrupted a call of {self.name} that waits, and restarts "
                "it: let the handler set a flag or raise instead"
            )

    def run(self, call: Call) -> Error | None:
        return self.pump.run(call)

    def submit(self, calls: tuple[Call, ...]) -> Error | None:
        return self.pump.submit(calls)

    deadline = staticmethod(deadline)

    def barrier(self, call: Call) -> None:
        self.pump.check_entry()
        with self.pump.lock:
            self.pump.ledger.barrier(call)

    def wait(self, call: Call, until: float | None) -> bool:
        return self.pump.wait(call, until)

    def attend(self, call: Call) -> None:
        self.pump.attend(call)

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
                self.ranks.cancel(call, self.pump.ledger)
        self.pump.spread()
        return dropped

    def watch(self, future: GroupFuture[Any]) -> None:
        self.pump.check_entry()
        self.callbacks.ensure()
        self.pump.watch(future._call, future)

    def defer(self, job: Callable[[], object]) -> None:
        self.callbacks.defer(job)

    def refusal(self) -> Error | None:
        ledger = self.pump.ledger
        if self.ending.closed and not self.retired:
            return Closed(ledger.exiting)
        return ledger.refusal()

    def owed(self) -> dict[int, Call]:
        if self.pump.inert is not None:
            return {}
        with self.pump.lock:
            return dict(self.pump.ledger.owed())

    def inquire(
        self, ranks: tuple[int, ...], patience: float, *, lately: bool = False
    ) -> dict[int, RankReport]:
        self.pump.check_entry()
        return self.reports.inquire(ranks, patience, lately=lately)

    def unfetched(self, future: GroupFuture[Any]) -> None:
        _lifetime.log_unfetched(future)

    # -- the keeper's thread -----------------------------------------------------------------

    def step(self, now: float) -> None:
        """Do what is due: messages to the launcher, phases of a start, a broken group's end."""
        self.link.flush()
        with self.pump.lock:
            ledger = self.pump.ledger
            reports, ledger.reports = ledger.reports, type(ledger.reports)()
        for report in reports:
            self.defer(partial(_lifetime.log_failure, *report))
        due = self.ending.step(now)
        asked = self.reports.step(now)
        if asked is not None:
            due = min(asked, NEVER if due is None else due)
        if self._looking:
            self._looking = self.starting  # once more when it has started: what came since
            self._log_phases(now)
            due = min(now + STARTUP_LOOK, NEVER if due is None else due)
        tend = None if self.arena is None else self.arena.tend(now)
        self.next_step = tend if due is None else due if tend is None else min(due, tend)

    def _log_phases(self, now: float) -> None:
        for rank, told in enumerate(self._phases):
            if not self.ranks.pid(rank):
                continue
            # What came and went between two looks has been gone through all the same.
            reached = min(PHASES.index(self.ranks.phase(rank)), READY)
            for phase in PHASES[told + 1 : reached + 1]:
                self.log(
                    logging.INFO,
                    "%s: rank %d (pid %d): %s, after %.2f s",
                    self.name, rank, self.ranks.pid(rank), phase, now - self._began,
                )  # fmt: skip
            self._phases[rank] = reached

    # -- for its parts ------------------------------------------------------------------------

    def break_group(self, cause: Error) -> None:
        with self.pump.lock:
            self.pump.ledger.break_group(cause)

    def report_failure(self, cause: Error) -> None:
        """Have `on_break` called, once."""
        with self.pump.lock:
            on_break = self.on_break
            if on_break is None:
                return  # without a store, which might undo that of who seats this engine
            self.on_break = None
        if not isinstance(cause, Closed):
            on_break(cause)

    def log(self, level: int, *message: object) -> None:
        """Log, but not by the keeper: a handler of the user's may block or raise."""
        if logger.isEnabledFor(level):
            self.defer(partial(logger.log, level, *message))

    # -- its end: see ending.py ---------------------------------------------------------------

    def close(self, timeout: float | None, *, drop: bool = False) -> None:
        try:
            self.pump.check_entry()
            self.ending.close(timeout, drop=drop)
        except BaseException as error:
            if is_interrupt(error):
                self.ending.kill()  # it may have struck before the end had begun
            raise

    def kill(self) -> None:
        self.pump.check_entry()
        self.ending.kill()

    def retire(self, timeout: float | None) -> Held | None:
        self.retired = self.link.stay = True
        self.ending.close(timeout, drop=False)
        return self.link.warm

    def refuse(self, *, cancel: bool = False) -> None:
        self.pump.check_entry()
        try:
            with self.pump.lock:
                self.pump.ledger.closing = True
                if cancel:
                    self.pump.ledger.drop_queued(Cancelled())
            self.pump.spread()
        except BaseException:
            self.pump.kick()  # the keeper finishes what was begun
            raise

    @property
    def inert(self) -> str | None:
        return self.pump.inert

    # -- not by the caller --------------------------------------------------------------------

    def learn_pids(self) -> None:
        """Wait, briefly, until the pid of every rank is known."""
        # A rank may be ready before the keeper has heard the launcher say which process it is.
        self.link.wait_for(
            lambda: self.link.gone or len(self.ranks.pids) == self.world_size,
            deadline(PATIENCE if self.pump.ledger.broken is None else 0.0),
        )

    def break_calls(self) -> None:
        """Settle every open call: the interpreter is about to exit."""
        with self.pump.lock:
            self.pump.ledger.exit()
        self.pump.spread()
        self.ending.hurry(clock() + _lifetime.EXIT_TIMEOUT)  # whoever is closing already

    def abandon(self) -> bool:
        """The group was collected: end without waiting. False where it has ended already.

        It runs in a finalizer, that is inside any lock.
        """
        if self.ending.closed:
            return False
        self.keeper.abandoned = True
        self.pump.kick()
        return True

    def become_inert(self, why: str) -> None:
        """This is a forked child's copy: close its descriptors, touch nothing else."""
        self.pump.inert = why
        self.link.become_inert()
        self.ending.become_inert()


def start_local(spec: GroupSpec, warm: Held | None) -> LocalEngine:
    """Start the ranks of `spec` by a launcher of their own, or by the `warm` one of the ranks
    before them; they wait for their boot call."""
    with ExitStack() as stack:
        return LocalEngine(spec, stack, warm)
