"""An event loop that awaits calls: its own small epoll, in which the reply sockets are nested.

    await fut > poll a little, yielding to the loop > sleep in the loop's selector
    reply sockets > port's epoll > loop's reader > Pump.lead_once > asyncio future

A port is made for each loop that awaits a call of the group, and given to `add_reader` once. It is
armed only while that loop awaits something and nobody leads: a thread's call then costs the loop
nothing. What another thread learns of reaches the loop by one `call_soon_threadsafe` a batch.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from functools import partial

from rankwise._deadline import clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from rankwise._calls import Call
    from rankwise._pump import Pump


TURN = 200e-6  # seconds for which a loop's other tasks may have to wait while it polls


class Port:
    """What one event loop waits for. `settled`, `arm` and `close` run in any thread, the rest in
    the loop's own."""

    def __init__(self, pump: Pump, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pump = pump
        self._waiting: dict[Call, list[asyncio.Future[None]]] = {}
        self._news: deque[Call] = deque()
        self._told = False  # a call of _deliver is on its way
        self._epoll = select.epoll()
        self._epoll.register(pump.ready_fd, 0)
        self._armed = False
        self._turn = 0.0  # when the loop is to run its other tasks
        loop.add_reader(self._epoll.fileno(), self._readable)

    def arm(self, armed: bool) -> None:
        """Let the loop wake for replies, or not. With the pump's lock held."""
        if self._pump.closed:
            return  # its epoll is about to go, or has gone and another has its number
        armed = armed and bool(self._waiting)
        if armed is not self._armed:
            self._epoll.modify(self._pump.ready_fd, select.EPOLLIN if armed else 0)
            self._armed = armed

    def wait(self, call: Call) -> Generator[object, None, None]:
        """Wait in the loop until `call` is settled."""
        pump = self._pump
        # Poll first, as a thread would; but now and then the loop runs its other tasks, also where
        # every call is answered at once.
        began = now = clock()
        until = began + pump.spin.budget
        waiter: asyncio.Future[None] | None = None
        try:
            with pump.lock:
                pump.lead.led_by_loop(call, True)
            settled = False
            while now < until and not settled:
                settled = pump.wait(call, min(until, self._turn))
                now = clock()
                if now >= self._turn:
                    yield None
                    now = clock()
                    self._turn = now + TURN
            waiter = self.loop.create_future()
            with pump.lock:
                if call.done:
                    return
                if call.watchers is None:
                    call.watchers = []
                call.watchers.append(partial(self.settled, call))
                self._waiting.setdefault(call, []).append(waiter)  # after what takes it out
                pump.lead.led_by_loop(call, True)
            yield from waiter
            pump.spin.waited(clock() - began)
        except BaseException:  # the task was cancelled, or a handler's exception struck it
            try:
                if not call.done:
                    self._leave(call, waiter)
            finally:
                pump.kick()  # the keeper finishes what was begun
            raise

    def _leave(self, call: Call, waiter: asyncio.Future[None] | None) -> None:
        with self._pump.lock:
            waiters = self._waiting.get(call, [])
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters:
                self._waiting.pop(call, None)
            self._pump.lead.led_by_loop(call, False)

    def settled(self, call: Call) -> None:
        """`call` has its outcome. From any thread."""
        if asyncio._get_running_loop() is self.loop:
            self._finish(call)
            return
        self._news.append(call)
        if not self._told:
            try:
                self._told = True
                self.loop.call_soon_threadsafe(self._deliver)
            except BaseException:
                self._told = False  # struck: whoever tells of it once more calls again
                if not self.loop.is_closed():  # nobody waits in a closed one
                    raise

    def _deliver(self) -> None:
        self._told = False
        while self._news:
            self._finish(self._news.popleft())

    def _finish(self, call: Call) -> None:
        for waiter in self._waiting.pop(call, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _readable(self) -> None:
        pump = self._pump
        if not pump.lead_once():
            with pump.lock:
                if pump.lead.current() is not None:  # it may have ended since, and armed this
                    self.arm(False)  # somebody leads; the end of the lead arms it again

    def close(self) -> None:
        """Leave the loop. From any thread: a loop that runs elsewhere removes its own reader."""
        if self._epoll.closed:
            return
        if self.loop.is_closed():
            self._epoll.close()
        elif asyncio._get_running_loop() is self.loop or not self.loop.is_running():
            self.loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        else:
            try:
                self.loop.call_soon_threadsafe(self.close)
            except RuntimeError:
                self._epoll.close()
