"""The status page: 4 KB of shared memory a rank, which says what the rank is doing right now.

    worker writes   phase, the call it runs and since when, the last call it finished, and
                    whether it sleeps until bytes come, and how many late answers it owes
    driver writes   the ids of cancelled calls that are under way (a ring), and the rank's BELL
    news page       a line a rank, where that rank writes how many answers it has sent

It decides nothing about order. It is read by `health()`, by the search for lost messages and by
`current_call().cancelled()`; it replaces heartbeats and a reader thread in the worker. One memfd a
group, without a name. Every field is one aligned 8-byte word, stored and loaded whole.

The bell and the news are hints for who polls: a look at a word costs a twentieth of a look at a
socket that is empty (a system call, and an exception out of it). The socket remains the truth. Who
is told too early finds it empty and looks again. Who is told late (the writer waits for its
interpreter's lock between the send and the store, or is stopped there) or not at all (it was struck
there, or has died) hears by the look at the kernel that ends every poll, and that comes now and
then in a long one.
"""

from __future__ import annotations

import mmap
import os
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

PAGE: Final = 4096
WORDS: Final = PAGE // 8
# Words of a cache line. What one side polls and the other writes has a line to itself: each store
# into a line takes it away from the other core, which took a third of a call's time.
LINE: Final = 8

# Words of a page.
PHASE: Final = 0
RUNNING: Final = 1  # the call's id, 0 while idle
SINCE: Final = 2  # when that began, CLOCK_MONOTONIC in nanoseconds
DONE: Final = 3  # the last call whose answer has been written
PORT: Final = 4  # rank 0: round << 16 | port of the rendezvous store that it listens on
NEXT_CANCEL: Final = 5
LATE: Final = 6  # how many answers its second thread owes
BELL: Final = 4 * LINE  # how many frames the driver has begun to send to the rank
POLLS: Final = 8  # odd while the rank sleeps until bytes come; each sleep has its own number
CANCELLED: Final = 256  # a ring of 256 ids: more than are ever under way to one rank

RING: Final = WORDS - CANCELLED

# Values of PHASE, in the order in which a rank goes through them.
PHASES: Final = ("spawn", "import", "construct", "ready", "exit")
SPAWN, IMPORT, CONSTRUCT, READY, EXIT = range(5)


def make_status(world_size: int) -> int:
    """A descriptor of fresh pages, all zero, for `world_size` ranks."""
    fd = os.memfd_create("rankwise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    # Reserved now: a page that cannot be had later would be SIGBUS, here it is an error.
    os.posix_fallocate(fd, 0, PAGE * (world_size + _news_pages(world_size)))
    return fd


def _news_pages(world_size: int) -> int:
    return -(-world_size * LINE // WORDS)


class News:
    """The news page of a group: how many answers each rank has sent, in word `rank * LINE`.

    `look()`: all of it, as bytes that compare as a whole. Without a descriptor it is plain memory.
    """

    __slots__ = ("_map", "look", "words")

    def __init__(self, world_size: int, fd: int | None = None) -> None:
        begin = 0 if fd is None else PAGE * world_size
        # From the file's beginning: kernels with larger pages map from few other places.
        self._map = mmap.mmap(-1 if fd is None else fd, begin + PAGE * _news_pages(world_size))
        self.words = memoryview(self._map)[begin:].cast("Q")
        # One C call: a memcpy under the interpreter's lock.
        self.look: Callable[[], bytes] = partial(  # type: ignore[assignment]
            self._map.__getitem__, slice(begin, begin + 8 * LINE * world_size)
        )

    def close(self) -> None:
        self.words.release()
        self._map.close()


class StatusPage:
    """The pages of a group, mapped; without a descriptor plain memory (ranks that are threads)."""

    __slots__ = ("_map", "_words")

    def __init__(self, world_size: int, fd: int | None = None) -> None:
        size = PAGE * world_size
        self._map = mmap.mmap(-1 if fd is None else fd, size)
        self._words = memoryview(self._map).cast("Q")

    def words(self, rank: int) -> memoryview:
        """The page of `rank`, as 512 words."""
        return self._words[rank * WORDS : (rank + 1) * WORDS]

    def get(self, rank: int, word: int) -> int:
        return self._words[rank * WORDS + word]

    def cancel(self, rank: int, call_id: int) -> None:
        """Tell `rank` that call `call_id`, which is under way to it, was cancelled."""
        base = rank * WORDS
        if call_id in self._words[base + CANCELLED : base + WORDS]:
            return  # told again and again it would push out the others
        at = self._words[base + NEXT_CANCEL]
        self._words[base + CANCELLED + at % RING] = call_id
        self._words[base + NEXT_CANCEL] = at + 1

    def close(self) -> None:
        self._words.release()
        self._map.close()


def is_cancelled(words: memoryview, call_id: int) -> bool:
    """Whether `call_id` is among the cancelled ones of the page `words`."""
    return call_id in words[CANCELLED:]
