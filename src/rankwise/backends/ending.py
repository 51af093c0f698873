"""How a group of processes ends: closed, killed, or broken.

    close    calls > barrier > Exit frames > ranks exit > Finish ==> Gone > keeper > descriptors
    kill                                                  Finish ==> Gone > keeper > descriptors
    broken   Exit frames > 0.3 s > SIGTERM > 1 s > Finish (SIGKILL) ==> Gone; the rest is a close

Who ends what, in this order: the workers (by their own exit, or by the launcher), the launcher (by
its own exit after Gone, or SIGKILL), the printer, the keeper's thread, the callback thread, the
descriptors. A close walks that order whatever it finds already done; a broken group's keeper walks
its first half by itself, in `step`.

One thread at a time closes (`_closing`); whoever comes then, a shorter close, a kill or the
interpreter's exit, only makes it hurry. ^C takes the waits from a close and nothing else.
"""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import ExitStack

from rankwise import _lifetime
from rankwise._callbacks import USERS_PATIENCE
from rankwise._calls import Call, Closed
from rankwise._deadline import clock, deadline
from rankwise._interrupts import is_interrupt
from rankwise._messages import EXIT, Signal
from rankwise._shielded import Shielded
from rankwise._stacks import ranks_text
from rankwise.backends.link import PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise.backends.local import LocalEngine

BROKEN_TERM = 0.3  # seconds that the ranks of a broken group have to exit by themselves
TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
TELL_PATIENCE = 0.12  # seconds for ranks that are late to say where they are
STOPPED_LOOK = 1.0  # seconds between two looks at ranks that may be stopped
LAST_ID = 1 << 62
NEVER = float("inf")


