"""The writer's half of an arena: payloads into shared memory, each once for all its receivers.

    put > Blocks.lend > reserve what is fresh > copy > a body that says where it lies
          ^ receivers let go (a word each in the table), calls that were never sent

Memory that is used for the first time is reserved (an error that can be raised, where a page that
is missing later would be SIGBUS) and written by `pwrite`. Memory that is used again is made of huge
pages first and then written through a mapping: it runs at the speed of memcpy, and a receiver pays
one page fault for 2 MB. Copies are made in pieces, so that other threads and signal handlers come
in between.
"""

from __future__ import annotations

import os
from collections import deque
from errno import EAGAIN, EBUSY, ENOMEM
from struct import Struct
from threading import RLock

from rankwise._deadline import clock
from rankwise.wire.blocks import CHUNK, PAGE, Blocks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Final

    from rankwise.wire.blocks import Loan, Range
    from rankwise.wire.mapping import Mapping

# The first byte of a body that lies elsewhere. A pickle of any protocol since 2 begins with 0x80.
LENT: Final = 1
# LENT, slot, number of buffers, 0; message, offset in the file, bytes there, how many of them are
# the pickle at the end (0: it follows here). Then the buffers' sizes, 8 bytes each.
HEAD: Final = Struct("<IIIIQQQQ")
ALIGN: Final = 64  # of each buffer: a cache line, and what numpy and torch like best

# Loans at a time; a receiver needs up to three mappings for each, and the kernel's limit is 65,530.
SLOTS: Final = 1 << 14
WORDS: Final = PAGE // 8
GROUP: Final = 64  # slots that are looked at together for what has come home

