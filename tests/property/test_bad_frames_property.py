"""Garbage, and frames that are cut, repeated, left out or out of turn: at every end that reads any.

Never a crash, never a hang, never another call's answer; and the error says whose and what.
"""

from __future__ import annotations

import resource
import socket
import struct
from _pickle import dumps
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankwise import _serve
from rankwise._calls import Broken, Call, Garbled
from rankwise._messages import (
    ACK,
    BOOT,
    CALL,
    EXIT,
    FAILED,
    HAS_DEADLINE,
    HEADER,
    MAGIC,
    OK,
    OK_LENT,
    WANT_VALUE,
    Gone,
    Output,
    Shown,
)
from rankwise._outcome import Failed, encode_failure, failed_at, failure
from rankwise._pump import Pump
from rankwise._rankinfo import RankInfo
from rankwise._spin import Spin
from rankwise._status import DONE, RUNNING, WORDS
from rankwise.wire import codec
from rankwise.wire.arena import REGION, make_room, open_arena
from rankwise.wire.control import ControlChannel
from rankwise.wire.frames import HEADER_SIZE, BadFrame
from rankwise.wire.lending import HEAD, SLOTS, SPAN
from rankwise.wire.worker_channel import WorkerChannel

quick = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
NO_SPIN = Spin(0.0, learns=False)


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    """What garbage asks for must be refused, not taken: a pickle's opcodes may name any size."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def frame(kind: int, sequence: int, call_id: int, body: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(MAGIC, kind, flags, sequence, call_id, len(body)) + body


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    try:
        yield one, other
    finally:
        one.close()
        other.close()


# -- a group whose one rank is the other end of a socketpair --------------------------------------


class Driver:
    """The driver's half of a group of one rank, which has `calls` open; and the rank's own end."""

    def __init__(self, calls: int) -> None:
        near, self.far = socket.socketpair()
        self.pump = Pump([near], NO_SPIN)
        self.calls = [Call("m", b"x", (0,)) for _ in range(calls)]
        for call in self.calls:
            call.future = call
            assert self.pump.submit((call,)) is None
        self.hear()

    def hear(self) -> None:
        """Have a leader deal with all there is."""
        while self.pump.sockets.ready.poll(0):
            assert self.pump.lead_once()

    def feed(self, data: bytes, cut: int = 1 << 16) -> None:
        for at in range(0, len(data), cut):
            try:
                self.far.sendall(data[at : at + cut])
            except BrokenPipeError:
                pass
            self.hear()

    @property
    def broken(self) -> Garbled | None:
        cause = self.pump.ledger.broken
        assert cause is None or isinstance(cause, Garbled)
        return cause

    def close(self) -> None:
        self.far.close()
        self.pump.close()


def body_of(call_id: int) -> bytes:
    return b"answer to %d" % call_id


def check_group(driver: Driver, whole: bool) -> None:
    """Nobody got what is another's; what is broken says so of rank 0, and leaves no call open."""
    for call in driver.calls:
        if call.answers:
            assert call.answers == {0: (OK, body_of(call.id))}
    if driver.broken is not None:
        assert driver.broken.rank == 0
        assert driver.broken.reason
        assert all(call.done for call in driver.calls)
        for call in driver.calls:
            assert call.answers or isinstance(call.error, Broken)
    elif whole:
        assert all(call.answers for call in driver.calls)


answers = st.integers(1, 6)
cuts = st.sampled_from((1, 5, 24, 25, 1 << 16))


@quick
@given(answers, st.data(), cuts)
def test_frames_repeated_left_out_or_swapped_break_the_group(count, data, cut):
    frames = [frame(OK, n, n + 1, body_of(n + 1)) for n in range(count)]
    what = data.draw(st.sampled_from(("repeat", "leave out", "swap")))
    at = data.draw(st.integers(0, count - 1))
    if what == "repeat":
        frames.insert(data.draw(st.integers(at + 1, count)), frames[at])
    elif what == "leave out":
        del frames[at]
        assume(at < count - 1)  # the last one leaves no gap: the lookout's business
    else:
        assume(at < count - 1)
        frames[at], frames[at + 1] = frames[at + 1], frames[at]
    driver = Driver(count)
    try:
        driver.feed(b"".join(frames), cut)
        check_group(driver, whole=False)
        assert driver.broken is not None
        assert "due" in driver.broken.reason
    finally:
        driver.close()


