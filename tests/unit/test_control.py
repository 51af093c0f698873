"""The driver's and the launcher's ends of one socketpair, in one thread."""

from __future__ import annotations

import select
import socket
import struct
from _pickle import dumps
from collections.abc import Iterator

import pytest

from rankwise._line import Line
from rankwise._messages import Finish, Gone, Output, Shown
from rankwise.wire.control import LONGEST, ControlChannel


@pytest.fixture
def pair() -> Iterator[tuple[ControlChannel, ControlChannel]]:
    ours, theirs = (ControlChannel(sock) for sock in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, ControlChannel]]:
    sock, theirs = socket.socketpair()
    channel = ControlChannel(theirs)
    yield sock, channel
    channel.close()
    sock.close()


def frame(message: object) -> bytes:
    body = dumps(message, 5)
    return struct.pack("<Q", len(body)) + body


def shown(messages: list[object]) -> list[int]:
    assert all(isinstance(message, Shown) for message in messages)
    return [message.nbytes for message in messages if isinstance(message, Shown)]


def test_messages_arrive_in_the_order_of_sending(
    pair: tuple[ControlChannel, ControlChannel],
) -> None:
    ours, theirs = pair
    assert theirs.receive() == []
    for i in range(100):
        ours.send(Shown(i))
    assert theirs.receive() == []
    assert ours.backlog > 0
    assert ours.flush()
    assert ours.backlog == 0
    assert shown(theirs.receive()) == list(range(100))


def test_send_never_blocks_and_an_urgent_message_overtakes_what_is_queued(
    pair: tuple[ControlChannel, ControlChannel],
) -> None:
    ours, theirs = pair
    data = [bytes([i]) * 70_000 for i in range(40)]
    for block in data:
        ours.send(Output(1, block))
    assert not ours.flush()  # the socket is full, in the middle of a frame
    in_flight = 40 - ours.backlog // 70_000
    ours.send(Shown(1), urgent=True)
    ours.send(Shown(2), urgent=True)
    messages: list[object] = []
    while ours.backlog or len(messages) < 42:
        ours.flush()
        messages += theirs.receive()
    assert [m.data for m in messages if isinstance(m, Output)] == data
    first = next(i for i, m in enumerate(messages) if isinstance(m, Shown))
    assert first <= in_flight + 1
    assert shown(messages[first : first + 2]) == [1, 2]


def test_a_line_that_has_sent_all_waits_for_no_more_room(
    pair: tuple[ControlChannel, ControlChannel],
) -> None:
    ours, theirs = pair
    driver, end = socket.socketpair()
    with driver, end:
        poll = select.poll()
        line = Line(ours, driver.fileno(), poll)
        while not ours.backlog:
            line.say(Output(1, bytes(70_000)))
            line.flush()
        theirs.receive()
        assert poll.poll(0) == [(ours.fileno(), select.POLLOUT)]
        line.flush_all()
        theirs.receive()  # there is room again
        assert poll.poll(0) == []


def test_a_long_message_arrives_whole(pair: tuple[ControlChannel, ControlChannel]) -> None:
    ours, theirs = pair
    ours.send(Output(2, b"x" * (12 << 20)))
    messages: list[object] = []
    while not messages:
        ours.flush()
        messages = theirs.receive()
    (message,) = messages
    assert isinstance(message, Output)
    assert (message.stream, len(message.data)) == (2, 12 << 20)


def test_a_frame_may_arrive_byte_by_byte(raw: tuple[socket.socket, ControlChannel]) -> None:
    sock, channel = raw
    got: list[object] = []
    for byte in frame(Shown(7)) + frame(Finish()):
        sock.send(bytes([byte]))
        got += channel.receive()
    assert [type(message) for message in got] == [Shown, Finish]


def test_end_of_file_comes_after_everything_before_it(
    pair: tuple[ControlChannel, ControlChannel],
) -> None:
    ours, theirs = pair
    theirs.send(Shown(1))
    theirs.flush()  # unread when its end closes: the kernel then says ECONNRESET at the end
    ours.send(Gone())
    ours.flush()
    ours.close()
    assert [type(message) for message in theirs.receive()] == [Gone]
    for _ in range(2):
        with pytest.raises(EOFError):
            theirs.receive()


def test_half_a_frame_at_the_end_is_no_message(raw: tuple[socket.socket, ControlChannel]) -> None:
    sock, channel = raw
    sock.send(frame(Shown(1)) + frame(Shown(2))[:-1])
    sock.shutdown(socket.SHUT_WR)
    assert shown(channel.receive()) == [1]
    with pytest.raises(EOFError):
        channel.receive()


def test_a_broken_pipe_is_remembered_and_not_raised(
    pair: tuple[ControlChannel, ControlChannel],
) -> None:
    ours, theirs = pair
    theirs.close()
    ours.send(Shown(1))
    assert ours.flush()
    assert ours.broken
    ours.send(Shown(2))
    assert ours.backlog == 0
    with pytest.raises(EOFError):
        ours.receive()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (struct.pack("<Q", LONGEST + 1), f"length {LONGEST + 1}"),
        (struct.pack("<Q", 3) + b"???", "3 bytes"),
        (frame({"status": "ok"}), "it holds a dict"),
        (struct.pack("<Q", 0), "0 bytes: EOFError"),
    ],
    ids=["length", "pickle", "type", "empty"],
)
def test_a_bad_frame_is_named_and_ends_the_channel(
    raw: tuple[socket.socket, ControlChannel], bad: bytes, words: str
) -> None:
    sock, channel = raw
    sock.send(frame(Shown(1)) + bad + frame(Shown(2)))
    assert shown(channel.receive()) == [1]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad frame on the control channel") as caught:
            channel.receive()
        assert words in str(caught.value)
