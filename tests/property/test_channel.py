"""Both ends of a call channel over a real socketpair, with bytes cut, damaged, lost and struck."""

from __future__ import annotations

import itertools
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise._calls import Call
from rankwise._messages import ACK, CALL, FAILED, HEADER, MAGIC, OK
from rankwise._spin import Spin
from rankwise.wire.channel import DriverChannel
from rankwise.wire.frames import HEADER_SIZE, BadFrame
from rankwise.wire.worker_channel import WorkerChannel

kinds = st.sampled_from((OK, FAILED, ACK))
# Around the sizes at which something changes: joined frames, one receive, a socket's buffer.
sizes = st.sampled_from((0, 1, 23, 24, 25, 1000, 64 << 10, (64 << 10) - 1, 300_000)) | st.integers(
    0, 3000
)


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    try:
        yield one, other
    finally:
        one.close()
        other.close()


def body_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def frame(kind: int, sequence: int, call_id: int, body: bytes) -> bytes:
    return HEADER.pack(MAGIC, kind, 0, sequence, call_id, len(body)) + body


def feed(sock: socket.socket, data: bytes, cuts: list[int]) -> Iterator[None]:
    """Send `data` in the pieces between `cuts`, one a step; no piece overfills the socket."""
    inside = [cut for cut in cuts if cut < len(data)]
    edges = sorted({0, len(data), *range(0, len(data), 50_000), *inside})
    for start, end in itertools.pairwise(edges):
        sock.sendall(data[start:end])
        yield


def take_all(channel: DriverChannel) -> list[tuple[int, int, bytes, int]]:
    """What the owner of a channel does when it is readable."""
    taken = []
    while True:
        more = channel.receive()
        found, data, used = channel.frames()
        again, data, used = channel.frames()
        assert again == found, "looking takes nothing"
        channel.receive_sequence += len(found)  # as the pump notes what it has fed
        channel.consume(data, used)
        taken += found
        if not more:
            return taken


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(kinds, sizes), max_size=6), st.lists(st.integers(0, 400_000), max_size=8))
def test_answers_arrive_whole_wherever_they_are_cut(answers, cuts):
    sent = [
        (kind, number, body_of(number, size), number) for number, (kind, size) in enumerate(answers)
    ]
    data = b"".join(frame(kind, number, call, body) for kind, call, body, number in sent)
    with pair() as (near, far):
        channel = DriverChannel(near)
        got = []
        for _ in feed(far, data, cuts):
            got += take_all(channel)
        assert got == sent
        assert not channel.eof
        far.close()
        assert take_all(channel) == []
        assert channel.eof


@settings(deadline=None, max_examples=60)
@given(st.lists(sizes, min_size=1, max_size=4), st.integers(0, 10**6))
def test_answers_cut_short_by_the_end_are_told_apart(lengths, keep):
    frames = [frame(OK, n, n, body_of(n, size)) for n, size in enumerate(lengths)]
    data = b"".join(frames)
    data = data[: keep % len(data)]
    whole = 0
    while sum(map(len, frames[: whole + 1])) <= len(data):
        whole += 1
    with pair() as (near, far):
        channel = DriverChannel(near)
        got = []
        for _ in feed(far, data, []):
            got += take_all(channel)
        far.close()
        got += take_all(channel)
        assert [call for _, call, _, _ in got] == list(range(whole))
        assert channel.eof


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=HEADER_SIZE, max_size=200), st.booleans())
def test_garbage_is_a_bad_frame_or_the_end(garbage, after_a_good_one):
    good = frame(OK, 0, 1, b"good") if after_a_good_one else b""
    with pair() as (near, far):
        channel = DriverChannel(near)
        far.sendall(good + garbage)
        far.close()
        try:
            got = take_all(channel)
        except BadFrame as error:
            assert "a header that is none of ours" in str(error)
            with pytest.raises(BadFrame):
                channel.frames()
        else:
            magic, *_, length = HEADER.unpack_from(garbage)
            assert magic == MAGIC
            assert channel.eof
            assert len(got) >= after_a_good_one
            assert length > len(garbage) - HEADER_SIZE or len(got) > after_a_good_one


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=HEADER_SIZE, max_size=200), st.integers(0, 2))
def test_garbage_to_a_worker_is_a_bad_frame_or_the_end(garbage, good):
    with pair() as (near, far):
        channel = WorkerChannel(near, Spin(0.0, learns=False))
        far.sendall(b"".join(frame(CALL, n, n + 1, b"x" * n) for n in range(good)) + garbage)
        far.close()
        for number in range(good):
            assert channel.receive() == (CALL, 0, number + 1, b"x" * number)
        try:
            while channel.receive() is not None:
                pass
        except (BadFrame, MemoryError):
            pass


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 3))
def test_a_wrong_sequence_is_a_bad_frame_to_a_worker(off, before):
    with pair() as (near, far):
        channel = WorkerChannel(near, Spin(0.0, learns=False))
        for number in range(before):
            far.sendall(frame(CALL, number, number + 1, b""))
        wrong = (before + off) & 0xFFFFFFFF
        far.sendall(frame(CALL, wrong, 99, b""))
        for _ in range(before):
            assert channel.receive() is not None
        with pytest.raises(BadFrame, match=f"^frame {wrong} came where {before} was due$"):
            channel.receive()


