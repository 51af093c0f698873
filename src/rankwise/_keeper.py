"""The keeper: one background thread a group, asleep unless something happens that nobody waits for.

    launcher ==message=> keeper > deaths, phases, output       timers > Ledger.expire
    replies that no caller leads for > Pump.lead_once           kick   > Pump.mend

It sleeps in `Pump.outer`: the launcher's channel and pidfd, its own eventfd, and the reply sockets
(nested, armed only when a call is open that nobody waits for and that is not held: `_lead.py`).
While calls are open it also looks around, about twice a second: for calls and answers that were
lost (`_lookout.py`), for acknowledgements that nobody has fetched, and for calls that take long.
Where futures are submitted that may be held, it wakes every `HOLD` seconds, and whenever it sleeps
again, nothing is held any more. An idle group's keeper does not wake, but to give back the arena's
memory.

An engine that is abandoned (its group was collected) is ended by a thread that the keeper starts: a
finalizer may run inside any lock and can do no more than say so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial

from rankwise._background import Background
from rankwise._calls import Garbled
from rankwise._deadline import clock
from rankwise._lookout import Lookout, Sight
from rankwise._pump import HOLD, LONG_SLEEP, NEVER, TICK
from rankwise._status import DONE, LATE, POLLS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._calls import Call
    from rankwise.backends.local import LocalEngine

logger = logging.getLogger("rankwise")

LINGER = 2  # looks without work before the keeper sleeps for good
AGAIN = 0.1  # seconds between two looks, while something seems to be lost


class Keeper:
    """Owns the background thread of `engine`."""

    def __init__(self, engine: LocalEngine, name: str) -> None:
        self.abandoned = False
        self._ending = False
        self._engine = engine
        self._pump = engine.pump
        self._idle = 0
        self._next_look = 0.0
        self._lookout = Lookout()
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
        failed = False
        while not self._ending:
            events = pump.outer.poll(self._before_sleep())
            if self._ending:
                break
            try:
                self._handle({fd for fd, _ in events})
                failed = False
            except Exception as error:  # ours, or the machine's (no descriptors, no memory)
                self._give_up(error, failed)
                if failed:  # what it has not dealt with wakes it again at once
                    time.sleep(AGAIN)
                failed = True
            if self.abandoned:
                self.abandoned = False
                threading.Thread(target=self._engine.kill, name=self._thread.name + "-end").start()

    def _give_up(self, error: Exception, again: bool) -> None:
        """Nobody may wait for a keeper that failed: the group breaks, and says why, once."""
        with self._pump.lock:
            self._pump.ledger.break_group(Garbled(-1, f"the driver's own thread failed: {error!r}"))
        self._pump.spread()
        if again:
            return
        # Not by this thread: a handler of the user's, which may be what failed, must not end it.
        what = "%s: the group's own thread failed"
        self._engine.defer(partial(logger.error, what, self._engine.name, exc_info=error))

    def _before_sleep(self) -> float | None:
        """Release what is held. Returns for how long to sleep, seconds; None: until woken."""
        pump = self._pump
        with pump.lock:
            now = clock()
            pump.lead.release()
            if pump.traffic or pump.ledger.open:
                self._idle = 0
            awake = self._idle < LINGER
            until = max(now, self._next_look) if awake else NEVER
            if pump.would_hold:
                until = min(until, now + HOLD)
            pump.traffic = pump.would_hold = False
            timer = pump.ledger.next_timer()
            if timer is not None:
                until = min(until, timer)
            if self._engine.next_step is not None:
                until = min(until, self._engine.next_step)
            # Idle, it may sleep until the arena is to be tended: the next call wakes it, to look.
            pump.wake_at = until if awake else NEVER
        return None if until == NEVER else min(max(0.0, until - now), LONG_SLEEP)

    def _handle(self, fds: set[int]) -> None:
        pump = self._pump
        engine = self._engine
        now = clock()
        due = now >= self._next_look
        if due:  # noted first: a keeper that fails at it must not try again at once
            self._next_look = now + TICK
            self._idle += 1
        if pump.keeper_wake in fds:
            try:
                os.eventfd_read(pump.keeper_wake)
            except BlockingIOError:
                pass
            pump.mend()
        if engine.link.control_fd in fds or engine.link.launcher_pidfd in fds:
            engine.link.hear()
        # Woken by the clock alone (a deadline, something held) it leads once: an answer that is
        # there counts. But it rouses no leader, who has seen all.
        look = due or pump.sockets.deaths or pump.ready_fd in fds
        if (look or not fds) and not pump.lead_once() and look:
            with pump.lock:
                pump.lead.disarm()
            pump.rouse_leader()
        now = clock()
        with pump.lock:
            expired = pump.ledger.expire(now)
        if due:
            self._look_for_lost()
            if self._lookout.suspects:
                self._next_look = now + AGAIN
        if expired or pump.ledger.settled:
            pump.spread()
        engine.step(now)

    def _look_for_lost(self) -> None:
        """Look at every rank that owes an answer. What it means is for `Lookout` to say."""
        pump = self._pump
        served = pump.served  # before the calls: what was fed by then is not owed any more
        with pump.lock:
            owing = list(pump.ledger.owed())
            channels = pump.sockets.channels
            owed = [
                (rank, call)
                for rank, call in owing
                if channels[rank].has_sent(call) and not channels[rank].eof
            ]
        self._engine.reports.tick(clock(), owing)
        sights = [self._sight(rank, call) for rank, call in owed]
        lost = self._lookout.look(served, sights, pump.served)
        for reason in lost:
            with pump.lock:
                pump.ledger.break_group(reason)
        if lost:
            pump.spread()
        elif self._lookout.suspects and not pump.lead_once():
            pump.rouse_leader()  # it feeds what it holds, and polls anew

    def _sight(self, rank: int, call: Call) -> Sight:
        """How `rank`, which owes `call`, looks now. The order of the readings is the proof."""
        ranks = self._engine.ranks
        sockets = self._pump.sockets
        sleep = ranks.word(rank, POLLS)
        unread = sockets.unread_there(rank)
        still = sleep & 1 and sleep == ranks.word(rank, POLLS)
        finished = ranks.word(rank, DONE) >= call.id
        # After these: a call whose answer is late was counted before the rank slept or went on.
        late = ranks.word(rank, LATE)
        # Last: an answer that was written before the page said so is in this socket, or was.
        return Sight(
            rank, call.id, call.method, bool(still and not unread and not late),
            finished and not late, sockets.unread_here(rank),
        )  # fmt: skip
