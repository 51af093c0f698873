"""Which part of an arena is lent to whom: an allocator of leases. Pure: no memory, no clock.

    holes (never reserved, or given back)  --lend-->  loan, its `fresh` part to be reserved first
    free (reserved, nobody reads it)       --lend-->  loan
    loan  --home, once a receiver-->  free  --idle-->  given back  --returned-->  holes

Addresses are offsets in a space of `limit` bytes. Memory is reserved and given back in whole chunks
(a huge page each), and lent in whole pages. A block is used again only when every receiver of its
loan has let go of it.

An exception out of a signal handler may cut any method short. Each takes away first and adds last,
each by one store, so what is lost then is memory, never the knowledge that it is lent.
"""

from __future__ import annotations

# The C halves: the Python halves take their own time to import, in every worker.
from _bisect import bisect_left
from _heapq import heappop, heappush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    Range = tuple[int, int]  # start, end

PAGE: Final = 4096
CHUNK: Final = 2 << 20


class Loan:
    """One block, lent to the receivers in `waiting` until each of them has let go of it.

    slot: a small number that no other open loan has. message: a number that none ever had.
    fresh: the part that has to be reserved before it is touched (whole chunks, may reach past the
    end), or None. uses: other loans that this one's receivers look at too. They wait for its end,
    under its message's negative. keep: what is to live until then.
    """

    __slots__ = ("end", "fresh", "keep", "message", "slot", "start", "uses", "waiting")

    def __init__(
        self,
        message: int,
        slot: int,
        start: int,
        end: int,
        fresh: Range | None,
        waiting: set[int],
        uses: tuple[Loan, ...],
    ) -> None:
        self.message = message
        self.slot = slot
        self.start = start
        self.end = end
        self.fresh = fresh
        self.waiting = waiting
        self.uses = uses
        self.keep: object = None


class Blocks:
    """The loans of one arena of `limit` bytes (whole chunks), at most `slots` at a time."""

    __slots__ = ("_free", "_holes", "_last", "_slots", "_unused", "limit", "loans")

    def __init__(self, limit: int, slots: int) -> None:
        self.limit = limit
        self.loans: dict[int, Loan] = {}  # by slot
        self._free: list[tuple[int, int, float]] = []  # start, end, since; none touch each other
        self._holes: list[Range] = [(0, limit)]
        self._unused: list[int] = []  # slots below `_slots` that are free again
        self._slots = iter(range(slots))
        self._last = 0

    def lend(self, size: int, receivers: Iterable[int], uses: tuple[Loan, ...] = ()) -> Loan | None:
        """A block of `size` bytes for `receivers`; None where there is no slot or no room left.

        Without receivers the lender itself holds it, under its message's negative.
        """
        slot = heappop(self._unused) if self._unused else next(self._slots, None)
        if slot is None:
            return None
        size = -(-size // PAGE) * PAGE
        place = self._take_free(size) or self._take_hole(size)
        if place is None:
            heappush(self._unused, slot)
            return None
        start, fresh = place
        self._last += 1
        message = self._last
        waiting = set(receivers) or {-message}
        for used in uses:
            used.waiting.add(-message)
        loan = Loan(message, slot, start, start + size, fresh, waiting, uses)
        self.loans[slot] = loan
        return loan

    def _take_free(self, size: int) -> tuple[int, None] | None:
        """Room in the smallest free block that is large enough."""
        best = -1
        least = self.limit + 1
        for index, (start, end, _) in enumerate(self._free):
            if size <= end - start < least:
                best, least = index, end - start
        if best < 0:
            return None
        start, end, since = self._free[best]
        rest = [(start + size, end, since)] if least > size else []
        self._free[best : best + 1] = rest
        return start, None

    def _take_hole(self, size: int) -> tuple[int, Range] | None:
        """Room in the first hole that has it, together with the free block that ends where the hole
        begins: a message that is larger than the last one needs only the difference."""
        for index, (start, end) in enumerate(self._holes):
            at = bisect_left(self._free, (start,)) - 1
            joins = at >= 0 and self._free[at][1] == start
            begin = self._free[at][0] if joins else start
            if end - begin < size:
                continue
            top = start + -(-(begin + size - start) // CHUNK) * CHUNK
            if joins:
                del self._free[at]
            self._holes[index : index + 1] = [(top, end)] if top < end else []
            return begin, (start, top)
        return None

    def reserved(self, loan: Loan, now: float) -> None:
        """The fresh part of `loan` is backed by memory: what it does not need itself is free."""
        if loan.fresh is not None:
            (_, top), loan.fresh = loan.fresh, None
            if loan.end < top:
                self._add_free(loan.end, top, now)

    def home(self, loan: Loan, receiver: int, now: float) -> bool:
        """`receiver` has let go of `loan`. True: it was the last, and the block is free again."""
        loan.waiting.discard(receiver)
        if loan.waiting or self.loans.get(loan.slot) is not loan or loan.fresh is not None:
            return False
        self._close(loan, now)
        self._add_free(loan.start, loan.end, now)
        return True

    def fail(self, loan: Loan, now: float) -> None:
        """The fresh part of `loan` could not be reserved, and none of it is backed: undo it."""
        if loan.fresh is None or self.loans.get(loan.slot) is not loan:
            return
        self._close(loan, now)
        start, top = loan.fresh
        if loan.start < start:
            self._add_free(loan.start, start, now)
        self.returned([(start, top)])

    def _close(self, loan: Loan, now: float) -> None:
        del self.loans[loan.slot]
        loan.keep = None
        heappush(self._unused, loan.slot)
        for used in loan.uses:
            self.home(used, -loan.message, now)

    def idle(self, before: float) -> list[Range]:
        """Take what has been free since `before` or longer, in whole chunks, to be given back.

        It belongs to nobody until `returned` is told of it.
        """
        given: list[Range] = []
        for start, end, since in list(self._free):
            first = -(-start // CHUNK) * CHUNK
            last = end // CHUNK * CHUNK
            if since <= before and first < last:
                edges = ((start, first, since), (last, end, since))
                at = bisect_left(self._free, (start,))
                self._free[at : at + 1] = [edge for edge in edges if edge[0] < edge[1]]
                given.append((first, last))
        return given

    def returned(self, ranges: Iterable[Range]) -> None:
        """These ranges are backed by nothing any more."""
        for start, end in ranges:
            holes = self._holes
            low = high = bisect_left(holes, (start,))
            if low and holes[low - 1][1] == start:
                low -= 1
                start = holes[low][0]
            if high < len(holes) and holes[high][0] == end:
                end = holes[high][1]
                high += 1
            holes[low:high] = [(start, end)]

    def idle_since(self) -> float | None:
        """Since when the block that has been free longest, of those with a chunk, has been so."""
        return min(
            (
                since
                for start, end, since in self._free
                if -(-start // CHUNK) * CHUNK < end // CHUNK * CHUNK
            ),
            default=None,
        )

    def _add_free(self, start: int, end: int, now: float) -> None:
        # A large block that has been idle for long stays so while a small one beside it is busy:
        # the larger part decides.
        free = self._free
        since = now
        longest = end - start
        low = high = bisect_left(free, (start,))
        if low and free[low - 1][1] == start:
            low -= 1
            start, middle, before = free[low]
            if middle - start > longest:
                longest, since = middle - start, before
        if high < len(free) and free[high][0] == end:
            middle, end, after = free[high]
            if end - middle > longest:
                since = after
            high += 1
        free[low:high] = [(start, end, since)]
