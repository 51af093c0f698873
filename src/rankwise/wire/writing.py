"""The memory under a lender: reserved, written, made of huge pages, given back.

    reserve > write     used for the first time: an error that can be raised, then `pwrite`
    make_huge > copy    used again: at the speed of memcpy, through a mapping
    give_back           punched out of the file

A page that is missing when a mapping is touched is SIGBUS, so only what was reserved is ever
touched that way. On huge pages a reader pays one page fault for 2 MB. Copies are made in pieces:
other threads and signal handlers come in between.
"""

from __future__ import annotations

import os
from errno import EAGAIN, EBUSY, ENOMEM

from rankwise.wire.blocks import CHUNK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from rankwise.wire.mapping import Mapping

WINDOW: Final = 256 << 20  # of the mappings here: address space, no memory of their own
PIECE: Final = 4 << 20  # half a millisecond of copying
# Through a mapping: less than an L2 cache. Up to there glibc's memmove uses `rep movsb`, which does
# not read first what it overwrites: 16 MB were copied at 40 GB/s so, and in larger pieces at 26, as
# by one memcpy; what fits in the caches is 4 % slower.
COPIED: Final = 512 << 10
HEADROOM: Final = 64 << 20  # left of the machine's memory by whoever asks for more
UNASKED: Final = 64 << 20  # taken before the machine is asked again what it has


class File:
    """A descriptor, closed when nobody holds this object any more.

    So a thread that is in the middle of a write, while another closes the group, writes to this
    file, and never to one that has got its number.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it now: in a forked child, where the frames of other threads stay for ever."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class Memory:
    """The part of `file` that begins at `base`. All offsets count from there."""

    def __init__(self, file: File, base: int) -> None:
        self.file = file
        self._base = base
        self._windows: dict[int, Mapping] = {}
        self._huge: set[int] = set()  # chunks that need no more collapsing
        self._collapses = True
        self._credit = 0

    def may_take(self, size: int) -> bool:
        """Whether the machine, and the cgroup, have `size` bytes to give: the kernel would kill
        somebody before it refused."""
        if size <= self._credit:
            self._credit -= size
            return True
        spare = available() - size
        if spare < 0:
            return False
        self._credit = min(UNASKED, spare // 8)
        return True

    def reserve(self, start: int, end: int) -> None:
        """Back this part by memory. Raises MemoryError; some of it may be backed then."""
        try:
            for at in range(start, end, PIECE):
                os.posix_fallocate(self.file.fd, self._base + at, min(PIECE, end - at))
        except OSError as error:
            raise MemoryError(f"no memory for {end - start} bytes of payload: {error}") from error

    def write(self, at: int, data: memoryview) -> None:
        """Write `data` to where no mapping need be."""
        done = 0
        while done < len(data):
            piece = data[done : done + PIECE]
            done += os.pwrite(self.file.fd, piece, self._base + at + done)

    def copy(self, at: int, data: memoryview) -> None:
        """Write `data` to memory that was used before."""
        done = 0
        while done < len(data):
            index, inside = divmod(at + done, WINDOW)
            window = self._windows.get(index) or self._open(index)
            if window is None:
                return self.write(at + done, data[done:])
            count = min(len(data) - done, WINDOW - inside, COPIED)
            window.view[inside : inside + count] = data[done : done + count]
            done += count

    def _open(self, index: int) -> Mapping | None:
        try:
            window = self.map(index * WINDOW, WINDOW)
        except OSError:
            return None  # the address space is limited: `pwrite` needs none
        return self._windows.setdefault(index, window)

    def map(self, at: int, size: int) -> Mapping:
        """This part, mapped for writing. Raises OSError."""
        from rankwise.wire.mapping import Mapping

        return Mapping(self.file.fd, self._base + at, size, shared=True)

    def make_huge(self, start: int, end: int) -> None:
        """Have this part, which is reserved, lie on huge pages, where the kernel can do that."""
        from rankwise.wire.mapping import collapse

        for chunk in range(start // CHUNK, -(-end // CHUNK)):
            if chunk in self._huge or not self._collapses:
                continue
            index, inside = divmod(chunk * CHUNK, WINDOW)
            window = self._windows.get(index) or self._open(index)
            if window is not None:
                # Else this kernel cannot, or not for this file: small pages are as right.
                self._collapses = collapse(window.address + inside) in (0, EAGAIN, EBUSY, ENOMEM)
            self._huge.add(chunk)

    def give_back(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Back these parts, whole chunks, by nothing."""
        for start, end in ranges:
            from rankwise.wire.mapping import punch

            self._huge.difference_update(range(start // CHUNK, end // CHUNK))
            try:
                punch(self.file.fd, self._base + start, self._base + end)
            except OSError:
                pass  # it stays reserved, and will be found so


def available() -> int:
    """Bytes that may be taken now."""
    from rankwise._procfs import mem_available

    return max(0, mem_available() - HEADROOM)
