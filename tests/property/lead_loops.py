"""Event loops in the model of the lead: their real ports, over an epoll and a loop that are flags.

A loop's thread runs one thing at a time: a task that polls, what another thread has told it, or its
reader (`Port._readable`), which is cut where `Pump.lead_once` lets go of the lock.
"""

from __future__ import annotations

import contextlib
from collections import deque
from types import SimpleNamespace
from typing import Any

from rankwise._calls import Call
from rankwise._lead import Waiter
from rankwise._port import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lead_world import World

IDLE, READING, REFUSED = "idle", "reading", "refused"  # what a loop does in its reader


class Promise:
    """As much of an asyncio.Future as a port asks for."""

    def __init__(self) -> None:
        self.kept = False

    def done(self) -> bool:
        return self.kept

    def set_result(self, value: None) -> None:
        self.kept = True


class Loop(Port):
    """The real port of an event loop, with an epoll and a loop that are flags."""

    def __init__(self, world: World) -> None:
        me: Any = self
        me.loop = self
        me._pump = SimpleNamespace(
            lock=contextlib.nullcontext(), closed=False, ready_fd=0, lead=world.lead,
            lead_once=lambda: False,
        )  # fmt: skip
        me._epoll = SimpleNamespace(modify=self._modify)
        self._waiting, self._news, self._told, self._armed = {}, deque(), False, False
        self.armed = False  # as the kernel sees it
        self.does = IDLE
        self.me: Waiter | None = None  # while it leads
        self.call_soon_threadsafe = lambda callback: None  # `_told` says that it is to be called

    def _modify(self, fd: int, events: int) -> None:
        self.armed = bool(events)

    def key(self, calls: list[Call]) -> object:
        waits = tuple((calls.index(call), len(futures)) for call, futures in self._waiting.items())
        return self.armed, self._armed, self._told, len(self._news), self.does, waits

    def park(self, call: Call) -> Promise | None:
        """As in `Port.wait`: a task has polled, and sleeps in its loop until `call` is settled."""
        if call.done:
            return None
        promise = Promise()
        if call.watchers is None:
            call.watchers = []
        call.watchers.append(lambda: self.settled(call))
        self._waiting.setdefault(call, []).append(promise)
        self._pump.lead.led_by_loop(call, True)
        return promise

    def cancel(self, call: Call, promise: Promise | None) -> None:
        """The task that awaits `call` is cancelled: before it has parked, or when it has."""
        if not call.done:
            self._leave(call, promise)

    def read(self, world: World) -> None:
        """The next step of the reader."""
        if self.does == IDLE:
            self.me = world.lead_once(-3)
            self.does = REFUSED if self.me is None else READING
            return
        if self.me is not None:
            world.end_once(self.me)
        else:
            self._readable()  # the rest of it: somebody else led
        self.does, self.me = IDLE, None

    def strike(self) -> None:
        """A handler raises while the loop leads; what runs in a loop may fail, and it goes on."""
        assert self.me is not None
        self.me.gone = True
        self.does, self.me = IDLE, None
