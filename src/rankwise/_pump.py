"""The pump: bytes from the sockets into the ledger, and outcomes to whoever waits.

    call()    > Ledger.begin > Sockets.send ==frame==> worker loop > your method
    waiter    < Ledger.reply < Sockets.pull < leader <==frame== worker loop < value | Failed

There is no reader thread between a socket and its caller. Whoever waits takes the *lead*: it polls
`_ready` (an epoll of the reply sockets) for the spin budget, sleeps on it after that, and feeds
what comes to the ledger, for itself and for all others. One thread leads at a time; other waiters
sleep, each at a gate of its own, until their call is settled or the lead is handed to them
(`_lead.py`). Calls that nobody waits for (a future with a callback, say) are led for by the keeper
(`_keeper.py`): `_ready` is nested in the keeper's epoll, and armed there by one epoll_ctl, which
takes effect while the keeper is asleep and costs no wake-up.

Who owns what
    lock        the ledger, the send side of every channel, the lead's state
    the leader  the receive side of every channel
    nobody      runs user code, decodes a payload or writes a log line while holding either

The lock is held for microseconds and never while anything blocks. An exception out of a signal
handler may strike the main thread anywhere in here. Then the waiter marks itself `gone` and kicks
the keeper, which finishes what was begun (`mend`) and passes on the lead; both are straight code
and one C call, between which no handler runs.
"""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import suppress

from rankwise._calls import Call
from rankwise._deadline import clock
from rankwise._interrupts import IN_A_STEP
from rankwise._lead import Lead, Waiter
from rankwise._ledger import Ledger
from rankwise._sockets import IN, OUT, Sockets
from rankwise._telling import Teller
from rankwise._wake import Wake, nothing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable
    from socket import socket

    from rankwise._calls import Error
    from rankwise._port import Port
    from rankwise._spin import Spin
    from rankwise._status import News, StatusPage
    from rankwise.wire.channel import DriverChannel

NEVER = float("inf")
TICK = 0.4  # seconds between the keeper's looks at open calls
HOLD = 0.02  # seconds for which a call is held at most; the keeper wakes as often meanwhile
LONG_SLEEP = 1e6  # seconds; the kernel takes milliseconds, as an int
LOOKS = 16  # looks at the ranks' news before one at the sockets themselves


