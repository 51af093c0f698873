"""Calls over several channels at once, with pieces cut and strikes between any two system calls."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from striking import Striker, Struck

from rankwise import _ledger, _sockets
from rankwise._calls import Call
from rankwise._ledger import Ledger
from rankwise._messages import ACK, FAILED, HEADER, MAGIC, OK
from rankwise._sockets import Sockets
from rankwise._spin import Spin
from rankwise.wire import channel, joint
from rankwise.wire.worker_channel import WorkerChannel


class Weather:
    """Instead of `send` and `recv` for many: small pieces, full sockets and strikes, each before
    the system call has done anything, as a handler runs after the one that moved the bytes."""

    def __init__(self, seed: int, small: int) -> None:
        self._random = random.Random(seed)
        self._small = small
        self.strikes = 0

    def _strike(self) -> None:
        chance = self._random.random()
        if chance < 0.2:
            self.strikes += 1
            raise Struck
        if chance < 0.3:
            raise BlockingIOError

    def send(self, sock: socket.socket, data: bytes, flags: int) -> int:
        self._strike()
        return sock.send(data[: self._random.randint(1, self._small)] if self._small else data)

    def recv(self, sock: socket.socket, size: int) -> bytes:
        self._strike()
        return sock.recv(self._random.randint(1, self._small) if self._small else size)


def answer(sock: socket.socket, rank: int) -> None:
    worker = WorkerChannel(sock, Spin(0.0, learns=False))
    while (received := worker.receive()) is not None:
        _, _, call_id, body = received
        worker.reply(OK, call_id, bytes(body)[::-1] + b"." * rank)


def until_done(step: Callable[[], object], mend: Callable[[], object]) -> None:
    """`step`; where it is struck `mend`, until that was not struck."""
    try:
        step()
    except Struck:
        while True:
            try:
                mend()
            except Struck:
                continue
            return


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sets(st.integers(0, 2), min_size=1), st.sampled_from((0, 30, 9000))),
             min_size=1, max_size=12),
    st.integers(0, 10**6),
    st.sampled_from((0, 20, 5000)),
)  # fmt: skip
def test_each_call_is_answered_once_by_each_of_its_ranks(calls, seed, small):
    weather = Weather(seed, small)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint, "SEND", weather.send)
        patched.setattr(joint, "RECEIVE", weather.recv)
        pairs = [socket.socketpair() for _ in range(3)]
        threads = [
            threading.Thread(target=answer, args=(far, rank)) for rank, (_, far) in enumerate(pairs)
        ]
        for (_, far), thread in zip(pairs, threads, strict=True):
            thread.start()
            stack.callback(far.close)
            stack.callback(thread.join, 20)
        ledger = Ledger(3)
        lock = threading.RLock()
        sockets = Sockets([near for near, _ in pairs], ledger, lock, lambda: None)
        stack.callback(sockets.close)

        def mend() -> None:
            with lock:
                sockets.flush_all()

        def submit(call: Call) -> None:
            with lock:
                if ledger.begin(call):
                    sockets.send(call)
                else:
                    ledger.place((call,))
                    mend()

        made = []
        for number, (ranks, size) in enumerate(calls):
            # In dozens of pieces at most: more of them take a minute, and show nothing more.
            body = random.Random(number).randbytes(min(size, 20 * small or size))
            made.append(Call("m", body, tuple(sorted(ranks))))
            until_done(lambda: submit(made[-1]), mend)
            until_done(lambda: sockets.pull(sockets.channels), sockets.pull_stranded)
        while not all(call.ended for call in made):
            assert all(thread.is_alive() for thread in threads)
            assert ledger.broken is None
            sockets.ready.poll(0.01)  # as a leader does: whoever spins here takes the answers' turn
            until_done(mend, mend)
            until_done(lambda: sockets.pull(sockets.channels), sockets.pull_stranded)
        for call in made:
            back = call.body[::-1]
            assert call.answers == {rank: (OK, back + b"." * rank) for rank in call.ranks}
        assert ledger.late == 0
        assert not any(ledger.inflight)


@pytest.fixture
def three():
    """The driver's ends of three channels, and the other ends."""
    pairs = [socket.socketpair() for _ in range(3)]
    ledger = Ledger(3)
    sockets = Sockets([near for near, _ in pairs], ledger, threading.RLock(), lambda: None)
    yield sockets, ledger, [far for _, far in pairs]
    sockets.close()
    for _, far in pairs:
        far.close()


def frames_at(sock: socket.socket) -> list[int]:
    """The call ids of the frames that have come there."""
    sock.setblocking(False)
    try:
        data = sock.recv(65536)
    except BlockingIOError:
        return []
    found = []
    while data:
        *_, call_id, length = HEADER.unpack_from(data)
        found.append(call_id)
        data = data[HEADER.size + length :]
    return found


def test_who_sends_to_other_ranks_first_notes_what_one_who_was_struck_has_sent(three, monkeypatch):
    sockets, ledger, far = three
    first, second = Call("m", b"first", (0,)), Call("m", b"second", (1,))

    def struck(joint):
        raise Struck

    with monkeypatch.context() as patched:
        patched.setattr(joint.Joint, "settle", struck)
        assert ledger.begin(first)
        with pytest.raises(Struck):
            sockets.send(first)
    ledger.mend()  # by whoever comes next, who may have nothing to do with rank 0
    assert ledger.begin(second)
    sockets.send(second)
    sockets.flush_all()
    assert [frames_at(sock) for sock in far] == [[first.id], [second.id], []]


