"""Ranks as threads of the driver: for pdb, and for tests that need no process.

    call() > Ledger.place > rank's queue > the worker's own loop, in a thread > Ledger.reply > gate

The same ledger, codec and worker loop as with processes, so order, copies and errors are the same:
arguments and results are pickled and loaded. There is nothing to poll and nobody dies, so there is
no pump: a waiter sleeps at its gate, and one timer thread runs the deadlines out. It is long, for
it is a whole engine: calls, timers, reports and the end share its one lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from functools import partial
from queue import SimpleQueue

from rankwise import _context, _lifetime, _planned
from rankwise._answers import slow_text
from rankwise._background import Bell
from rankwise._callbacks import USERS_PATIENCE, Callbacks
from rankwise._calls import Call, Cancelled, Closed, Error
from rankwise._deadline import clock, deadline, left
from rankwise._environment import rank_infos
from rankwise._interrupts import IN_A_STEP
from rankwise._ledger import Ledger
from rankwise._messages import DEADLINE, EXIT, HAS_DEADLINE, WANT_VALUE
from rankwise._ranks import Ranks
from rankwise._report import give_reports, look, overdue_ranks, thread_stacks
from rankwise._serve import serve
from rankwise._spin import Spin
from rankwise._status import StatusPage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Generator, Iterable
    from typing import Any

    from rankwise._future import GroupFuture
    from rankwise._report import RankReport
    from rankwise._serve import Channel
    from rankwise._spec import GroupSpec
    from rankwise.wire.arena import Arena

    Frame = tuple[int, int, int, bytes]

logger = logging.getLogger("rankwise")

NOTICE = 0.2  # seconds that an idle rank's thread has, even at a kill, to see that it is over


class QueueChannel:
    """What the worker's loop sees instead of a socket."""

    def __init__(self, engine: InlineEngine, rank: int) -> None:
        self.frames: SimpleQueue[Frame] = SimpleQueue()
        self.arena: Arena | None = None
        self._engine = engine
        self._rank = rank

    def receive(self) -> Frame:
        return self.frames.get()

    def reply(self, kind: int, call_id: int, body: bytes) -> None:
        self._engine.reply(self._rank, kind, call_id, body)

    def hang_up(self) -> None:
        self._engine.hang_up(self._rank)


