"""A port, struck at the moment that costs most; a socket's end, and a lead, likewise."""

from __future__ import annotations

import socket
import threading
from collections import deque

import pytest

from rankwise._lead import Waiter
from rankwise._ledger import Ledger
from rankwise._port import Port
from rankwise._pump import Pump as RealPump
from rankwise._sockets import Sockets
from rankwise._spin import Spin


class Struck(Exception):
    pass


class Loop:
    """Calls back as asyncio's loop does; the first time a handler's exception comes first."""

    def __init__(self, closed=False):
        self.closed = closed
        self.wanted = []
        self.strikes = 1

    def call_soon_threadsafe(self, callback):
        if self.strikes:
            self.strikes -= 1
            raise RuntimeError("Event loop is closed") if self.closed else Struck
        self.wanted.append(callback)

    def is_closed(self):
        return self.closed


def port_of(loop, pump=None):
    port = object.__new__(Port)
    port.loop, port._pump = loop, pump
    port._waiting, port._news, port._told = {}, deque(), False
    return port


def test_a_strike_while_a_loop_is_told_leaves_it_to_be_told_again():
    loop = Loop()
    port = port_of(loop)
    with pytest.raises(Struck):
        port.settled("call")
    port.settled("call")  # as `mend` has it told once more
    assert loop.wanted == [port._deliver]
    port.settled("another")
    assert len(loop.wanted) == 1, "one delivery for both"
    loop.wanted[0]()
    port.settled("third")
    assert len(loop.wanted) == 2


def test_a_loop_that_is_closed_is_told_nothing():
    loop = Loop(closed=True)
    port_of(loop).settled("call")
    assert loop.wanted == []


class Pump:
    """One whose lead was taken when the loop looked, and is `leader`'s now."""

    def __init__(self, leader):
        self.lock = threading.RLock()
        self.lead = self
        self.leader = leader

    def lead_once(self):
        return False

    def current(self):
        return self.leader


@pytest.mark.parametrize("leads", [True, False])
def test_a_port_is_disarmed_for_a_leader_that_still_leads_alone(leads, monkeypatch):
    """Else who has ended meanwhile has armed it, and nobody would again."""
    armed = []
    monkeypatch.setattr(Port, "arm", lambda port, to: armed.append(to))
    port_of(Loop(), Pump(object() if leads else None))._readable()
    assert armed == ([False] if leads else [])


def test_an_end_of_file_that_was_read_by_who_was_struck_is_told_by_the_next():
    ours, theirs = socket.socketpair()
    ledger = Ledger(1)
    sockets = Sockets([ours], ledger, threading.RLock(), lambda: None)
    theirs.close()
    sockets.channels[0].receive()  # and then the handler raises
    assert sockets.channels[0].eof and not ledger.hung
    sockets.pull(sockets.channels)
    assert ledger.hung == {0}
    sockets.pull(sockets.channels)
    assert ledger.next_timer() is not None
    sockets.close()


def test_a_leader_hears_of_what_a_handlers_struck_wait_has_taken_from_it():
    """It sleeps on the sockets, the bytes are off them, and the keeper looks every 0.4 s only."""
    ours, theirs = socket.socketpair()
    pump = RealPump([ours], Spin(0.0, learns=False))
    outer, inner = Waiter(), Waiter()
    pump.lead.take(outer)
    pump.lead.take(inner)  # in a handler, and on the same thread
    inner.gone = True
    assert not pump._ready.poll(0)
    pump.mend()
    assert pump.lead.current() is outer and pump.lead.stranded
    assert pump._ready.poll(0)
    pump.close()
    theirs.close()
