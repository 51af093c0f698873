"""The memory that the processes of one group share for large payloads.

    driver  put > Lender ==region 0==> Borrower > load   worker, any number of them
    worker  put > Lender ==its own ==> Borrower > load   driver

It is one file without a name (the memfd of the status pages), far larger than any memory and almost
all hole: each process writes to a region of its own, reserves there what it needs and gives it back
when it has been idle. So every process has its one descriptor from the start; none is ever sent,
none can run out, and no lock crosses a process. The file's size is sealed: nobody can take memory
away under a reader.

    0        status pages                1 << 40    the table, a row for each pair of writer, reader
    1 << 42  the driver's region         2 << 42 ...  one region a rank

A row has one word a slot: the reader writes the number of the message that it has let go of.
"""

from __future__ import annotations

import os
from errno import EBADF
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl

from rankwise.wire.borrowing import Borrower
from rankwise.wire.lending import SLOTS, Lender
from rankwise.wire.writing import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

TABLE: Final = 1 << 40
REGION: Final = 1 << 42
ROW: Final = SLOTS * 8


def make_room(fd: int, world_size: int) -> bool:
    """Give the memfd `fd` its full size, for good. False where the user's limits forbid that."""
    try:
        os.ftruncate(fd, _file_size(world_size))
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    except OSError:
        return False  # a limit on the size of files: all goes through the sockets
    return True


def open_arena(fd: int, world_size: int, rank: int | None = None) -> Arena | None:
    """The arena in `fd`, as the driver (None) or a rank sees it; None where it has none."""
    if os.fstat(fd).st_size < _file_size(world_size):
        return None
    return Arena(fd, world_size, rank)


def _file_size(world_size: int) -> int:
    return (world_size + 2) * REGION


class Arena:
    """One process's end. Maps nothing before the first large payload; owns the descriptor `fd`."""

    def __init__(self, fd: int, world_size: int, rank: int | None) -> None:
        self._pid = os.getpid()
        self._file: File | None = File(fd)
        self._world_size = world_size
        self._words: memoryview | None = None
        # Rank r tells the driver of ends in row r, and the driver tells it in row world_size + r.
        if rank is None:
            rows = {other: other for other in range(world_size)}
        else:
            rows = {0: world_size + rank}
        writer = 0 if rank is None else rank + 1
        self._lender = Lender(
            self._file,
            (writer + 1) * REGION,
            REGION,
            {reader: TABLE + row * ROW for reader, row in rows.items()},
            self._row,
        )
        own = world_size if rank is None else rank
        self._borrower = Borrower(
            self._file,
            _file_size(world_size),
            lambda sender: self._row(TABLE + (own + sender) * ROW),
        )
        self.receive = self._borrower.receive
        self.dealt = self._borrower.dealt
        self.load = self._borrower.load
        self.peek = self._borrower.peek
        self.put = self._lender.put
        self.share = self._lender.share
        self.tend = self._lender.tend

    def _row(self, offset: int) -> memoryview:
        words, file = self._words, self._file
        if words is None:
            if file is None:
                raise OSError(EBADF, "the arena is closed")
            from rankwise.wire.mapping import Mapping

            table = Mapping(file.fd, TABLE, 2 * self._world_size * ROW, shared=True)
            self._words = words = table.view.cast("Q")
        first = (offset - TABLE) // 8
        return words[first : first + SLOTS]

    def close(self) -> None:
        """Close the descriptor; lend and map no more. What was received stays valid.

        In a forked child too: no lock is taken, which another thread may have held.
        """
        file, self._file = self._file, None
        self._words = None
        self._lender.close()
        self._borrower.close()
        if self._pid == os.getpid():
            self._lender.release()
        elif file is not None:
            file.close()