@quick
@given(answers, st.data(), cuts)
def test_garbage_between_frames_breaks_the_group_or_is_waited_for(count, data, cut):
    frames = [frame(OK, n, n + 1, body_of(n + 1)) for n in range(count)]
    at = data.draw(st.integers(0, count))
    garbage = data.draw(st.binary(min_size=1, max_size=80))
    stream = b"".join((*frames[:at], garbage, *frames[at:]))
    driver = Driver(count)
    try:
        driver.feed(stream, cut)
        check_group(driver, whole=at == count)
        assert [bool(call.answers) for call in driver.calls[:at]] == [True] * at
        if len(stream) - sum(map(len, frames[:at])) >= HEADER_SIZE:
            assert driver.broken is not None
    finally:
        driver.close()


@quick
@given(answers, st.integers(0, 10**6), cuts)
def test_answers_cut_short_by_the_end_break_the_group_within_a_second(count, keep, cut):
    stream = b"".join(frame(OK, n, n + 1, body_of(n + 1)) for n in range(count))
    driver = Driver(count)
    try:
        driver.feed(stream[: keep % len(stream)], cut)
        driver.far.close()
        driver.hear()
        assert driver.broken is None  # end of file is a hint: the launcher has a second to say more
        due = driver.pump.ledger.next_timer()
        assert due is not None
        driver.pump.ledger.expire(due)
        check_group(driver, whole=False)
        assert driver.broken is not None and "closed its channel" in driver.broken.reason
    finally:
        driver.close()


@quick
@given(answers, st.data(), cuts)
def test_any_field_of_a_header_changed_is_told_or_harmless(count, data, cut):
    """But for the call's number, among those that are open: only the kernel lies between."""
    at = data.draw(st.integers(0, count - 1))
    fields = [MAGIC, OK, 0, at, at + 1, len(body_of(at + 1))]
    field = data.draw(st.integers(0, 5))
    most = (0xFFFF, 0xFF, 0xFF, 0xFFFFFFFF, 2**64 - 1, 2**64 - 1)[field]
    value = data.draw(st.integers(0, most) | st.integers(0, min(most, 100)))
    assume(value != fields[field])
    # What is a right answer of another kind is not this test's.
    assume(not (field == 1 and value in (FAILED, ACK)))
    assume(not (field == 4 and value <= count))
    fields[field] = value
    changed = HEADER.pack(*fields) + body_of(at + 1)
    frames = [frame(OK, n, n + 1, body_of(n + 1)) for n in range(count)]
    driver = Driver(count)
    try:
        driver.feed(b"".join((*frames[:at], changed, *frames[at + 1 :])), cut)
        if field == 2:  # flags of answers: there are none
            assert driver.broken is None
        elif field == 5:  # another length: the next header is none, or the frame is not complete
            short = value < len(body_of(at + 1))
            for call in driver.calls[:at]:
                assert call.answers
            assert driver.broken is not None or at == count - 1 or not short
        else:
            check_group(driver, whole=False)
            assert driver.broken is not None
    finally:
        driver.close()


@quick
@given(st.sampled_from((0, 4, 99, 2**40)))
def test_an_answer_to_a_call_that_was_never_sent_breaks_the_group(call_id):
    driver = Driver(3)
    try:
        driver.feed(frame(OK, 0, call_id, b""))
        if call_id:
            assert driver.broken is not None
            assert f"has answered call {call_id}, which it was not sent" in driver.broken.reason
    finally:
        driver.close()


# -- bodies ---------------------------------------------------------------------------------------

bodies = st.binary(max_size=120) | st.builds(
    lambda size, tail: struct.pack("<B", 1) + size + tail,
    st.binary(min_size=0, max_size=HEAD.size + 32),
    st.binary(max_size=40),
)
numbers = st.sampled_from((0, 1, 63, 4096, 1 << 20, REGION, 3 * REGION, 1 << 60)) | st.integers(
    0, 1 << 62
)


@st.composite
def places(draw) -> bytes:
    """Bodies that say where their payload lies: anywhere."""
    count = draw(st.integers(0, 3))
    small = st.sampled_from((0, 1, 100, 70_000, 300_000)) | numbers
    head = HEAD.pack(
        1, draw(st.sampled_from((0, 5, SLOTS, 1 << 31))), draw(st.integers(0, 4)), 0,
        draw(numbers), draw(numbers), draw(small), draw(small),
    )  # fmt: skip
    spans = b"".join(SPAN.pack(draw(numbers), draw(small)) for _ in range(count))
    return head + spans + dumps(("m", (), {}), 5)


