"""The allocator of leases against a model that knows of every page who may look at it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rankwise.wire.blocks import CHUNK, PAGE, Blocks, Loan

PAGES = CHUNK // PAGE
LIMIT = 8 * CHUNK

sizes = st.integers(1, 3 * CHUNK) | st.integers(1, 20 * PAGE) | st.just(CHUNK)
ranks = st.sets(st.integers(0, 3), min_size=1)


def pages(start: int, end: int) -> set[int]:
    assert start % PAGE == 0
    assert end % PAGE == 0
    return set(range(start // PAGE, end // PAGE))


class LeasesOfAnArena(RuleBasedStateMachine):
    """Every page has one owner: a loan, the free list, a hole, or what is being given back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(LIMIT, slots=6)
        self.now = 0.0
        self.backed: set[int] = set()  # chunks that were reserved and not given back
        self.content: dict[int, int] = {}  # page -> the message that was written there
        self.readers: dict[int, tuple[Loan, set[int]]] = {}  # message -> who may still look
        self.unreserved: list[Loan] = []
        self.leaving: list[tuple[int, int]] = []
        self.messages: set[int] = set()
        self.uses: dict[int, list[int]] = {}  # message -> the shared memory that it looks at

    @rule(size=sizes, receivers=ranks | st.just(set()), seconds=st.floats(0, 3), data=st.data())
    def lend(self, size: int, receivers: set[int], seconds: float, data: st.DataObject) -> None:
        """Without receivers it is shared memory, which later messages may use."""
        self.now += seconds
        shared = [m for m, (loan, waiting) in self.readers.items() if -loan.message in waiting]
        used = data.draw(st.sets(st.sampled_from(sorted(shared)))) if shared and receivers else ()
        uses = tuple(self.readers[message][0] for message in sorted(used))
        loan = self.blocks.lend(size, receivers, uses)
        if loan is None:
            return
        receivers = receivers or {-loan.message}
        self.uses[loan.message] = [other.message for other in uses]
        for other in uses:
            self.readers[other.message][1].add(-loan.message)
        assert loan.end - loan.start >= size
        assert loan.end <= LIMIT
        assert loan.message not in self.messages
        self.messages.add(loan.message)
        if loan.fresh is None:
            self.write(loan, receivers)
        else:
            self.unreserved.append(loan)

    def write(self, loan: Loan, receivers: set[int]) -> None:
        mine = pages(loan.start, loan.end)
        assert {page // PAGES for page in mine} <= self.backed, "a page that is not there is SIGBUS"
        self.content.update(dict.fromkeys(mine, loan.message))
        self.readers[loan.message] = loan, set(receivers)

    @precondition(lambda self: self.unreserved)
    @rule(fails=st.booleans())
    def reserve(self, fails: bool) -> None:
        loan = self.unreserved.pop()
        assert loan.fresh is not None
        start, top = loan.fresh
        assert start % CHUNK == 0
        assert top % CHUNK == 0
        chunks = set(range(start // CHUNK, top // CHUNK))
        assert not chunks & self.backed
        receivers = set(loan.waiting)
        if fails:
            self.blocks.fail(loan, self.now)
            self.blocks.fail(loan, self.now)
            self.end_uses(loan)
        else:
            self.backed |= chunks
            self.blocks.reserved(loan, self.now)
            self.blocks.reserved(loan, self.now)
            self.write(loan, receivers)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), seconds=st.floats(0, 3))
    def let_go(self, data: st.DataObject, seconds: float) -> None:
        self.now += seconds
        # Those who wait under the negative of another message go when that one ends.
        who = [
            (message, receiver)
            for message, (_, waiting) in self.readers.items()
            for receiver in waiting
            if receiver >= 0 or receiver == -message
        ]
        if not who:
            return
        message, receiver = data.draw(st.sampled_from(sorted(who)))
        loan, waiting = self.readers[message]
        waiting.discard(receiver)
        assert self.blocks.home(loan, receiver, self.now) is (not waiting)
        if not waiting:
            del self.readers[loan.message]
            self.end_uses(loan)
            assert not self.blocks.home(loan, receiver, self.now), "told twice, it is freed once"

    def end_uses(self, loan: Loan) -> None:
        for message in self.uses[loan.message]:
            _, waiting = self.readers[message]
            waiting.discard(-loan.message)
            if not waiting:
                del self.readers[message]

    @rule(data=st.data())
    def idle(self, data: st.DataObject) -> None:
        before = data.draw(st.floats(0, self.now))
        given = self.blocks.idle(before)
        for start, end in given:
            chunks = set(range(start // CHUNK, end // CHUNK))
            assert chunks <= self.backed
            self.backed -= chunks
        self.leaving += given
        since = self.blocks.idle_since()
        assert since is None or since > before

    @precondition(lambda self: self.leaving)
    @rule()
    def given_back(self) -> None:
        self.blocks.returned([self.leaving.pop()])

    @invariant()
    def whoever_may_look_sees_what_was_written_for_him(self) -> None:
        for message, (loan, _) in self.readers.items():
            assert all(self.content[page] == message for page in pages(loan.start, loan.end))

    @invariant()
    def what_is_lent_is_what_somebody_may_look_at(self) -> None:
        lent = {loan.message for loan in self.blocks.loans.values()}
        assert lent == self.readers.keys() | {loan.message for loan in self.unreserved}

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned: list[int] = []
        for loan in self.blocks.loans.values():
            owned += pages(loan.start, loan.end)
            if loan.fresh is not None:
                owned += pages(loan.end, loan.fresh[1])
        for start, end, _ in self.blocks._free:
            owned += pages(start, end)
            assert {page // PAGES for page in pages(start, end)} <= self.backed
        for start, end in [*self.blocks._holes, *self.leaving]:
            owned += pages(start, end)
        assert sorted(owned) == list(range(LIMIT // PAGE))

    @invariant()
    def neighbours_are_joined(self) -> None:
        free = self.blocks._free
        assert all(one[1] < other[0] for one, other in pairwise(free))
        holes = self.blocks._holes
        assert all(one[1] < other[0] for one, other in pairwise(holes))


TestLeasesOfAnArena = LeasesOfAnArena.TestCase
TestLeasesOfAnArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_when_all_are_home_everything_is_one_block_and_one_hole():
    blocks = Blocks(LIMIT, slots=10)
    loans = []
    for size in (1, PAGE, CHUNK + 1, 3 * PAGE, CHUNK):
        loan = blocks.lend(size, (0, 1))
        blocks.reserved(loan, 0.0)
        loans.append(loan)
    for loan in (loans[3], loans[0], loans[4], loans[2], loans[1]):
        assert not blocks.home(loan, 1, 1.0)
        assert blocks.home(loan, 0, 1.0)
    assert len(blocks._free) == 1
    assert blocks._free[0][0] == 0
    blocks.returned(blocks.idle(1.0))
    assert blocks._free == []
    assert blocks._holes == [(0, LIMIT)]


def test_a_larger_message_takes_the_last_ones_memory_and_only_the_difference_anew():
    blocks = Blocks(LIMIT, slots=10)
    first = blocks.lend(CHUNK, (0,))
    blocks.reserved(first, 0.0)
    blocks.home(first, 0, 0.0)
    second = blocks.lend(2 * CHUNK, (0,))
    assert (second.start, second.fresh) == (0, (CHUNK, 2 * CHUNK))


def test_what_is_idle_goes_though_a_small_neighbour_is_busy():
    blocks = Blocks(LIMIT, slots=10)
    large = blocks.lend(4 * CHUNK, (0,))
    blocks.reserved(large, 0.0)
    blocks.home(large, 0, 0.0)
    for second in range(1, 20):
        small = blocks.lend(PAGE, (0,))
        assert small.fresh is None
        blocks.home(small, 0, float(second))
    assert blocks.idle_since() == 0.0
    assert blocks.idle(0.0) == [(0, 4 * CHUNK)]


def test_no_slot_and_no_room_are_told_apart_from_a_loan():
    blocks = Blocks(2 * CHUNK, slots=1)
    assert blocks.lend(3 * CHUNK, (0,)) is None
    loan = blocks.lend(CHUNK, (0,))
    assert loan is not None
    assert blocks.lend(1, (0,)) is None
    blocks.reserved(loan, 0.0)
    assert blocks.home(loan, 0, 0.0)
    assert blocks.lend(1, (0,)) is not None
