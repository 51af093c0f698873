"""The writer's half of an arena: payloads into shared memory, each once for all its receivers.

    put > Blocks.lend > Memory.write or .copy > a body that says where it lies
          ^ receivers let go (a word each in the table), bodies that were never sent
    share > memory that the caller fills in place; `put` finds buffers in it, and copies nothing

Whatever an exception out of a signal handler cuts short, a loan is held by its `Hold`, whose end
gives it back. `Hold.__del__` may run inside any lock, so it only appends to a deque.
"""

from __future__ import annotations

import os
from _thread import RLock  # what `threading.RLock` makes
from collections import deque
from struct import Struct

from rankwise._deadline import clock
from rankwise.wire.blocks import PAGE, Blocks
from rankwise.wire.writing import File, Memory, available

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final
    from weakref import ref

    from rankwise.wire.blocks import Loan

# The first byte of a body that lies elsewhere. A pickle of any protocol since 2 begins with 0x80.
LENT: Final = 1
# LENT, slot, number of buffers, 1 where it is not let go of before it is loaded, else 0; message,
# offset in the file, bytes there, how many of them are the pickle at the end (0: it follows here).
# Then of each buffer its offset in the file, and size.
HEAD: Final = Struct("<IIIIQQQQ")
SPAN: Final = Struct("<QQ")
ALIGN: Final = 64  # of each buffer: a cache line, and what numpy and torch like best

# Loans at a time; a receiver needs up to three mappings for each, and the kernel's limit is 65,530.
SLOTS: Final = 1 << 14
WORDS: Final = PAGE // 8
GROUP: Final = 64  # slots that are looked at together for what has come home
IDLE: Final = 30.0  # seconds after which free memory is given back
LATER: Final = 0.1  # seconds until it is tried again, where somebody is at it


class Hold:
    """What gives a loan back for those to whom it is never sent."""

    __slots__ = ("_dropped", "loan", "pending")

    def __init__(
        self, loan: Loan, pending: set[int], dropped: deque[tuple[Loan, set[int]]]
    ) -> None:
        self.loan = loan
        self.pending = pending
        self._dropped = dropped

    def __del__(self) -> None:
        if self.pending:
            self._dropped.append((self.loan, self.pending))


class Lent(bytes):
    """The body of a frame whose payload lies in the arena. `hold.pending`: not sent to them yet."""

    hold: Hold