class InlineEngine:
    """One group of threads."""

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.world_size = spec.world_size
        self.infos = rank_infos(spec, "127.0.0.1", 0)
        self.spin = Spin(0.0, learns=False)
        self.starting = True
        self.arena: Arena | None = None  # one process: nothing to share
        self.inert: str | None = None
        self._status = StatusPage(spec.world_size)
        self.ranks = Ranks(spec.world_size, self._status, threads=True)
        self._ledger = Ledger(spec.world_size)
        self._ledger.explains = True
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # a timer, or the end
        self._callbacks = Callbacks(spec.name)
        self.on_break: Callable[[Error], object] | None = None
        self.outlook: str | None = None
        self.retired = False
        self._closed = False
        self._abandoned = False
        self._ending = False
        self._ended = False
        self._closing = threading.RLock()
        # Of a test: what is to go wrong, and the time.
        planned = _planned.faults
        self._faults = "" if planned is None else planned.text_for(spec.world_size, threads=True)
        self._manual = _planned.clock
        if self._manual is not None:
            self._manual.adopt(self)
        self._channels = [QueueChannel(self, rank) for rank in range(spec.world_size)]
        self._threads = [
            threading.Thread(
                target=self._serve, args=(rank,), name=f"rankwise-{spec.name}-{rank}", daemon=True
            )
            for rank in range(spec.world_size)
        ]
        self._timer = threading.Thread(
            target=self._run_timers, name=f"rankwise-{spec.name}-timers", daemon=True
        )
        _lifetime.adopt(self)
        for thread in (*self._threads, self._timer):
            thread.start()

    # -- the ranks' threads -------------------------------------------------------------------

    def _serve(self, rank: int) -> None:
        def prepare(place: _context.Place, settings: dict[str, object]) -> None:
            manual = self._manual
            _context.enter_thread(place, left if manual is None else manual.left)

        words = self._status.words(rank)
        channel: Channel = self._channels[rank]
        before = None
        try:
            if self._faults:
                from rankwise.testing._inject import arm

                sleep = time.sleep if self._manual is None else self._manual.sleep
                channel, before = arm(self._faults, rank, channel, sleep)
            serve(channel, words, prepare, before)
        finally:
            words.release()
            if self._abandoned:
                self.kill()

    def reply(self, rank: int, kind: int, call_id: int, body: bytes) -> None:
        with self._lock:
            self._ledger.reply(rank, call_id, kind, body, self._now())
            self._send(rank)
            self._news.notify_all()
        self._tell()

    def _send(self, rank: int) -> None:
        while (call := self._ledger.next_to_send(rank)) is not None:
            flags = WANT_VALUE if call.reply_from is None or call.reply_from == rank else 0
            body = call.body_for(rank)
            if call.deadline is not None:
                flags |= HAS_DEADLINE
                body = DEADLINE.pack(call.deadline) + body
            if call.id in self._ledger.cancelled:
                self._status.cancel(rank, call.id)
            self._ledger.sent(rank, call)
            self._channels[rank].frames.put((call.kind, flags, call.id, body))

    def _run_timers(self) -> None:
        while True:
            self.tick()
            with self._lock:
                if self._closed:
                    return
                timer = self._ledger.next_timer()
                self._news.wait(left(timer) if self._manual is None else None)

    def _now(self) -> float:
        return clock() if self._manual is None else self._manual.time()

    def tick(self) -> None:
        """Time has passed: what is due is done."""
        with self._lock:
            self._ledger.expire(clock() if self._manual is None else self._manual.due())
            overdue, self._ledger.overdue = self._ledger.overdue, deque()
            slow, self._ledger.slow = self._ledger.slow, deque()
        self._explain(overdue, slow)
        self._tell()

    def deadline(self, timeout: float | None) -> float | None:
        return None if timeout is None else self._now() + max(0.0, timeout)

    def _explain(self, overdue: Iterable[Call], slow: Iterable[Call]) -> None:
        for call in overdue:
            give_reports(call, self.inquire(overdue_ranks(call), 0.0))
            with self._lock:
                self._ledger.explained(call)
        for call in slow:
            if call.slow and not call.done:
                text = slow_text(call, self, call.slow[1], self.inquire(tuple(call.missing()), 0.0))
                self.defer(partial(logger.warning, "%s", text))

    def inquire(
        self, ranks: tuple[int, ...], patience: float, *, lately: bool = False
    ) -> dict[int, RankReport]:
        reports = look(self, ranks)
        threads = {rank: self._threads[rank].ident for rank in ranks}
        for rank, told in thread_stacks(threads).items():
            reports[rank].hear(told)
        return reports

    # -- calls --------------------------------------------------------------------------------

    def run(self, call: Call) -> Error | None:
        refusal = self.submit((call,))
        if refusal is None:
            self.wait(call, None)
        return refusal

    def submit(self, calls: tuple[Call, ...]) -> Error | None:
        self.check_entry()
        with self._lock:
            refusal = self.refusal()
            if refusal is not None:
                return refusal
            self._ledger.place(calls)
            for call in calls:
                for rank in call.ranks:
                    self._send(rank)
            self._news.notify_all()
        return None

    def hang_up(self, rank: int) -> None:
        """`rank` answers no more, though its thread lives."""
        with self._lock:
            self._ledger.hangup(rank, self._now())
            self._news.notify_all()

    def barrier(self, call: Call) -> None:
        self.check_entry()
        with self._lock:
            self._ledger.barrier(call)

    def wait(self, call: Call, until: float | None) -> bool:
        # A start and an end go by the real clock: nobody would move the other one meanwhile.
        manual = None if self.starting or self._ending else self._manual
        bell = Bell() if manual is None else manual
        self.check_entry()
        with self._lock:
            if call.done:
                return True
            call.watchers = [*(call.watchers or ()), bell.ring]
        if not bell.wait_for(lambda: call.done, until):
            with self._lock:
                call.watchers.remove(bell.ring)  # who polls a future leaves nothing in it
        return call.done

    def await_call(self, call: Call, loop: AbstractEventLoop) -> Generator[object, None, None]:
        self.check_entry()
        waiter = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def told() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        with self._lock:
            if call.done:
                return
            call.watchers = [*(call.watchers or ()), told]
        yield from waiter

    def attend(self, call: Call) -> None:
        """Nothing to do: every answer is heard at once."""

    def cancel(self, call: Call) -> bool:
        self.check_entry()
        with self._lock:
            dropped = self._ledger.cancel(call)
            if not dropped and not call.ended:
                self.ranks.cancel(call, self._ledger)
        self._tell()
        return dropped

    def watch(self, future: GroupFuture[Any]) -> None:
        self.check_entry()
        self._callbacks.ensure()
        future._call.watched = True

    def defer(self, job: Callable[[], object]) -> None:
        self._callbacks.defer(job)

    def unfetched(self, future: GroupFuture[Any]) -> None:
        _lifetime.log_unfetched(future)

    def refusal(self) -> Error | None:
        return Closed() if self._closed and not self.retired else self._ledger.refusal()

    def owed(self) -> dict[int, Call]:
        with self._lock:
            return dict(self._ledger.owed())

    def _tell(self) -> None:
        ledger = self._ledger
        while True:
            with self._lock:
                if not ledger.settled:
                    break
                call = ledger.settled.popleft()
            for watcher in call.watchers or ():
                watcher()
            self._callbacks.announce(call)
        if ledger.broken is not None:
            self.report_failure(ledger.broken)
        while ledger.reports:
            _lifetime.log_failure(*ledger.reports.popleft())

    def report_failure(self, cause: Error) -> None:
        with self._lock:
            on_break = self.on_break
            if on_break is None:
                return  # without a store, which might undo that of who seats this engine
            self.on_break = None
        if not isinstance(cause, Closed):
            on_break(cause)

    # -- the end ------------------------------------------------------------------------------

    def check_entry(self) -> None:
        if self.inert is not None:
            raise RuntimeError(self.inert)
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError(IN_A_STEP)

    check_restart = check_entry

    def close(self, timeout: float | None, *, drop: bool = False) -> None:
        """See WorkerGroup.close. A thread cannot be killed: one that is stuck is left, a daemon."""
        self.check_entry()
        until = deadline(timeout)
        if self._callbacks.is_current() and self._ending:
            return  # whoever closes waits for the callback thread, which so must not wait for it
        with self._lock:
            self._ledger.closing = True
            if drop and not self._closed:
                self._drop()  # before its turn comes: so it hurries who closes already
        self._tell()
        with self._closing:
            self._ending = True
            if not self._ended:
                self._close(until)

    def _close(self, until: float | None) -> None:
        drained = Call("close", b"", ())
        self.barrier(drained)
        self._end(late=not self.wait(drained, until))
        until = until if until is None else max(until, clock() + NOTICE)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(left(until))
        self._callbacks.close(0.0 if self.retired else USERS_PATIENCE)
        self._ended = True
        if not any(thread.is_alive() for thread in self._threads):
            self.ranks.forget_status()

    def _drop(self) -> None:
        """With the lock held: drop what is queued, and set the cancel flags of the rest."""
        self._ledger.drop_queued(Closed())
        self.ranks.cancel_all(self._ledger)

    def kill(self) -> None:
        """Settle every open call and stop listening. A thread in the user's code runs on."""
        self.close(0.0, drop=True)

    def retire(self, timeout: float | None) -> None:
        self.retired = True
        self.close(timeout)

    def _end(self, late: bool) -> None:
        with self._lock:
            if late:
                self._drop()  # nothing else can end what runs on
            self._closed = True
            self._ledger.break_group(Closed())
            self._news.notify_all()
        self._tell()
        for channel in self._channels:
            channel.frames.put((EXIT, 0, 0, b""))
        if threading.current_thread() is not self._timer:
            self._timer.join()
        _lifetime.disown(self)

    def refuse(self, *, cancel: bool = False) -> None:
        self.check_entry()
        with self._lock:
            self._ledger.closing = True
            if cancel:
                self._ledger.drop_queued(Cancelled())
        self._tell()

    def learn_pids(self) -> None:
        pass  # they are ours

    def break_calls(self) -> None:
        """Settle every open call: the interpreter is about to exit."""
        with self._lock:
            self._ledger.exit()
        self._tell()

    def abandon(self) -> bool:
        """The group was collected. Runs in a finalizer: the ranks' threads are told, no more."""
        if self._closed:
            return False
        self._abandoned = True
        for channel in self._channels:
            channel.frames.put((EXIT, 0, 0, b""))  # the ranks end, and the first ends the rest
        return True

    def become_inert(self, why: str) -> None:
        """This is a forked child's copy, without its threads."""
        self._closed = True
        self.inert = why