WINDOW: Final = 256 << 20  # the writer's mappings: address space, no memory of their own
PIECE: Final = 4 << 20  # half a millisecond of copying
IDLE: Final = 30.0  # seconds after which free memory is given back
HEADROOM: Final = 64 << 20  # left of the machine's memory by whoever asks for more
UNASKED: Final = 64 << 20  # grown by so much before the machine is asked again what it has


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
    """Writes to the `limit` bytes of the file `fd` that begin at `base`.

    rows: where in the file the words of each receiver lie. row(offset): the words there, mapped.
    """

    def __init__(
        self,
        fd: int,
        base: int,
        limit: int,
        rows: dict[int, int],
        row: Callable[[int], memoryview],
    ) -> None:
        self.closed = False
        self._fd = fd
        self._base = base
        self._rows = rows
        self._row = row
        self._table: dict[int, memoryview] = {}
        self._lock = RLock()
        self._blocks = Blocks(limit, SLOTS)
        self._dropped: deque[tuple[Loan, set[int]]] = deque()
        self._seen: dict[tuple[int, int], bytes] = {}  # receiver, first slot of a group
        self._slots = 0  # words in each row that are backed by memory
        self._windows: dict[int, Mapping] = {}
        self._huge: set[int] = set()  # chunks that need no more collapsing
        self._collapses = True
        self._credit = 0

    def put(
        self,
        stream: list[bytes | memoryview],
        length: int,
        buffers: list[memoryview],
        receivers: Sequence[int] = (0,),
    ) -> Lent | None:
        """Lend the pickle in `stream` (`length` bytes in all) with its `buffers`: the frame's body.

        A short pickle stays in the body. None: not now, send it all in the frame.
        Raises MemoryError where there is no room.
        """
        if self.closed or self._lock._is_owned():  # type: ignore[attr-defined]
            return None  # the latter: a signal handler has interrupted this very method
        places = []
        size = 0
        for buffer in buffers:
            size = -(-size // ALIGN) * ALIGN
            places.append((size, buffer))
            size += len(buffer)
        inside = length if length >= PAGE else 0
        if inside:
            size = -(-size // ALIGN) * ALIGN
            for part in stream:
                places.append((size, memoryview(part)))
                size += len(part)
        hold = self._lend(size, receivers)
        if hold is None:
            return None
        loan = hold.loan
        if loan.fresh is not None:
            self._reserve(loan)
            for at, data in places:
                self._write(loan.start + at, data)
        else:
            self._make_huge(loan)
            for at, data in places:
                self._copy(loan.start + at, data)
        head = HEAD.pack(
            LENT, loan.slot, len(buffers), 0, loan.message, self._base + loan.start, size, inside
        )
        sizes = b"".join([len(buffer).to_bytes(8, "little") for buffer in buffers])
        body = Lent(head + sizes + (b"" if inside else b"".join(stream)))
        body.hold = hold
        return body

    def _lend(self, size: int, receivers: Sequence[int]) -> Hold | None:
        with self._lock:
            self._collect(clock())
            loan = self._blocks.lend(size, receivers)
            if loan is None:
                return None
            hold = Hold(loan, set(receivers), self._dropped)
            if loan.slot >= self._slots:
                try:
                    for receiver, offset in self._rows.items():
                        os.posix_fallocate(self._fd, offset + self._slots * 8, PAGE)
                        self._table[receiver] = self._row(offset)
                except OSError as error:
                    raise MemoryError(f"no memory for {size} bytes of payload: {error}") from error
                self._slots += WORDS
            return hold

    # -- writing ------------------------------------------------------------------------------

    def _reserve(self, loan: Loan) -> None:
        assert loan.fresh is not None
        start, top = loan.fresh
        self._ask_for(top - start)
        try:
            for at in range(start, top, PIECE):
                os.posix_fallocate(self._fd, self._base + at, min(PIECE, top - at))
        except OSError as error:
            raise MemoryError(f"no memory for {top - start} bytes of payload: {error}") from error
        with self._lock:
            self._blocks.reserved(loan, clock())

    def _ask_for(self, size: int) -> None:
        """Raise MemoryError where taking `size` bytes would leave the machine, or the cgroup, too
        little: the kernel would kill somebody before it refused."""
        if size <= self._credit:
            self._credit -= size
            return
        from rankwise._procfs import mem_available

        available = mem_available() - HEADROOM
        if size > available:
            self._give_back(clock())
            available = mem_available() - HEADROOM
        if size > available:
            raise MemoryError(
                f"no memory for {size} bytes of payload: {max(0, available)} bytes may be taken now"
            )
        self._credit = min(UNASKED, (available - size) // 8)

    def _write(self, at: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            piece = data[done : done + PIECE]
            done += os.pwrite(self._fd, piece, self._base + at + done)

    def _copy(self, at: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            index, inside = divmod(at + done, WINDOW)
            window = self._windows.get(index) or self._open(index)
            if window is None:
                return self._write(at + done, data[done:])
            count = min(len(data) - done, WINDOW - inside, PIECE)
            window.view[inside : inside + count] = data[done : done + count]
            done += count

    def _open(self, index: int) -> Mapping | None:
        from rankwise.wire.mapping import Mapping

        try:
            window = Mapping(self._fd, self._base + index * WINDOW, WINDOW, shared=True)
        except (OSError, MemoryError):
            return None  # the address space is limited: `pwrite` needs none
        return self._windows.setdefault(index, window)

    def _make_huge(self, loan: Loan) -> None:
        from rankwise.wire.mapping import collapse

        for chunk in range(loan.start // CHUNK, -(-loan.end // CHUNK)):
            if chunk in self._huge or not self._collapses:
                continue
            index, inside = divmod(chunk * CHUNK, WINDOW)
            window = self._windows.get(index) or self._open(index)
            if window is not None:
                error = collapse(window.address + inside)
                # Else this kernel cannot, or not for this file: small pages are as right.
                self._collapses = error in (0, EAGAIN, EBUSY, ENOMEM)
            self._huge.add(chunk)

    # -- what comes home ----------------------------------------------------------------------

    def _collect(self, now: float) -> None:
        blocks = self._blocks
        while self._dropped:
            loan, receivers = self._dropped[0]
            for receiver in tuple(receivers):
                blocks.home(loan, receiver, now)
            if loan.fresh is not None:  # struck, or refused, before it was reserved
                self._punch([loan.fresh])
                blocks.fail(loan, now)
            self._dropped.popleft()
        if len(blocks.loans) <= GROUP:
            for loan in list(blocks.loans.values()):
                for receiver in list(loan.waiting):
                    if self._table[receiver][loan.slot] == loan.message:
                        blocks.home(loan, receiver, now)
            return
        top = max(blocks.loans) + 1
        for receiver, row in self._table.items():
            for first in range(0, top, GROUP):
                words = row[first : first + GROUP].tobytes()
                if words != self._seen.get((receiver, first)):
                    for slot, message in enumerate(memoryview(words).cast("Q"), first):
                        loan_there = blocks.loans.get(slot)
                        if loan_there is not None and loan_there.message == message:
                            blocks.home(loan_there, receiver, now)
                    self._seen[receiver, first] = words

    def tend(self, now: float) -> float | None:
        """Give back what has been idle for long. When to come again; None: not before a `put`."""
        if not self._table:
            return None  # nothing was ever lent
        if self.closed or self._lock._is_owned():  # type: ignore[attr-defined]
            return None
        with self._lock:
            self._collect(now)
        self._give_back(now - IDLE)
        with self._lock:
            since = self._blocks.idle_since()
            if since is not None:
                return since + IDLE
            return now + IDLE if self._blocks.loans else None

    def _give_back(self, before: float) -> None:
        with self._lock:
            ranges = self._blocks.idle(before)
        self._punch(ranges)
        with self._lock:
            self._blocks.returned(ranges)

    def _punch(self, ranges: list[Range]) -> None:
        if not ranges:
            return
        from rankwise.wire.mapping import punch

        for start, end in ranges:
            self._huge.difference_update(range(start // CHUNK, end // CHUNK))
            try:
                punch(self._fd, self._base + start, self._base + end)
            except OSError:
                pass  # it stays reserved, and will be found so

    def close(self) -> None:
        """Write no more, and unmap. In a forked child too, where the lock may be held for ever."""
        self.closed = True
        self._windows = {}
        self._table = {}
