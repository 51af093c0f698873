"""The callback thread's own rules. What it runs, and when, is in process/test_futures.py."""

from __future__ import annotations

import threading
import time

import pytest

from rankwise._callbacks import Callbacks


@pytest.fixture
def callbacks():
    made = Callbacks("unit")
    yield made
    made.close(5)


def test_jobs_run_in_their_order_on_one_thread(callbacks):
    ran = []
    for number in range(100):
        callbacks.defer(lambda number=number: ran.append((number, threading.get_ident())))
    callbacks.close(5)
    assert [number for number, _ in ran] == list(range(100))
    assert {ident for _, ident in ran} != {threading.get_ident()}
    assert len({ident for _, ident in ran}) == 1


def test_a_job_is_deferred_without_waiting_for_who_starts_the_thread(callbacks):
    """He may have been interrupted at it, by a handler that waits for whoever defers: here."""
    ran = threading.Event()
    with callbacks._lock:
        keeper = threading.Thread(target=callbacks.defer, args=(ran.set,))
        keeper.start()
        keeper.join(20)
        assert not keeper.is_alive()
    assert not ran.is_set()
    callbacks.ensure()
    assert ran.wait(20)


def test_a_close_waits_for_a_users_job_no_longer_than_it_was_told(callbacks):
    begun, go = threading.Event(), threading.Event()
    callbacks.defer(lambda: (begun.set(), go.wait(60)))
    assert begun.wait(20)
    began = time.monotonic()
    callbacks.close(0.05)
    assert time.monotonic() - began < 20
    assert not go.is_set()
    go.set()
