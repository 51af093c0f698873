"""The lead: which thread polls the reply sockets for all that wait, and how that moves on.

    wait > take ---> leads ---> hand_on ---> the next sleeper's gate
       `-> sleep (at a gate) <----'    `---> nobody: armed for the keeper and the event loops

One thread leads at a time. Where nobody does, but a call is open that no thread waits for, the
keeper's epoll (or a loop's) is *armed*: it then wakes for replies. Taking the lead disarms both.

A future that is the only open call is *held* at first, where the keeper is to wake within `HOLD`
(`Pump._may_hold`): most are waited for at once, and to arm the keeper for so short a while is a
tenth to a fifth of a call. Whoever looks at it without waiting, gives up waiting, or submits
another has the keeper armed; so has the keeper whenever it wakes.

A signal handler may interrupt the main thread anywhere, and call or wait itself, or raise. Its own
wait takes the lead from the one that it has interrupted (`Waiter.outer`), which cannot go on before
it returns. Who was struck by an exception is `gone`: it leads no more, and whatever it had taken
off the sockets is *stranded* until the next leader deals with it.

Pure state, but for the gates, the two ways to arm, and `Call.future`: every method but `port_of` is
called with the pump's lock held, blocks nowhere, and can be run again from its start.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

    from rankwise._calls import Call
    from rankwise._port import Port


class Waiter:
    """One thread in `wait`. `gone`: it was struck by an exception and will not lead."""

    __slots__ = ("gate", "gone", "outer", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.gone = False
        self.outer: Waiter | None = None  # the lead of this thread that a handler has interrupted
        self.gate: threading.Lock | None = None

    def open_gate(self) -> None:
        if self.gate is not None:
            try:
                self.gate.release()
            except RuntimeError:
                pass  # it is open already


class Lead:
    """Who leads, who sleeps, and who is armed instead.

    arm_keeper: lets the keeper wake for replies (True), or not.
    unled: whether something is open that neither a waiter nor a loop would lead for.
    """

    __slots__ = (
        "_arm_keeper", "_unled", "armed", "held", "leader", "ports", "sleepers", "stranded",
    )  # fmt: skip

    def __init__(self, arm_keeper: Callable[[bool], object], unled: Callable[[], bool]) -> None:
        self.leader: Waiter | None = None
        self.sleepers: dict[Waiter, Call] = {}
        self.stranded = False  # the last leader was struck, and may have left bytes behind
        self.armed = False
        self.held: Call | None = None  # a future at which nobody has looked yet
        self.ports: list[Port] = []  # event loops that await calls
        self._arm_keeper = arm_keeper
        self._unled = unled

    def current(self) -> Waiter | None:
        """The leader; where it is gone, the one of the same thread that it has interrupted."""
        leader = self.leader
        while leader is not None and leader.gone:
            self.stranded = True
            leader = leader.outer
        return leader

    def take(self, me: Waiter) -> None:
        """`me` leads from now on."""
        if self.armed:
            self.arm(False)
        for port in self.ports:
            port.arm(False)
        if self.leader is not None:
            outer = self.current()
            if outer is not me:
                me.outer = outer
        self.leader = me

    def placed(self, alone: Call | None) -> None:
        """Nobody leads, nothing is armed, and a call was placed that nobody waits for yet. It is
        held, if it is `alone`; if that is None, the keeper is armed for all that is open."""
        self.held = alone
        if alone is None:
            self.arm(True)

    def take_or_sleep(self, me: Waiter, call: Call) -> None:
        """`me` waits for `call`: it leads, or sleeps where somebody else does."""
        self._let_go(call)
        leader = self.current()
        if leader is None or leader.thread == me.thread:
            # Nobody leads; or this runs in a signal handler that interrupted its own thread's
            # lead, which cannot go on before it returns.
            self.stranded = self.stranded or leader is not None
            self.take(me)
            if not call.watched:
                call.future = None  # its holder sees for himself: there is nothing to announce
            return
        if me.gate is None:
            gate = threading.Lock()
            gate.acquire()
            me.gate = gate
            if call.watchers is None:
                call.watchers = []
            call.watchers.append(gate.release)
        self.sleepers[me] = call

    def leave(self, me: Waiter, call: Call) -> bool:
        """`me` waits for `call` no longer. Whether nobody leads now who did before."""
        others = me.gone or me.outer or me.gate or self.sleepers or self.ports or self.armed
        if self.leader is me and not others and not self._unled():
            self.leader = None  # nearly always: as below, where there is nobody to hand on to
            return True
        if me.gate is not None:
            self.sleepers.pop(me, None)
            if call.watchers and not call.done:
                call.watchers.remove(me.gate.release)  # who polls a future leaves nothing in it
        return self.end(me)

    def end(self, me: Waiter) -> bool:
        """`me` leads no longer, if it did. Whether nobody leads now who did before."""
        if self.current() is not me:
            return False
        self.leader = me  # past a handler's own wait, inside this one, that was struck
        return self.hand_on()

    def hand_on(self) -> bool:
        """The leader leads no more: a sleeper does, or what is open is armed for (True)."""
        if self.leader is not None:
            self.leader = self.leader.outer
        self.leader = self.current()
        if self.leader is not None:
            return False  # it may be in the middle of receiving, and nobody else may begin
        if self.sleepers:
            innermost = {waiter.thread: waiter for waiter in self.sleepers}
            for waiter, call in list(self.sleepers.items()):
                if innermost[waiter.thread] is not waiter:
                    continue  # a handler that waits too has interrupted it: it cannot lead now
                del self.sleepers[waiter]
                if not waiter.gone and not call.done:
                    self.leader = waiter
                    waiter.open_gate()
                    return False
        self.rearm()
        return True

    def rearm(self) -> None:
        """Where nobody leads: wake the keeper and the loops for what each of them leads for.

        Bare acknowledgements of settled calls wake nobody: the keeper's next look fetches them.
        """
        if self.leader is not None:
            return
        for port in self.ports:
            port.arm(True)
        unled = self._unled()
        if unled is not self.armed:
            self.arm(unled)

    def _let_go(self, call: Call) -> None:
        if self.held is call:
            self.held = None

    def release(self) -> None:
        """Nothing is held any more: where nobody leads, the keeper is armed for it."""
        self.held = None
        self.rearm()

    def led_by_loop(self, call: Call, led: bool) -> None:
        """An event loop leads for `call` from now on, or no longer."""
        call.led = led
        self._let_go(call)
        self.rearm()

    def port_of(self, loop: AbstractEventLoop) -> Port | None:
        for port in self.ports:  # without the lock: the list is never changed in place
            if port.loop is loop:
                return port
        return None

    def add_port(self, port: Port) -> None:
        self.ports = [*(port for port in self.ports if not port.loop.is_closed()), port]

    def disarm(self) -> None:
        """Somebody leads: the keeper need not wake for replies. The end of the lead rearms it."""
        if self.leader is not None and self.armed:
            self.arm(False)

    def arm(self, armed: bool) -> None:
        self._arm_keeper(armed)
        self.armed = armed