class Ending:
    """The end of `engine`. `stack`: every descriptor of it, the last to go; its owner puts it here
    once the engine is whole."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.stack = ExitStack()
        self.closed = False
        self._closing = threading.RLock()
        self._rest: Shielded[None] | None = None  # closes the descriptors: the last step
        self._limit: float | None = None  # no end takes longer: a shorter close, a kill, the exit
        self._term_at = 0.0  # of a broken group; 0: not begun
        self._kill_at = 0.0

    # -- of a broken group: the keeper's thread -----------------------------------------------

    def step(self, now: float) -> float | None:
        """Do what is due. Returns when something will be again, or None."""
        engine = self._engine
        pump = engine.pump
        with pump.lock:
            cause, closing = pump.ledger.broken, pump.ledger.closing
        due = None
        if self._limit is not None:
            if now < self._limit:
                due = self._limit
            elif closing:
                with pump.lock:
                    pump.ledger.end_barriers()
                pump.spread()
        if cause is not None:
            engine.report_failure(cause)
        if cause is None or engine.link.gone or closing:
            return due  # whoever closes does the ending
        if not self._kill_at:
            self._term_at = now + BROKEN_TERM
            self._kill_at = self._term_at + TERM_GRACE
            self.send_exits()
            pump.spread()
        alive = engine.ranks.alive()
        if not alive or now >= self._kill_at:
            engine.link.finish()
            return None
        if now >= self._term_at:
            engine.link.send(Signal(alive, signal.SIGTERM))
            self._term_at = NEVER
        return min(self._term_at, self._kill_at)

    def send_exits(self) -> None:
        """Tell every rank to end in order, after what it was sent. Best effort."""
        farewell = Call("exit", b"", (), kind=EXIT)
        farewell.id = LAST_ID
        pump = self._engine.pump
        with pump.lock:
            if pump.closed:
                return  # by a handler, under who was about to close it
            pump.sockets.settle()
            for channel in pump.sockets.channels:
                channel.send_farewell(farewell)

    # -- closing ------------------------------------------------------------------------------

    def hurry(self, until: float | None) -> None:
        """Whoever is closing already waits no longer than `until`."""
        if until is None or self.closed:
            return
        self._limit = until if self._limit is None else min(until, self._limit)
        self._engine.link.news.ring()
        self._engine.pump.kick()  # the keeper ends the calls then

    def close(self, timeout: float | None, *, drop: bool) -> None:
        """See WorkerGroup.close. `drop`: without the queued calls, and the cancel flags set."""
        until = deadline(timeout)
        self.hurry(until)
        self._in_turn(lambda: self._close(until, drop))

    def kill(self) -> None:
        """End everything at once."""
        self.hurry(clock())
        self._in_turn(self._end_firmly)

    def _in_turn(self, end: Callable[[], BaseException | None]) -> None:
        """Do `end` unless it is done, one thread at a time, and raise what it returns."""
        interrupted = None
        if not self._engine.callbacks.is_current():
            with self._closing:
                interrupted = end()
        elif self._closing.acquire(blocking=False):
            # Else another thread closes, and it waits for the callback thread: this one.
            try:
                interrupted = end()
            finally:
                self._closing.release()
        if interrupted is not None:
            raise interrupted

    def _close(self, until: float | None, drop: bool) -> BaseException | None:
        interrupted: BaseException | None = None
        if not self.closed:
            try:
                self._end_calls(until, drop)
                self._end_ranks(until)
            except BaseException as error:  # ^C: no more waiting, and raised when all is done
                interrupted = error
        return self._end_firmly() or interrupted

    def _end_calls(self, until: float | None, drop: bool) -> None:
        engine = self._engine
        pump = engine.pump
        with pump.lock:
            pump.ledger.closing = True
            if drop:
                pump.ledger.drop_queued(Closed())
                engine.ranks.cancel_all(pump.ledger)
        pump.tell()
        drained = Call("close", b"", ())
        engine.barrier(drained)
        pump.wait(drained, until)

    def _end_ranks(self, until: float | None) -> None:
        engine = self._engine
        self.send_exits()
        if engine.pump.ledger.broken is not None:
            soon = clock() + BROKEN_TERM
            until = soon if until is None else min(until, soon)
        if self._wait_exits(until):
            return
        self._tell_late(until)
        engine.break_group(Closed())
        engine.pump.tell()
        engine.link.send(Signal(engine.ranks.alive(), signal.SIGTERM))
        engine.link.wait_for(self._all_exited, deadline(TERM_GRACE))

    def _tell_late(self, until: float | None) -> None:
        """Log which ranks had not left in time, and where they are; not where nobody waited for
        that: the group is broken, a kill or the interpreter's exit hurries."""
        engine = self._engine
        ledger = engine.pump.ledger
        owed = engine.owed()
        alive = engine.ranks.alive()
        # Those that were in no call have been told to leave only now.
        late = tuple(rank for rank in alive if rank in owed) or alive
        hurried = self._limit is not None and (until is None or self._limit < until)
        if hurried or ledger.exiting or ledger.broken is not None or engine.link.gone or not late:
            return
        leaving = Call("close", b"", late)
        reports = engine.inquire(late, TELL_PATIENCE)
        lines = [f"\n  {reports[rank].line(owed.get(rank, leaving))}" for rank in late]
        engine.log(
            logging.WARNING,
            "%s: close() has waited its time, and %s had not left: SIGTERM, then SIGKILL%s",
            engine.name, ranks_text(late), "".join(lines),
        )  # fmt: skip

    def _wait_exits(self, until: float | None) -> bool:
        """Wait for the ranks' own exit. False: it is `until`, or they will not exit."""
        hopeless = 0
        look = clock() + STOPPED_LOOK
        while not self._all_exited():
            limit = self._limit
            ends = [end for end in (until, limit) if end is not None]
            if clock() >= min(ends, default=NEVER) or hopeless >= 2:
                return False
            self._engine.link.wait_for(
                lambda limit=limit: self._all_exited() or self._limit != limit,  # type: ignore[misc]
                min([look, *ends]),
            )
            if clock() >= look:
                look = clock() + STOPPED_LOOK
                hopeless = hopeless + 1 if self._stuck() else 0
        return True

    def _stuck(self) -> bool:
        """Whether every rank that is left is stopped, or has ended unreported (by a launcher that
        is stopped): none of them will exit by itself, and no limit may have been given."""
        ranks = self._engine.ranks
        return all(ranks.state(rank)[0] in ("stopped", "dead") for rank in ranks.alive())

    def _all_exited(self) -> bool:
        engine = self._engine
        return engine.link.gone or len(engine.ranks.reports) == engine.world_size

    def _end_firmly(self) -> BaseException | None:
        """End what is left, however often a signal handler strikes. Returns what it raised last."""
        interrupted: BaseException | None = None
        while True:
            try:
                if self._rest is not None:
                    self._rest.settle()  # begun, and left by one who was struck
                if self.closed:
                    return interrupted
                self._end_launcher()
                self._rest = Shielded(self._end_rest)
                self._rest.run()
            except BaseException as error:
                if not is_interrupt(error):
                    raise
                interrupted = error

    def _end_launcher(self) -> None:
        """End all that runs. Every step of it may be done twice."""
        engine = self._engine
        with engine.pump.lock:
            engine.pump.ledger.closing = True
            cause = engine.pump.ledger.broken
        if cause is not None:
            engine.report_failure(cause)
        engine.break_group(Closed())
        engine.pump.spread()
        engine.link.end()
        engine.link.printer.drain(PATIENCE)  # since it last got on
        engine.link.printer.close()
        engine.keeper.stop()
        engine.pump.retire()
        engine.callbacks.close(0.0 if engine.retired else USERS_PATIENCE)

    def _end_rest(self) -> None:
        """Close what is left, descriptors all: nothing waits here."""
        self.closed = True
        try:
            self.stack.close()
        finally:
            # Last: a handler may fork meanwhile, and the child has the rest of its copies to close.
            _lifetime.disown(self._engine)

    def become_inert(self) -> None:
        """This is a forked child's copy: close its descriptors."""
        self.closed = True
        self.stack.close()
