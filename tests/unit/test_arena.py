"""An arena's two halves in one process: what is lent, what is read, what comes home."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest

from rankwise.wire import borrowing, codec, lending, mapping
from rankwise.wire.arena import Arena, make_room, open_arena
from rankwise.wire.blocks import CHUNK, PAGE

MIB = 1 << 20


class Pair:
    """The driver's arena, and those of two ranks."""

    def __init__(self) -> None:
        fd = os.memfd_create("rankwise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        assert make_room(fd, 2)
        ends = [open_arena(os.dup(fd), 2, rank) for rank in (None, 0, 1)]
        self.fd = fd
        self.driver, *self.ranks = (end for end in ends if end is not None)

    def lend(self, *values: object, to: tuple[int, ...] = (0, 1)) -> bytes:
        return codec.dumps(values, self.driver, to)

    def sent(self, body: bytes) -> bytes:
        """`body` as it arrives: what is on the wire keeps nothing of the sender's."""
        assert isinstance(body, lending.Lent)
        body.hold.pending.clear()
        return bytes(body)

    def load(self, body: bytes, rank: int = 0) -> tuple:
        return codec.loads(body, self.ranks[rank])

    def out(self) -> int:
        """How many messages are lent."""
        lender = self.driver._lender
        lender._collect(lender._memory, 0.0)
        return len(lender._blocks.loans)

    def close(self) -> None:
        for arena in (self.driver, *self.ranks):
            arena.close()
        os.close(self.fd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def full(value: int, size: int = MIB) -> np.ndarray:
    return np.full(size, value, np.uint8)


@pytest.mark.parametrize("size", [codec.LARGE, borrowing.WORTH_MAPPING, MIB, 3 * CHUNK + 5])
def test_a_block_is_not_used_again_while_anybody_holds_an_array_on_it(pair, size):
    body = pair.sent(pair.lend(full(7, size)))
    held = [pair.load(body, rank)[0][3:] for rank in (0, 1)]
    for number in range(20):
        other = pair.sent(pair.lend(full(number, size)))
        for rank in (0, 1):
            assert (pair.load(other, rank)[0] == number).all()
        assert all((array == 7).all() for array in held)
    held.pop()
    assert pair.out() == (1 if size >= borrowing.WORTH_MAPPING else 0)
    held.pop()
    assert pair.out() == 0


def test_memory_that_is_free_is_used_again_and_no_more_is_taken(pair):
    for number in range(50):
        body = pair.sent(pair.lend(full(number)))
        assert [(pair.load(body, rank)[0] == number).all() for rank in (0, 1)] == [True, True]
    assert os.fstat(pair.fd).st_blocks * 512 <= CHUNK + 4 * PAGE


def test_what_one_reader_writes_is_seen_by_nobody_else(pair):
    for number in range(5):
        body = pair.sent(pair.lend(full(number)))
        (mine,), (other,) = pair.load(body, 0), pair.load(body, 1)
        mine += 100
        assert (other == number).all()
        assert (pair.load(body, 0)[0] == number).all()


def test_a_body_that_is_dropped_unsent_is_home_at_once(pair):
    body = pair.lend(full(1))
    assert pair.out() == 1
    del body
    assert pair.out() == 0
    body = pair.lend(full(1))
    body.hold.pending.discard(0)  # sent to one of the two
    del body
    assert pair.out() == 1


def test_hundreds_of_open_loans_come_home_in_any_order(pair):
    held = {}
    for number in range(300):
        body = pair.sent(pair.lend(full(number % 250, 300_000), to=(number % 2,)))
        held[number] = pair.load(body, number % 2)[0]
    assert pair.out() == 300
    for number in range(0, 300, 3):
        del held[number]
    assert pair.out() == 200
    assert all((array == number % 250).all() for number, array in held.items())
    held.clear()
    del body
    assert pair.out() == 0


def test_where_no_slot_is_left_the_payload_stays_in_the_frame(pair, monkeypatch):
    monkeypatch.setattr(pair.driver._lender._blocks, "_slots", iter(()))
    body = pair.lend(full(1))
    assert type(body) is bytes
    assert (pair.load(body)[0] == 1).all()


def test_a_long_pickle_lies_in_the_arena_and_a_short_one_in_the_frame(pair):
    assert len(pair.lend(full(1))) < 400
    assert len(pair.lend("x" * MIB, b"y" * MIB)) == lending.HEAD.size
    values = ("x" * MIB, b"y" * MIB, full(3), list(range(50_000)))
    text, data, array, numbers = pair.load(pair.sent(pair.lend(*values)))
    assert (text, data, numbers) == (values[0], values[1], values[3])
    assert (array == 3).all()


@pytest.mark.parametrize(
    "value",
    [b"x" * MIB, "y" * MIB, [b"x" * MIB, 1], {"k": "y" * MIB}, (1, bytearray(MIB)), [0.5] * MIB],
)
def test_whatever_is_long_lies_in_the_arena(pair, value):
    body = codec.encode_call("method", (value,), {"k": value}, pair.driver, (0,))
    assert type(body) is lending.Lent
    assert codec.loads(pair.sent(body), pair.ranks[0]) == ("method", (value,), {"k": value})
    result = codec.encode_result(value, pair.ranks[0])
    assert type(result) is lending.Lent
    assert codec.loads(pair.sent(result), pair.driver) == value


def test_where_nothing_can_be_mapped_a_copy_is_made(pair, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "no more mappings")

    body = pair.sent(pair.lend(full(5)))
    pair.load(body)
    monkeypatch.setattr(mapping, "Mapping", refuse)
    (array,) = pair.load(body)
    array += 1
    assert (array == 6).all()


def test_where_there_is_no_room_for_a_copy_either_the_load_fails_and_the_block_is_home(
    pair, monkeypatch
):
    body = pair.sent(pair.lend(full(5), to=(0,)))

    def refuse(self, *place):
        raise MemoryError

    monkeypatch.setattr(borrowing.Borrower, "_map", refuse)
    with pytest.raises(MemoryError):
        pair.load(body)
    assert pair.out() == 0


def test_what_was_received_can_be_loaded_after_the_arena_has_closed(pair):
    body = codec.dumps((full(9),), pair.ranks[1])
    received = pair.driver.receive(pair.sent(body), 1, 0)
    assert pair.driver.receive(bytes(body), 1, 0) is received, "struck, and looked at again"
    pair.driver.dealt(1)
    pair.driver.close()
    pair.ranks[1].close()
    (array,) = codec.loads(received, pair.driver)
    del received
    assert (array == 9).all()


def test_an_array_that_is_held_at_a_fork_is_never_told_of(pair):
    body = pair.sent(pair.lend(full(1), to=(0,)))
    (array,) = pair.load(body)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    del array
    gc.collect()
    assert pair.out() == 1
    (array,) = pair.load(pair.sent(pair.lend(full(2), to=(0,))))
    del array
    assert pair.out() == 1, "what came after the fork is told of"


def test_a_closed_arena_lends_nothing(pair):
    pair.driver.close()
    pair.driver.close()
    assert type(pair.lend(full(1))) is bytes
    assert pair.driver.tend(0.0) is None


def test_nobody_can_take_the_files_memory_from_under_a_reader(pair):
    with pytest.raises(PermissionError):
        os.ftruncate(pair.fd, 0)


def test_a_file_without_room_has_no_arena():
    fd = os.memfd_create("rankwise", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        assert open_arena(fd, 2) is None
    finally:
        os.close(fd)


def test_an_idle_arena_gives_its_memory_back(pair):
    arena: Arena = pair.driver
    assert arena.tend(0.0) is None
    for _ in range(3):
        pair.load(pair.sent(pair.lend(full(1, 8 * MIB), to=(0,))))
    assert os.fstat(pair.fd).st_blocks * 512 >= 8 * MIB
    now = lending.clock()
    due = arena.tend(now)
    assert due is not None
    assert now < due <= now + lending.IDLE
    arena.tend(due)
    assert os.fstat(pair.fd).st_blocks * 512 <= 4 * PAGE
    assert arena.tend(due) is None