@settings(deadline=None, max_examples=40)
@given(st.lists(sizes, min_size=1, max_size=5), st.integers(0, 10**6))
def test_calls_cut_short_by_the_end_are_the_end_to_a_worker(lengths, keep):
    frames = [frame(CALL, n, n + 1, body_of(n, size)) for n, size in enumerate(lengths)]
    data = b"".join(frames)
    data = data[: keep % (len(data) + 1)]
    with pair() as (near, far):
        channel = WorkerChannel(near, Spin(0.0, learns=False))

        def send() -> None:
            far.sendall(data)
            far.close()

        sender = threading.Thread(target=send)
        sender.start()
        got = []
        while (received := channel.receive()) is not None:
            got.append(received)
        sender.join()
    for number, (kind, flags, call_id, body) in enumerate(got):
        assert (kind, flags, call_id) == (CALL, 0, number + 1)
        assert bytes(body) == body_of(number, lengths[number])
    left = data[sum(map(len, frames[: len(got)])) :]
    assert len(left) < len(frames[len(got)]) if len(got) < len(frames) else not left


# -- both ends together, struck -------------------------------------------------------------------


class Struck(Exception):
    """Out of a signal handler."""


class Weather:
    """Wraps `recv` and `send` of a driver's channel: small pieces, and strikes between calls.

    A handler runs after the C call that moves and stores the bytes, never inside it. So the strike
    comes at the next call into here, before that one has done anything.
    """

    def __init__(self, channel: DriverChannel, seed: int, small: int) -> None:
        self._random = random.Random(seed)
        self._small = small
        self._recv = channel.recv
        self._send = channel.send
        struck: Any = channel
        struck.recv = self.recv
        struck.send = self.send

    def strike(self) -> None:
        if self._random.random() < 0.3:
            raise Struck

    def recv(self, size: int) -> bytes:
        self.strike()
        return self._recv(self._random.randint(1, self._small) if self._small else size)

    def send(self, data: Any, flags: int = 0) -> int:
        self.strike()
        return self._send(data[: self._random.randint(1, self._small)] if self._small else data)


