"""Deadlines, patience and grace of ranks that are threads, without waiting for any of them."""

from __future__ import annotations

import threading
import time

import pytest

from rankwise import CallTimeout, GroupBroken, WorkerGroup, current_call, worker_info
from rankwise.testing import ManualClock, Refused, delay, refuse

LONG = 3600.0  # seconds, none of which is waited


GATES: list[threading.Event] = []  # one process: the test reaches what its ranks wait at


class Worker:
    def __init__(self):
        self.gate = threading.Event()
        GATES.append(self.gate)

    def echo(self, value):
        return value

    def wait(self):
        self.gate.wait()
        return worker_info().rank

    def remaining(self):
        return current_call().remaining()

    def stick_unless_first(self):
        if worker_info().rank == 0:
            raise KeyError("first")
        self.gate.wait()


@pytest.fixture(autouse=True)
def _soon():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10


@pytest.fixture
def group(inline_group, manual_clock):
    """Two ranks. What waits in them is let go at the end, before they are ended."""
    yield inline_group(Worker, 2)
    let_go()
    GATES.clear()


def let_go():
    for gate in GATES:
        gate.set()


def test_a_deadline_passes_when_the_clock_is_advanced_and_not_before(group, manual_clock):
    future = group.options(timeout=LONG).submit("wait")
    manual_clock.advance(LONG - 0.001)
    assert not future.done()
    manual_clock.advance(0.001)
    assert future.done()  # at once: nobody is waited for
    with pytest.raises(CallTimeout) as caught:
        future.result(0)
    assert caught.value.missing == (0, 1)
    let_go()
    assert group.call("echo", 1) == [1, 1]  # a late answer is dropped, the group is usable


def test_a_waiter_is_woken_by_the_deadline(group, manual_clock):
    errors = []

    def wait():
        try:
            group.options(timeout=LONG).call("wait")
        except CallTimeout as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not any(one.state == "running" for one in group.health()):
        time.sleep(0.001)
    manual_clock.advance(LONG)
    thread.join(5)
    assert len(errors) == 1


def test_patience_goes_by_the_clock_too(group, manual_clock):
    future = group.submit("wait")
    waiting = threading.Event()
    heard = []

    def wait():
        waiting.set()
        try:
            future.result(LONG)
        except CallTimeout as error:
            heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    while thread.is_alive():
        manual_clock.advance(LONG)
        thread.join(0.01)
    assert "has waited its 3600 s" in str(heard[0])
    assert not future.done()
    let_go()
    assert future.result(5) == [0, 1]


def test_the_pause_after_a_failure_and_the_grace_go_by_the_clock(group, manual_clock):
    future = group.options(grace=LONG).submit("stick_unless_first")
    assert group[0].submit("echo", 1).result(5) == 1  # its failure has come, then
    assert not future.done()
    manual_clock.advance(0.05)
    assert future.done()
    with pytest.raises(KeyError, match="first"):
        future.result(0)
    manual_clock.advance(LONG - 1)
    assert group.healthy
    manual_clock.advance(1)
    assert not group.healthy
    with pytest.raises(GroupBroken, match="grace"):
        group.call("echo", 1)


def test_what_is_left_for_a_call_goes_by_the_clock(group, manual_clock):
    for _ in range(2):
        left = group[0].options(timeout=LONG).call("remaining")
        assert left == pytest.approx(LONG, abs=1e-9)  # what floats make of now + LONG - now
        manual_clock.advance(LONG)


def test_flush_has_its_limit_by_the_clock(group, manual_clock):
    group.submit("wait")
    failed = []

    def flush():
        try:
            group.flush(LONG)
        except CallTimeout as error:
            failed.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    while thread.is_alive():
        manual_clock.advance(LONG)
        thread.join(0.01)
    assert failed


def test_an_end_goes_by_the_real_clock(group):
    group.submit("wait")
    began = time.monotonic()
    group.close(timeout=0.2)
    assert time.monotonic() - began < 3


def test_a_planned_delay_goes_by_the_clock(inline_group, manual_clock):
    group = inline_group(Worker, 1, faults=[delay(0, LONG, call=1)])
    future = group.submit("echo", 5)
    while group.health()[0].state != "running":
        time.sleep(0.001)
    assert not future.done()
    until = time.monotonic() + 5
    while not future.done() and time.monotonic() < until:
        manual_clock.advance(LONG)  # it may not have begun to sleep
    assert future.result(0) == [5]


def test_a_group_that_is_made_outside_goes_by_the_real_clock():
    with ManualClock() as clock:
        pass
    with WorkerGroup(Worker, 1, backend="inline") as group:
        clock.advance(LONG)
        assert group.options(timeout=LONG).call("echo", 1) == [1]
        with pytest.raises(CallTimeout):
            group.submit(lambda worker: time.sleep(2)).result(0.01)


def test_faults_of_the_fixture_are_of_that_group_alone(inline_group):
    first = inline_group(Worker, 1, faults=[refuse(0, call=1)])
    second = inline_group(Worker, 1)
    with pytest.raises(Refused):
        first.call("echo", 1)
    assert second.call("echo", 1) == [1]


@pytest.mark.parametrize("seconds", [-1, "1", float("nan"), None])
def test_a_wrong_step_is_named(seconds):
    with pytest.raises((TypeError, ValueError), match="seconds"):
        ManualClock().advance(seconds)