class Pump:
    """The call path of one group of processes. `spin`: how long a waiter polls."""

    def __init__(
        self,
        sockets: list[socket],
        spin: Spin,
        status: StatusPage | None = None,
        news: News | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.ledger = Ledger(len(sockets))
        self.sockets = Sockets(sockets, self.ledger, self.lock, self._note_news, status, news)
        self.spin = spin
        self.inert: str | None = None  # why nothing may be done here (a forked child's copy)
        self.teller = Teller(self.ledger.settled, self.lock)
        self.tell = self.teller.tell
        self.wake_at = NEVER  # when the keeper will look at the clock again
        self.would_hold = False  # a call was fit to be held since the keeper went to sleep
        self.served = 0  # how often a leader has polled and fed all that it found
        self.closed = False
        self.traffic = False  # something was submitted since the keeper went to sleep
        self._ready = self.sockets.ready
        rouse, kick = Wake(), Wake()
        self._leader_wake, self.keeper_wake = rouse.fd, kick.fd
        self._ready.register(self._leader_wake, IN)
        self._rouse: Callable[[], None] = rouse
        self.kick: Callable[[], None] = kick
        self.outer = select.epoll()  # the keeper sleeps in this one
        self.ready_fd = self._ready.fileno()
        self.outer.register(self.ready_fd, 0)
        self.outer.register(self.keeper_wake, IN)
        outer, fd = self.outer, self.ready_fd
        self.lead = Lead(lambda armed: outer.modify(fd, IN if armed else 0), self._unled)
        self._broken_noted = False

    # -- submitting ---------------------------------------------------------------------------

    def submit(self, calls: tuple[Call, ...], waiter: Waiter | None = None) -> Error | None:
        """Place `calls` in the order of calls and send what can be sent. Never blocks.

        Returns why they cannot be taken, or None. A `waiter` that finds nobody leading leads.
        """
        self.check_entry()
        try:
            with self.lock:
                ledger = self.ledger
                refusal = ledger.refusal()
                if refusal is not None:
                    return refusal
                at_once = len(calls) == 1 and ledger.begin(calls[0])
                if at_once:
                    self.sockets.send(calls[0])
                else:
                    ledger.place(calls)
                    for call in calls:
                        for rank in call.ranks:
                            self.sockets.flush(rank)
                lead = self.lead
                if lead.leader is None:
                    if waiter is not None:
                        lead.take(waiter)
                    elif not lead.armed:
                        lead.placed(calls[0] if at_once and self._may_hold(calls[0]) else None)
                self.traffic = True
                if self.wake_at == NEVER:
                    self.wake_at = 0.0
                    self.kick()
                elif not at_once:
                    self._note_news()  # what is sent at once has no deadline and no slow limit
        except BaseException:
            self.kick()
            raise
        return None

    def check_entry(self) -> None:
        """Raise RuntimeError in a forked child, and in a handler that struck a step of ours."""
        if self.inert is not None:
            raise RuntimeError(self.inert)
        if self.lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError(IN_A_STEP)

    def _may_hold(self, call: Call) -> bool:
        """Whether `call` is a future's, and alone, and the keeper wakes before long. If only the
        last is not so, it will from now on, and the next is held."""
        if call.future is None or len(self.ledger.open) > 1 or self.sockets.blocked:
            return False
        self.would_hold = True
        return self.wake_at < clock() + HOLD

    # -- waiting ------------------------------------------------------------------------------

    def attend(self, call: Call) -> None:
        """Somebody looks at `call` and does not wait. From anywhere, also inside a step of ours. A
        call is held once, before its future is handed out, so no lock is needed here."""
        if self.lead.held is call:
            self.kick()

    def watch(self, call: Call, future: object) -> None:
        """Have `future` told of `call`, by whoever hears that it is done."""
        try:
            with self.lock:
                if not call.done:
                    call.watched = True
                    call.future = future
                    if self.lead.held is call:
                        self.lead.release()
        except BaseException:
            self.kick()
            raise

    def run(self, call: Call) -> Error | None:
        """Submit `call` and wait until it is settled. Returns why it cannot be taken, or None."""
        me, refusal = Waiter(), None
        try:
            refusal = self.submit((call,), me)
            if refusal is None:
                self._wait_as(me, call, None)
        except BaseException as error:
            me.gone = True  # it may be leading: one store in straight code, then one C call
            self.kick()
            if not self._closed_under(call, error):
                raise
        return refusal

    def wait(self, call: Call, until: float | None) -> bool:
        """Wait until `call` is settled (True) or the clock reads `until` (False)."""
        if call.done:
            return True
        self.check_entry()
        me = Waiter()
        try:
            self._wait_as(me, call, until)
        except BaseException as error:
            me.gone = True  # as in `run`
            self.kick()
            if not self._closed_under(call, error):
                raise
        return call.done

    def _wait_as(self, me: Waiter, call: Call, until: float | None) -> None:
        lead = self.lead
        while not call.done:
            if lead.leader is not me:
                with self.lock:
                    if call.done:
                        break
                    lead.take_or_sleep(me, call)
            if lead.leader is me:
                if not self._poll(me, call, until):
                    break
            else:
                assert me.gate is not None
                timeout = -1.0 if until is None else max(0.0, until - clock())
                if not me.gate.acquire(timeout=timeout) and not call.done:
                    break
        with self.lock:
            if lead.leave(me, call):
                self.see_to_rest()
            elif me.outer is not None:
                self._rouse()  # it may be about to sleep over a call that has been settled

    def _closed_under(self, call: Call, error: BaseException) -> bool:
        """Whether `error` is only that a handler of ours has closed the group, and so `call`."""
        if type(error) not in (OSError, ValueError):
            return False
        if self.inert is not None:  # a handler has forked, and this is the child
            raise RuntimeError(self.inert) from None
        return self.closed and call.done

    def _unled(self) -> bool:
        """Whether something is open that neither a waiter nor a loop would lead for."""
        held = self.lead.held
        for call in self.ledger.open.values():
            if not call.done and not call.led and call is not held:
                return True
        return self.sockets.blocked > 0

    def see_to_rest(self) -> None:
        """The lead has ended. What nobody is woken for is the keeper's: deaths that it left to a
        leader who has gone, and bytes that one struck had taken off the sockets."""
        if self.sockets.deaths or self.lead.stranded:
            self.kick()

    def mend(self) -> None:
        """The keeper's: do what a struck thread has left undone."""
        with self.lock:
            self.sockets.flush_all()
            lead = self.lead
            if lead.leader is None or lead.current() is not lead.leader:
                lead.arm(False)  # the strike may have come between the epoll and the note of it
                if lead.hand_on():
                    self.see_to_rest()
        if lead.stranded and not self.lead_once():
            self.rouse_leader()  # it sleeps, where a handler's wait inside its own was struck
        self.tell()

    def lead_once(self) -> bool:
        """Take the lead where nobody has it, deal with what is there, and leave it. Never waits."""
        me = Waiter()
        lead = self.lead
        try:
            with self.lock:
                if lead.current() is not None:
                    return False
                lead.leader = me  # what is armed may stay so: nothing here waits
            if lead.stranded:
                self._recover()
            self._serve(self._ready.poll(0))
            with self.lock:
                if lead.end(me):
                    self.see_to_rest()
        except BaseException:
            me.gone = True
            self.kick()
            raise
        return True

    def _poll(self, me: Waiter, call: Call, until: float | None) -> bool:
        """Lead until `call` is settled or somebody else leads (True), or it is `until` (False)."""
        poll = self._ready.poll
        told = self.sockets.told
        lead = self.lead
        began = 0.0
        looks = 0
        while not call.done and lead.leader is me:
            if lead.stranded:
                self._recover()
                continue
            looks += 1
            events = None
            if looks % LOOKS == 0:  # whatever the words say
                events = poll(0)
            elif ready := told():
                self._take(ready)
                continue
            if not events:
                now = clock()
                if until is not None and now >= until:
                    return False
                if not began:
                    began = now
                if now < began + self.spin.budget:
                    os.sched_yield()
                    continue
                events = poll(None if until is None else min(until - now, LONG_SLEEP))
            self._serve(events)
        if began and call.done:
            self.spin.waited(clock() - began)
        return True

    def _recover(self) -> None:
        """The last leader was struck: first comes what it had taken off the sockets."""
        self.lead.stranded = False
        self.sockets.pull_stranded()

    # -- receiving: the leader's --------------------------------------------------------------

    def _serve(self, events: list[tuple[int, int]]) -> None:
        sockets = self.sockets
        ready: list[DriverChannel] = []
        for fd, event in events:
            channel = sockets.by_fd.get(fd)
            if channel is None:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._leader_wake)
                continue
            if event & OUT:
                with self.lock:
                    self.ledger.mend()
                    self.sockets.flush(channel.rank)
            if event & ~OUT:
                ready.append(channel)
        self._take(ready)

    def _take(self, ready: list[DriverChannel]) -> None:
        """Feed the ledger with what the channels `ready` have, and tell who waits for it."""
        sockets = self.sockets
        sockets.pull(ready)
        if sockets.deaths:
            sockets.bury()
        if self.ledger.settled:
            self.tell()
        self.served += 1

    def _note_news(self) -> None:
        """With the lock held: wake the keeper where it would sleep over a timer, or over an end."""
        ledger = self.ledger
        when = ledger.next_timer()
        if when is not None and when < self.wake_at:
            self.wake_at = when
            self.kick()
        elif ledger.broken is not None and not self._broken_noted:
            self._broken_noted = True
            self.kick()

    # -- telling ------------------------------------------------------------------------------

    def spread(self) -> None:
        """Let everybody hear what was settled: the watchers, and a leader that sleeps."""
        self.tell()
        self.rouse_leader()

    def rouse_leader(self) -> None:
        """Wake the leader, if there is one: its call may have been settled by somebody else."""
        if self.lead.leader is not None:
            self._rouse()

    def port(self, loop: AbstractEventLoop) -> Port:
        """The port of the running event loop `loop`, made at its first await."""
        port = self.lead.port_of(loop)
        if port is None:
            from rankwise._port import Port  # asyncio: 30 ms, and its user has it already

            port = Port(self, loop)
            with self.lock:
                self.lead.add_port(port)
        return port

    def retire(self) -> None:
        """Every call is settled and the keeper has ended: wait until nobody leads, either, and
        leave the event loops."""
        with self.lock:
            self.closed = True  # from here on nobody arms a port
        until = clock() + 5.0
        while (leader := self.lead.leader) and leader.thread != threading.get_ident():
            if clock() > until or leader.gone:
                break
            time.sleep(0.001)  # it was roused and has not had the interpreter's lock yet
        for port in self.lead.ports:
            port.close()

    def close(self) -> None:
        """Close every descriptor, after `retire`; or in a forked child, by close alone: no lock is
        taken, which another thread may have held, and no epoll is changed, which the parent shares.
        """
        self.closed = True
        self.kick = self._rouse = nothing
        self.sockets.close()
        self.outer.close()
