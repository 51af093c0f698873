"""The keeper: one background thread a group, asleep unless something happens that nobody waits for.

    launcher ==message=> keeper > deaths, phases, output       timers > Ledger.expire
    replies that no caller leads for > Pump.lead_once           kick   > Pump.mend

It sleeps in `Pump.outer`: the launcher's channel and pidfd, its own eventfd, and the reply sockets
(nested, armed only when a call is open that nobody waits for). While calls are open it also looks
around every quarter of a second: for answers that were lost, for acknowledgements that nobody has
fetched, and for calls that take long. An idle group's keeper does not wake at all.

An engine that is abandoned (its group was collected) is ended by a thread that the keeper starts: a
finalizer may run inside any lock and can do no more than say so.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import partial

from rankwise._background import Background
from rankwise._calls import Garbled
from rankwise._deadline import clock
from rankwise._pump import NEVER, TICK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise.backends.local import LocalEngine

logger = logging.getLogger("rankwise")

LINGER = 4  # looks without work before the keeper sleeps for good


class Keeper:
    """Owns the background thread of `engine`."""

    def __init__(self, engine: LocalEngine, name: str) -> None:
        self.abandoned = False
        self._ending = False
        self._engine = engine
        self._pump = engine.pump
        self._idle = 0
        self._looked_at = 0.0
        # rank -> the call that it owed while idle, and what the pump had served at the first look
        self._suspects: dict[int, tuple[int, int]] = {}
        self._thread = Background(self._run, f"rankwise-{name}-io")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it. Not from the thread itself."""
        self._ending = True
        self._pump.kick()
        self._thread.join()

    def _run(self) -> None:
        pump = self._pump
        while not self._ending:
            events = pump.outer.poll(self._timeout())
            if self._ending:
                break
            try:
                self._handle({fd for fd, _ in events})
            except Exception as error:  # ours, or the machine's (no descriptors, no memory)
                self._give_up(error)
            if self.abandoned:
                self.abandoned = False
                threading.Thread(target=self._engine.kill, name=self._thread.name + "-end").start()

    def _give_up(self, error: Exception) -> None:
        """Nobody may wait for a keeper that failed: the group breaks, and says why."""
        with self._pump.lock:
            self._pump.ledger.break_group(Garbled(-1, f"the driver's own thread failed: {error!r}"))
        self._pump.spread()
        # Not by this thread: a handler of the user's, which may be what failed, must not end it.
        what = "%s: the group's own thread failed"
        self._engine.defer(partial(logger.error, what, self._engine.name, exc_info=error))

    def _timeout(self) -> float | None:
        pump = self._pump
        with pump.lock:
            now = clock()
            busy = pump.traffic or bool(pump.ledger.open)
            pump.traffic = False
            self._idle = 0 if busy else self._idle + 1
            until = now + TICK if self._idle < LINGER else NEVER
            timer = pump.ledger.next_timer()
            if timer is not None:
                until = min(until, timer)
            if self._engine.next_step is not None:
                until = min(until, self._engine.next_step)
            pump.wake_at = until
        return None if until == NEVER else max(0.0, until - now)

    def _handle(self, fds: set[int]) -> None:
        pump = self._pump
        engine = self._engine
        if pump.keeper_wake in fds:
            try:
                os.eventfd_read(pump.keeper_wake)
            except BlockingIOError:
                pass
            pump.mend()
        if engine.link.control_fd in fds or engine.link.launcher_pidfd in fds:
            engine.link.hear()
        look = pump.sockets.deaths or pump.ready_fd in fds or not fds
        if look and not pump.lead_once():
            with pump.lock:
                pump.lead.disarm()
            pump.rouse_leader()
        now = clock()
        with pump.lock:
            expired = pump.ledger.expire(now)
        if now >= self._looked_at + TICK:
            self._looked_at = now
            self._look_for_lost()
        if expired or pump.ledger.settled:
            pump.spread()
        engine.step(now)

    def _look_for_lost(self) -> None:
        """A rank that is idle while it owes an answer, at two looks in a row, will not give it."""
        pump = self._pump
        ranks = self._engine.ranks
        suspects: dict[int, tuple[int, int]] = {}
        served = pump.served
        with pump.lock:
            owed = list(pump.ledger.owed())
        self._engine.reports.tick(clock(), owed)
        for rank, call in owed:
            # A rank that has read its call, and got no CPU to say so, has an idle page too.
            idle = ranks.state(rank)[0] == "idle" and ranks.asleep(rank)
            if idle and pump.sockets.quiet(rank):
                first = self._suspects.get(rank)
                suspects[rank] = first if first and first[0] == call.id else (call.id, served)
        for rank, (call_id, before) in suspects.items():
            # What was there at the first look is fed once a leader has polled anew, and fed, since.
            if served >= before + 2:
                with pump.lock:
                    pump.ledger.break_group(
                        Garbled(rank, f"it is idle and owes the answer to call {call_id}")
                    )
        self._suspects = suspects