def until_not_struck(function: Any, *args: Any) -> Any:
    while True:
        try:
            return function(*args)
        except Struck:
            continue


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from((0, 10, 3000, 70_000, 300_000)), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.sampled_from((0, 30_000)),
)
def test_no_byte_is_lost_between_a_driver_that_is_struck_and_a_worker(lengths, seed, small):
    calls = []
    for number, size in enumerate(lengths):
        call = Call("m", body_of(number, size), (0,))
        call.id = number + 1
        calls.append(call)
    with pair() as (near, far):
        driver = DriverChannel(near)
        Weather(driver, seed, small)
        worker = WorkerChannel(far, Spin(0.0, learns=False))
        heard = []

        def work() -> None:
            while (received := worker.receive()) is not None:
                kind, flags, call_id, body = received
                heard.append((kind, flags, call_id, bytes(body)))
                worker.reply(OK, call_id, bytes(body)[::-1])

        thread = threading.Thread(target=work)
        thread.start()
        got: list[tuple[int, int, bytes, int]] = []
        waiting = list(calls)
        while len(got) < len(calls):
            if waiting and until_not_struck(driver.send_call, waiting[0], 0, b"", waiting[0].body):
                # Struck after its last byte: sending it again says True and sends nothing.
                assert until_not_struck(driver.send_call, waiting[0], 0, b"", waiting[0].body)
                waiting.pop(0)
            until_not_struck(driver.receive)
            found, data, used = driver.frames()
            driver.receive_sequence += len(found)
            driver.consume(data, used)
            got += found
            assert thread.is_alive()
        near.shutdown(socket.SHUT_WR)
        thread.join(20)
        assert not thread.is_alive()
    assert heard == [(CALL, 0, call.id, call.body) for call in calls]
    assert got == [(OK, call.id, call.body[::-1], n) for n, call in enumerate(calls)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from((0, 10, 3000, 70_000, 300_000)), min_size=1, max_size=6),
       st.data())  # fmt: skip
def test_frames_that_are_looked_at_and_not_consumed_come_again(lengths, data):
    sent = [(OK, n, body_of(n, size), n) for n, size in enumerate(lengths)]
    stream = b"".join(frame(kind, n, call, body) for kind, call, body, n in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    with pair() as (near, far):
        channel = DriverChannel(near)
        got: list[tuple[int, int, bytes, int]] = []
        for _ in feed(far, stream, cuts):
            channel.receive()
            found, joined, used = channel.frames()
            if data.draw(st.booleans()):
                continue  # struck before the commit
            channel.receive_sequence += len(found)
            channel.consume(joined, used)
            if data.draw(st.booleans()):
                channel.consume(joined, used)  # struck after it: done again, it does no harm
            got += found
        while True:
            more = channel.receive()
            found, joined, used = channel.frames()
            channel.receive_sequence += len(found)
            channel.consume(joined, used)
            got += found
            if not more:
                break
        assert got == sent


def test_a_worker_that_is_gone_is_a_connection_error_to_the_sender():
    with pair() as (near, far):
        channel = DriverChannel(near)
        far.close()
        call = Call("m", b"x", (0,))
        call.id = 1
        with pytest.raises(ConnectionError):
            channel.send_call(call, 0, b"", call.body)
        assert channel.receive() is False
        assert channel.eof


def test_a_driver_that_is_gone_is_silent_to_a_worker():
    with pair() as (near, far):
        channel = WorkerChannel(near, Spin(0.0, learns=False))
        far.close()
        channel.reply(OK, 1, b"x" * 1_000_000)
        assert channel.receive() is None


def test_a_driver_never_blocks_in_send_or_receive():
    with pair() as (near, _):
        channel = DriverChannel(near)
        call = Call("m", bytes(50_000_000), (0,))
        call.id = 1
        assert channel.send_call(call, 0, b"", call.body) is False
        assert channel.send_call(call, 0, b"", call.body) is False
        assert channel.receive() is False
        assert not channel.eof
        assert channel.frames() == ([], b"", 0)


def test_a_worker_answers_while_the_driver_does_not_read():
    with pair() as (near, far):
        channel = WorkerChannel(near, Spin(0.0, learns=False))
        body = body_of(1, 5_000_000)
        thread = threading.Thread(target=channel.reply, args=(OK, 1, body))
        thread.start()
        driver = DriverChannel(far)
        got = []
        while not got:
            got = take_all(driver)
        thread.join(20)
        assert not thread.is_alive()
        assert got == [(OK, 1, body, 0)]