def test_what_a_handlers_own_wait_has_left_behind_is_dealt_with(three):
    """It was struck, and the handler swallowed that: the interrupted leader goes on."""
    sockets, ledger, far = three
    calls = [Call("m", b"", (0, 1)), Call("m", b"", (0, 1))]
    for number, call in enumerate(calls):
        assert ledger.begin(call)
        sockets.send(call)
        for sock in far[:2]:
            sock.send(HEADER.pack(MAGIC, OK, 0, number, call.id, 1) + b"x")
    one, other, _ = sockets.channels
    came = sockets._joint.came
    data = one.recv(25)
    assert ledger.reply(0, calls[0].id, OK, data[24:], 0.0) is False
    one.receive_sequence += 1
    came.append(None)  # fed, and struck before it was let go of
    came.append((other, other.recv(25)))  # received, and struck before it was fed
    sockets.pull([one, other])
    assert all(call.done for call in calls)
    assert not came
    assert ledger.broken is None


@pytest.mark.parametrize("after", ["forget", "tell"])
def test_a_rank_that_hung_up_is_told_of_however_its_leader_was_struck(three, monkeypatch, after):
    sockets, ledger, far = three
    far[0].close()
    strikes = [1]
    owner, name = (Ledger, "hangup") if after == "tell" else (type(sockets.channels[0]), "forget")
    real = getattr(owner, name)

    def struck(*args):
        value = real(*args)
        if strikes:
            strikes.pop()
            raise Struck
        return value

    monkeypatch.setattr(owner, name, struck)
    with pytest.raises(Struck):
        sockets.pull(sockets.channels)
    if 0 not in ledger.hung:
        assert sockets.ready.poll(0), "nobody would ever hear of it"
    sockets.pull(sockets.channels)
    assert ledger.hung == {0}
    assert sockets.ready.poll(0) == []


SCRIPTS = {
    "plain": [(OK, b"a"), (OK, b"bb"), (OK, b"")],
    "plain, one an acknowledgement": [(OK, b"a"), (ACK, b""), (OK, b"c")],
    "one that fails": [(OK, b"a"), (FAILED, b"no"), (OK, b"c")],
}


def run_of_a_call(point: int, answers: list[tuple[int, bytes]], cut: int) -> Striker:
    """A call to three ranks, all of which have answered; who takes that is struck at `point`.

    cut: of so many ranks the last byte comes later. Returns the striker, with what was not passed.
    """
    pairs = [socket.socketpair() for _ in answers]
    ledger = Ledger(len(answers))
    lock = threading.RLock()
    sockets = Sockets([near for near, _ in pairs], ledger, lock, lambda: None)
    striker = Striker(point, _sockets, _ledger, joint, channel)
    try:
        for number in range(2):
            call = Call("m", b"", tuple(range(len(answers))), on_error="continue")
            assert ledger.begin(call)
            sockets.send(call)
            frames = [
                HEADER.pack(MAGIC, kind, 0, number, call.id, len(body)) + body
                for kind, body in answers
            ]
            for rank, (_, far) in enumerate(pairs):
                far.send(frames[rank][: -1 if rank < cut else None])
            try:
                striker.run(sockets.pull, sockets.channels)
            except Struck:
                sockets.pull_stranded()
            for rank in range(cut):
                pairs[rank][1].send(frames[rank][-1:])
            sockets.pull(sockets.channels)
            assert call.answers == dict(enumerate(answers)), f"struck at {point}"
            assert call.done and call.ended, f"struck at {point}"
        assert ledger.broken is None, f"struck at {point}"
        assert not any(ledger.inflight)
        assert not sockets._joint.came
        assert [one.receive_sequence for one in sockets.channels] == [2] * len(answers)
    finally:
        sockets.close()
        for _, far in pairs:
            far.close()
    return striker


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("kinds", SCRIPTS)
def test_struck_at_any_point_of_taking_answers_none_is_lost_or_taken_twice(kinds, cut):
    run_of_a_call(1 << 30, SCRIPTS[kinds], cut)  # 3.13 traces a function from its second call on
    for point in range(1, 10_000):
        if run_of_a_call(point, SCRIPTS[kinds], cut).countdown > 0:
            assert point > 10, "it was never struck"
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("sequence", "magic"), [(5, MAGIC), (0, MAGIC), (1, 0xBAD)])
def test_frames_that_are_wrong_on_all_channels_break_the_group(three, sequence, magic):
    """One that is not due, one that has come before, one that is none."""
    sockets, ledger, far = three
    for number, head in enumerate(((MAGIC, OK, 0, 0), (magic, OK, 0, sequence))):
        call = Call("m", b"", (0, 1, 2))
        assert ledger.begin(call)
        sockets.send(call)
        for sock in far:
            sock.send(HEADER.pack(*head, call.id, 1) + b"x")
        sockets.pull(sockets.channels)
        assert call.done
        assert (ledger.broken is not None) is (number == 1)
    assert not call.answers