@contextmanager
def arenas():
    import os

    fd = os.memfd_create("rankwise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    assert make_room(fd, 1)
    driver, rank = open_arena(os.dup(fd), 1), open_arena(os.dup(fd), 1, 0)
    try:
        yield driver, rank
    finally:
        driver.close()
        rank.close()
        os.close(fd)


@quick
@given(bodies | places())
def test_a_body_that_is_none_is_an_exception(body):
    with arenas() as (_, rank):
        for arena in (None, rank):
            try:
                codec.loads(body, arena)
            except Exception:  # of any type: it fails that call
                pass


@quick
@given(bodies | places())
def test_a_result_that_lies_nowhere_breaks_the_group_and_says_so(body):
    driver = Driver(1)
    with arenas() as (arena, _):
        driver.pump.sockets.arena = arena
        try:
            driver.feed(frame(OK_LENT, 0, 1, body))
            if driver.broken is not None:
                assert driver.broken.rank == 0
                assert "the result of call 1 lies nowhere" in driver.broken.reason
                assert isinstance(driver.calls[0].error, Broken)
            else:
                try:
                    codec.loads(driver.calls[0].answers[0][1], arena)
                except Exception:
                    pass
        finally:
            driver.close()


def test_a_payload_behind_the_files_end_is_an_error_and_no_sigbus():
    with arenas() as (_, rank):
        for offset, size in ((3 * REGION - 10, 1 << 20), (3 * REGION, 1), (1 << 62, 300_000)):
            body = HEAD.pack(1, 0, 0, 0, 1, offset, size, size)
            with pytest.raises(ValueError, match="no room"):
                codec.loads(body, rank)
            spans = HEAD.pack(1, 0, 1, 0, 1, REGION, 64, 0) + SPAN.pack(offset, size)
            with pytest.raises(ValueError, match="no room"):
                codec.loads(spans + dumps(1, 5), rank)


@quick
@given(bodies, st.integers(0, 400))
def test_a_failure_that_cannot_be_read_is_still_a_failure_of_that_rank(body, keep):
    real = encode_failure(Failed(ValueError("x")))
    for data in (body, real[: keep % len(real)], dumps(("a",) * 6, 5), dumps((1.0, 2), 5)):
        assert isinstance(failed_at(data), float)
        error = failure(data, 3, 41, "forward")
        assert "rank 3 (pid 41) in forward" in str(error)
        assert "cannot be read" in str(error)


@quick
@given(st.data())
def test_a_message_with_some_bytes_changed_is_another_message_or_an_exception(data):
    body = codec.encode_call("method", ([1, "two", b"three"], {"x": 1.5}), {"key": None})
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.loads(bytes(changed))
    except Exception:
        pass


# -- a worker -------------------------------------------------------------------------------------


class Target:
    def m(self, value: object = None) -> object:
        return value


def boot() -> bytes:
    info = RankInfo(0, 1, 0, 1, 0, 1, "g", None, "127.0.0.1", 1)
    blob = codec.encode_call(Target, (), {})
    return dumps((tuple(info), {}, blob), 5)


@st.composite
def to_a_worker(draw) -> bytes:
    """The frames of a few calls, and what may have become of them."""
    count = draw(st.integers(0, 3))
    body = codec.encode_call("m", (1,), {})
    flags = draw(st.sampled_from((0, WANT_VALUE, HAS_DEADLINE, 255)))
    frames = [frame(BOOT, 0, 1, boot())]
    frames += [frame(CALL, n + 1, n + 2, body, flags) for n in range(count)]
    frames.append(frame(draw(st.integers(0, 255)), count + 1, count + 2, draw(bodies)))
    match draw(st.sampled_from(("leave", "garbage", "repeat", "swap", "cut", "body"))):
        case "garbage":
            frames.insert(draw(st.integers(0, len(frames))), draw(st.binary(max_size=60)))
        case "repeat":
            frames.insert(draw(st.integers(0, len(frames))), draw(st.sampled_from(frames)))
        case "swap":
            frames = draw(st.permutations(frames))
        case "body":
            frames[0] = frame(BOOT, 0, 1, draw(st.binary(max_size=60)))
    stream = b"".join(frames)
    return stream[: draw(st.integers(0, len(stream)))] if draw(st.booleans()) else stream


@quick
@given(to_a_worker())
def test_a_worker_runs_answers_or_says_what_is_wrong(stream):
    """`serve` returns (end of file, Exit), or raises BadFrame; each answer is whole and in turn."""
    with pair() as (near, far):
        channel = WorkerChannel(near, NO_SPIN)
        words = memoryview(bytearray(WORDS * 8)).cast("Q")
        far.sendall(stream)
        far.shutdown(socket.SHUT_WR)
        try:
            _serve.serve(channel, words, lambda place, settings: None)
        except BadFrame as error:
            assert str(error)
        near.close()
        heard = b""
        while data := far.recv(1 << 16):
            heard += data
    sequence = 0
    while heard:
        magic, kind, _, number, call_id, length = HEADER.unpack_from(heard)
        assert (magic, number) == (MAGIC, sequence)
        assert kind in (OK, ACK, FAILED)
        assert call_id <= 2**64
        heard = heard[HEADER_SIZE + length :]
        sequence += 1
    assert not words[RUNNING]
    assert words[DONE] <= 2**64


@pytest.mark.parametrize("kind", [BOOT, 0, 77, OK])
def test_a_frame_of_another_kind_is_not_run_as_a_call(kind):
    with pair() as (near, far):
        far.sendall(frame(BOOT, 0, 1, boot()) + frame(kind, 1, 2, codec.encode_call("m", (), {})))
        words = memoryview(bytearray(WORDS * 8)).cast("Q")
        with pytest.raises(BadFrame, match=f"^a frame of kind {kind} where a call was due$"):
            _serve.serve(WorkerChannel(near, NO_SPIN), words, lambda place, settings: None)


@pytest.mark.parametrize("body", [b"", b"garbage", dumps(1, 5), dumps((1, 2, 3), 5)])
def test_a_first_call_that_cannot_be_read_is_a_bad_frame(body):
    with pair() as (near, far):
        far.sendall(frame(BOOT, 0, 1, body))
        words = memoryview(bytearray(WORDS * 8)).cast("Q")
        with pytest.raises(BadFrame, match="a first call that is none"):
            _serve.serve(WorkerChannel(near, NO_SPIN), words, lambda place, settings: None)


def test_an_exit_before_the_first_call_is_an_orderly_end():
    with pair() as (near, far):
        far.sendall(frame(EXIT, 0, 1))
        words = memoryview(bytearray(WORDS * 8)).cast("Q")
        _serve.serve(WorkerChannel(near, NO_SPIN), words, lambda place, settings: None)


# -- the control channel --------------------------------------------------------------------------


def message(what: object) -> bytes:
    body = dumps(what, 5)
    return struct.pack("<Q", len(body)) + body


@quick
@given(st.integers(0, 4), st.data(), cuts)
def test_a_control_channel_gives_what_was_whole_and_then_says_what_is_wrong(good, data, cut):
    before = b"".join(message(Shown(n)) for n in range(good))
    garbage = data.draw(
        st.binary(min_size=1, max_size=60)
        | st.binary(max_size=60).map(lambda body: struct.pack("<Q", len(body)) + body)
        | st.sampled_from([message({"status": "ok"}), message(Output), message([Gone()])])
    )
    stream = before + garbage + message(Shown(99))
    with pair() as (near, far):
        channel = ControlChannel(near)
        heard: list[object] = []
        error: Exception | None = None
        for at in range(0, len(stream), cut):
            far.sendall(stream[at : at + cut])
            try:
                heard += channel.receive()
            except ValueError as reason:
                error = reason
        far.close()
        while error is None:
            try:
                heard += channel.receive()
            except (EOFError, ValueError) as reason:
                error = reason
        assert [one.nbytes for one in heard[:good]] == list(range(good))
        assert isinstance(error, EOFError) or "bad frame on the control channel" in str(error)
        with pytest.raises(type(error)):
            channel.receive()


@quick
@given(st.data(), cuts)
def test_a_control_message_with_some_bytes_changed_never_raises_what_nobody_expects(data, cut):
    stream = bytearray(message(Output(1, b"line\n")) + message(Shown(3)))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with pair() as (near, far):
        channel = ControlChannel(near)
        for at in range(0, len(stream), cut):
            far.sendall(bytes(stream[at : at + cut]))
            try:
                channel.receive()
            except ValueError as error:
                assert "bad frame on the control channel" in str(error)
        far.close()
        with pytest.raises((EOFError, ValueError)):
            while True:
                channel.receive()
