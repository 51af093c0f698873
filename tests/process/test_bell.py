"""The bell and the news: hints for who polls. Early, late or missing, they change nothing."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from bell_ranks import Napper

from rankwise import CallTimeout, WorkerGroup
from rankwise._calls import Call
from rankwise._ledger import Ledger
from rankwise._messages import CALL, OK
from rankwise._sockets import Sockets
from rankwise._spin import Spin
from rankwise._status import BELL, LINE, News, StatusPage
from rankwise.wire.channel import DriverChannel
from rankwise.wire.worker_channel import WorkerChannel

LONG = Spin(0.2, learns=False)  # far longer than it takes the other thread to send


@pytest.fixture
def ends():
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def page():
    made = StatusPage(1)
    yield made
    made.close()


def call(number: int, body: bytes = b"body") -> Call:
    made = Call("m", body, (0,))
    made.id = number
    return made


def send_soon(driver: DriverChannel, number: int) -> threading.Thread:
    thread = threading.Timer(0.02, lambda: driver.send_call(call(number), 0, b"", b"body"))
    thread.start()
    return thread


@pytest.mark.parametrize("bell", ["rung", "rung too early", "never rung"])
def test_a_worker_hears_a_call_whatever_the_bell_says(ends, page, bell):
    words = page.words(0)
    driver = DriverChannel(ends[0], None if bell == "never rung" else words)
    worker = WorkerChannel(ends[1], LONG)
    worker.words = words
    if bell == "rung too early":
        words[BELL] = 1
    thread = send_soon(driver, 1)
    assert worker.receive() == (CALL, 0, 1, b"body")
    thread.join()
    worker.words = [0]


def test_a_worker_does_not_look_at_its_socket_before_the_bell(ends, page):
    driver = DriverChannel(ends[0], page.words(0))
    worker = WorkerChannel(ends[1], LONG)
    worker.words = page.words(0)
    looks = []
    recv = worker._recv

    def counted(size: int) -> bytes:
        looks.append(size)
        return recv(size)

    worker._recv = counted
    for number in range(1, 6):
        driver.send_call(call(number), 0, b"", b"body")
        assert worker.receive() == (CALL, 0, number, b"body")
    assert len(looks) == 5  # and none that found nothing
    worker.words = [0]


def test_a_frame_that_is_too_large_for_the_socket_rings_with_its_first_bytes(ends, page):
    driver = DriverChannel(ends[0], page.words(0))
    worker = WorkerChannel(ends[1], LONG)
    worker.words = page.words(0)
    large = call(1, bytes(4 << 20))
    assert not driver.send_call(large, 0, b"", large.body)
    assert page.get(0, BELL) == 1
    received: list[object] = []
    thread = threading.Thread(target=lambda: received.append(worker.receive()))
    thread.start()
    while not driver.send_call(large, 0, b"", large.body):
        pass
    thread.join()
    assert received == [(CALL, 0, 1, large.body)]
    worker.words = [0]


def test_a_rank_that_is_late_with_its_word_keeps_nobody_from_the_clock():
    """As where it waits for its interpreter's lock between the send and the store."""
    with WorkerGroup(Napper, 2, spin=0.5) as group:
        group.call(Napper.nap, 0.0)
        group._engine.pump.sockets._news.words[0] -= 1
        future = group[1].submit(Napper.nap, 3.0)
        began, cpu = time.monotonic(), time.process_time()
        with pytest.raises(CallTimeout):
            future.result(timeout=0.1)
        assert time.monotonic() - began < 2.5
        assert future.result() == 3.0
        assert time.process_time() - cpu < 2  # of the poll's half second; it slept after that


def test_a_driver_looks_at_the_ranks_that_say_they_have_answered():
    pairs = [socket.socketpair() for _ in range(3)]
    news = News(3)
    ledger = Ledger(3)
    sockets = Sockets(
        [near for near, _ in pairs], ledger, threading.RLock(), lambda: None, None, news
    )
    asked = Call("m", b"", (0, 1, 2))
    assert ledger.begin(asked)
    sockets.send(asked)
    assert sockets.told() == []
    worker = WorkerChannel(pairs[1][1], LONG)
    worker.news, worker.place = news.words, 1 * LINE
    assert worker.receive() is not None
    news.words[2 * LINE] = 1  # before its bytes
    worker.reply(OK, asked.id, b"value")
    assert sockets.told() == sockets.channels[1:]
    sockets.pull(sockets.channels[1:])
    assert asked.answers == {1: (OK, b"value")}
    assert sockets.told() == sockets.channels[2:]  # it is not forgotten
    sockets.pull(sockets.channels[2:])
    late = WorkerChannel(pairs[2][1], LONG)
    late.receive()
    late.reply(OK, asked.id, b"late")
    sockets.pull(sockets.told())
    assert asked.answers == {1: (OK, b"value"), 2: (OK, b"late")}
    assert sockets.told() == sockets.told() == []
    worker.news = [0]
    sockets.close()
    for near, far in pairs:
        near.close()
        far.close()