class Lender:
    """Writes to the `limit` bytes of `file` that begin at `base`.

    rows: where in the file the words of each receiver lie. row(offset): the words there, mapped.
    """

    def __init__(
        self,
        file: File,
        base: int,
        limit: int,
        rows: dict[int, int],
        row: Callable[[int], memoryview],
    ) -> None:
        self._base = base
        self._rows = rows
        self._row = row
        self._table: dict[int, memoryview] = {}
        self._lock = RLock()
        self._blocks = Blocks(limit, SLOTS)
        self._memory: Memory | None = Memory(file, base)  # None: closed
        self._dropped: deque[tuple[Loan, set[int]]] = deque()
        self._seen: dict[tuple[int, int], bytes] = {}  # receiver, first slot of a group
        self._slots = 0  # words in each row that are backed by memory
        self._shares: list[tuple[int, int, ref[Any], Loan]] = []  # first and last address, memory

    def put(
        self,
        stream: list[bytes | memoryview],
        length: int,
        buffers: list[memoryview],
        receivers: Sequence[int] = (0,),
        keep: object = None,
        /,
    ) -> Lent | None:
        """Lend the pickle in `stream` (`length` bytes in all) with its `buffers`: the frame's body.

        A short pickle stays in the body. `keep`, where it is not None, lives until every receiver
        has loaded it. None: not now, send it all in the frame. Raises MemoryError where there is no
        room.
        """
        memory = self._usable()
        if memory is None:
            return None
        found = (
            [self._find(buffer) for buffer in buffers] if self._shares else [None] * len(buffers)
        )
        size = 0
        parts: list[tuple[int, memoryview]] = []  # offset in the block, what to write there
        for buffer, share in zip(buffers, found, strict=True):
            if share is None:
                size = -(-size // ALIGN) * ALIGN
                parts.append((size, buffer))
                size += len(buffer)
        written = iter(parts[:])
        inside = length if length >= PAGE else 0
        if inside:
            size = -(-size // ALIGN) * ALIGN
            for part in stream:
                parts.append((size, memoryview(part)))
                size += len(part)
        uses = tuple({id(share[1]): share[1] for share in found if share is not None}.values())
        hold = self._lend(memory, max(size, 1), receivers, uses)
        if hold is None:
            return None
        loan = hold.loan
        loan.keep = keep
        if self._reserve(memory, loan):
            write = memory.write
        else:
            memory.make_huge(loan.start, loan.end)
            write = memory.copy
        for at, data in parts:
            write(loan.start + at, data)
        origin = self._base + loan.start
        until_loaded = keep is not None
        head = [
            HEAD.pack(
                LENT, loan.slot, len(buffers), until_loaded, loan.message, origin, size, inside
            )
        ]
        for buffer, share in zip(buffers, found, strict=True):
            at = origin + next(written)[0] if share is None else share[0]
            head.append(SPAN.pack(at, len(buffer)))
        body = Lent(b"".join(head if inside else [*head, *stream]))
        body.hold = hold
        return body

    def _usable(self) -> Memory | None:
        # A signal handler may have interrupted this very lender: its call goes without.
        return None if self._lock._is_owned() else self._memory  # type: ignore[attr-defined]

    def _lend(
        self, memory: Memory, size: int, receivers: Sequence[int], uses: tuple[Loan, ...] = ()
    ) -> Hold | None:
        with self._lock:
            self._collect(memory, clock())
            loan = self._blocks.lend(size, receivers, uses)
            if loan is None:
                return None
            hold = Hold(loan, set(loan.waiting), self._dropped)
            if loan.slot >= self._slots:
                try:
                    for receiver, offset in self._rows.items():
                        os.posix_fallocate(memory.file.fd, offset + self._slots * 8, PAGE)
                        self._table[receiver] = self._row(offset)
                except OSError as error:
                    raise MemoryError(f"no memory for {size} bytes of payload: {error}") from error
                self._slots += WORDS
            return hold

    def _reserve(self, memory: Memory, loan: Loan) -> bool:
        """Back the fresh part of `loan`, if there is one, by memory. Raises MemoryError."""
        if loan.fresh is None:
            return False
        size = loan.fresh[1] - loan.fresh[0]
        if not memory.may_take(size):
            self._give_back(memory, clock())
            if not memory.may_take(size):
                raise MemoryError(
                    f"no memory for {size} bytes of payload: {available()} bytes may be taken now"
                )
        memory.reserve(*loan.fresh)
        with self._lock:
            self._blocks.reserved(loan, clock())
        return True

    # -- memory that the caller fills ---------------------------------------------------------

    def share(self, size: int) -> memoryview | None:
        """`size` bytes of zeros that `put` will not copy; theirs for as long as any view lives.

        None where there is no arena to have them from. Raises MemoryError.
        """
        from weakref import finalize, ref

        from rankwise.wire.mapping import clear

        memory = self._usable()
        hold = None if memory is None else self._lend(memory, size, ())
        if memory is None or hold is None:
            return None
        loan = hold.loan
        dirty = loan.end if loan.fresh is None else loan.fresh[0]
        self._reserve(memory, loan)
        memory.make_huge(loan.start, loan.end)
        try:
            mapping = memory.map(loan.start, size)
        except OSError as error:
            raise MemoryError(f"no address space for {size} bytes: {error}") from error
        clear(mapping.address, min(size, dirty - loan.start))  # what is fresh is zeros
        finalize(mapping.memory, _let_go, hold).atexit = False
        del hold
        address = mapping.address
        self._shares = [share for share in self._shares if share[2]() is not None]
        self._shares.append((address, address + size, ref(mapping.memory), loan))
        return mapping.view

    def _find(self, buffer: memoryview) -> tuple[int, Loan] | None:
        """Where in the file `buffer` lies, if it is shared memory, and whose it is."""
        from rankwise.wire.mapping import address_of

        address = address_of(buffer)
        if address is None:
            return None
        for first, last, memory, loan in self._shares:
            # Memory that has gone may have made room for some other array.
            if first <= address and address + len(buffer) <= last and memory() is not None:
                return self._base + loan.start + address - first, loan
        return None

    # -- what comes home ----------------------------------------------------------------------

    def _collect(self, memory: Memory, now: float) -> None:
        blocks = self._blocks
        while self._dropped:
            loan, receivers = self._dropped[0]
            for receiver in tuple(receivers):
                blocks.home(loan, receiver, now)
            if loan.fresh is not None:  # struck, or refused, before it was reserved
                memory.give_back([loan.fresh])
                blocks.fail(loan, now)
            self._dropped.popleft()
        table = self._table
        if len(blocks.loans) <= GROUP:
            for loan in list(blocks.loans.values()):
                for receiver in list(loan.waiting):
                    row = table.get(receiver)
                    if row is not None and row[loan.slot] == loan.message:
                        blocks.home(loan, receiver, now)
            return
        top = max(blocks.loans) + 1
        for receiver, words_of in table.items():
            for first in range(0, top, GROUP):
                words = words_of[first : first + GROUP].tobytes()
                if words != self._seen.get((receiver, first)):
                    for slot, message in enumerate(memoryview(words).cast("Q"), first):
                        loan_there = blocks.loans.get(slot)
                        if loan_there is not None and loan_there.message == message:
                            blocks.home(loan_there, receiver, now)
                    self._seen[receiver, first] = words

    def tend(self, now: float) -> float | None:
        """Give back what has been idle for long. When to come again; None: not before a `put`."""
        if not self._table or (memory := self._usable()) is None:
            return None
        if not self._lock.acquire(blocking=False):
            # Who has it may have been interrupted by a handler that waits for this very thread.
            return now + LATER
        try:
            self._collect(memory, now)
        finally:
            self._lock.release()
        self._give_back(memory, now - IDLE)
        with self._lock:
            since = self._blocks.idle_since()
            if since is not None:
                return since + IDLE
            return now + IDLE if self._blocks.loans else None

    def _give_back(self, memory: Memory, before: float) -> None:
        with self._lock:
            ranges = self._blocks.idle(before)
        memory.give_back(ranges)
        with self._lock:
            self._blocks.returned(ranges)

    def release(self) -> None:
        """Nobody is left who would load what was lent: let go of what is kept for that."""
        for loan in list(self._blocks.loans.values()):
            loan.keep = None

    def close(self) -> None:
        """Lend no more, and unmap. In a forked child too, where the lock may be held for ever."""
        self._memory = None
        self._table = {}


def _let_go(hold: Hold) -> None:
    """The memory has gone, and with this the hold on its loan."""
