"""The reader's half of an arena: payloads in place, each in a private mapping of its own.

    load > map, copy-on-write > unpickle over it     the last array on it dies > a word in the table

The lease is the mapping: it ends when the last view of it has gone, whoever holds it and however
late, and its end is told by one store into shared memory. That wants no lock, no message and nobody
who listens, so it may happen inside a finalizer. Each message is mapped anew, for a page that was
once written stays as it was.

A process that forks never ends the leases that it holds at that moment, nor does its child: both
look at the same block, and neither can know of the other.
"""

from __future__ import annotations

import os
from _pickle import loads
from weakref import finalize

from rankwise.wire.lending import ALIGN, HEAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

# Below this a copy is cheaper than a mapping and its page faults: bytes.
WORTH_MAPPING: Final = 256 << 10

_forks = [0]
_watching = False


def _watch_forks() -> None:
    global _watching
    if not _watching:
        _watching = True
        # Before and after: other hooks, which may run anything, lie between these and the fork.
        os.register_at_fork(
            before=_note_fork, after_in_parent=_note_fork, after_in_child=_note_fork
        )


def _note_fork() -> None:
    _forks[0] += 1


class Received(bytes):
    """A body whose payload is mapped already: it can be loaded after the arena has closed.

    memory: what is mapped, until its lease is seen to. view: the payload; None: no room for it.
    """

    memory: Any
    view: memoryview | None
    leased: bool


class Borrower:
    """Reads from the file `fd`. `row(sender)`: the words by which `sender` is told of an end."""

    def __init__(self, fd: int, row: Callable[[int], memoryview]) -> None:
        self.closed = False
        self._fd = fd
        self._row = row
        # What has come and is not yet noted as dealt with: by sender, and sequence of the frame.
        self._coming: dict[int, dict[int, Received]] = {}
        _watch_forks()

    def load(self, body: bytes | bytearray | memoryview, sender: int = 0) -> Any:
        """The object in `body`. Raises what its unpickling raises, and MemoryError."""
        _, _, count, _, _, _, size, inside = HEAD.unpack_from(body)
        if type(body) is Received:
            view = body.view
        else:
            memory, view = self._map(body)
            self._lease(memory, body, sender)
            del memory
        if view is None:
            raise MemoryError(f"no memory to map or to copy {size} bytes of payload")
        sizes = memoryview(body)[HEAD.size : HEAD.size + 8 * count].cast("Q")
        buffers = []
        at = 0
        for length in sizes:
            at = -(-at // ALIGN) * ALIGN
            buffers.append(view[at : at + length])
            at += length
        if inside:
            stream = view[size - inside : size]
        else:
            stream = memoryview(body)[HEAD.size + 8 * count :]
        del view
        return loads(stream, buffers=buffers)

    def receive(self, body: bytes, sender: int, sequence: int) -> Received:
        """`body`, mapped. The same again for the same frame, until `dealt` is called."""
        # Struck before it is noted, it ends no lease: whoever comes next maps the same block again.
        coming = self._coming.setdefault(sender, {})
        received = coming.get(sequence)
        if received is None:
            received = Received(body)
            received.memory, received.view = self._map(body)
            coming[sequence] = received
            received.leased = False
        if not received.leased:
            try:
                self._lease(received.memory, body, sender)
            except OSError:
                pass  # not even the table can be mapped: the block stays lent
            received.memory = None
            received.leased = True
        return received

    def dealt(self, sender: int) -> None:
        """All that was received from `sender` so far is where it belongs."""
        self._coming.pop(sender, None)

    def _map(self, body: bytes | bytearray | memoryview) -> tuple[Any, memoryview | None]:
        offset, size = HEAD.unpack_from(body)[5:7]
        try:
            if size >= WORTH_MAPPING:
                from rankwise.wire.mapping import Mapping

                try:
                    mapping = Mapping(self._fd, offset, size, shared=False)
                    return mapping.memory, mapping.view
                except OSError:
                    pass  # too many mappings, or too little address space
            return self._copy(offset, size)
        except MemoryError:
            return None, None

    def _copy(self, offset: int, size: int) -> tuple[Any, memoryview]:
        copied = bytearray(size)
        view = memoryview(copied)
        done = os.preadv(self._fd, [view], offset)
        while done < size:
            done += os.preadv(self._fd, [view[done:]], offset + done)
        return copied, view

    def _lease(self, memory: Any, body: bytes | bytearray | memoryview, sender: int) -> None:
        _, slot, _, _, message, _, _, _ = HEAD.unpack_from(body)
        row = self._row(sender)
        if memory is None or type(memory) is bytearray:
            _end(row, slot, message, _forks[0])  # a copy, or none: the block is needed no more
        else:
            finalize(memory, _end, row, slot, message, _forks[0]).atexit = False

    def close(self) -> None:
        """Map no more. What is mapped stays."""
        self.closed = True
        self._coming = {}


def _end(row: memoryview, slot: int, message: int, forks: int) -> None:
    if forks == _forks[0] and row[slot] < message:
        row[slot] = message
