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

from rankwise.wire.lending import HEAD, SLOTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from rankwise.wire.writing import File

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


class _Unloaded:
    """Stands for a message that has not been loaded."""

    __slots__ = ("__weakref__",)


class Received(bytes):
    """A body whose payload is mapped already: it can be loaded after the arena has closed."""

    memories: Sequence[object] = ()  # what is mapped, until its lease is seen to
    leased = False
    unloaded: object = None  # its end is the lease's, where that is to outlive the loading
    opened: tuple[list[memoryview], memoryview] | None = None  # None: there was no room for it

    def load(self) -> Any:
        """The object in it. Raises what its unpickling raises, and MemoryError."""
        if self.opened is None:
            raise MemoryError("no memory to map or to copy the payload")
        buffers, stream = self.opened
        return loads(stream, buffers=buffers)


class Borrower:
    """Reads from `file`, which has `size` bytes.

    row(sender): the words by which `sender` is told of an end.
    """

    def __init__(self, file: File, size: int, row: Callable[[int], memoryview]) -> None:
        self._file: File | None = file  # None: closed
        self._size = size
        self._row = row
        # What has come and is not yet noted as dealt with: by sender, and sequence of the frame.
        self._coming: dict[int, dict[int, Received]] = {}
        _watch_forks()

    def load(self, body: bytes | bytearray | memoryview, sender: int = 0) -> Any:
        """The object in `body`. Raises what its unpickling raises, MemoryError, and ValueError or
        struct.error where it is no body."""
        if type(body) is Received:
            return body.load()
        try:
            memories, buffers, stream = self._open(body)
        except (MemoryError, OSError):  # an import needs a descriptor
            try:
                self._lease((), body, sender)
            except OSError:
                pass  # as in `receive`
            raise
        unloaded = _Unloaded() if HEAD.unpack_from(body)[3] else None
        if unloaded is not None:
            memories.append(unloaded)
        self._lease(memories, body, sender)
        del memories
        return loads(stream, buffers=buffers)

    def peek(self, body: bytes) -> Any:
        """The object in `body`, which is none of ours to let go of: this process has lent it, and
        wants to see what its receivers will. It is not to be kept."""
        _, buffers, stream = self._open(body)
        return loads(stream, buffers=buffers)

    def receive(self, body: bytes, sender: int, sequence: int) -> Received:
        """`body`, mapped. The same again for the same frame, until `dealt` is called."""
        # Struck before it is noted, it ends no lease: whoever comes next maps the same block again.
        coming = self._coming.setdefault(sender, {})
        received = coming.get(sequence)
        if received is None:
            received = Received(body)
            try:
                memories, buffers, stream = self._open(body)
                if HEAD.unpack_from(body)[3]:
                    received.unloaded = _Unloaded()
                    memories.append(received.unloaded)
                received.memories = memories
                received.opened = buffers, stream
            except (MemoryError, OSError):  # no room, or no descriptor to import `mapping` by
                pass  # told to who asks for it, not to who happens to lead
            coming[sequence] = received
        if not received.leased:
            try:
                self._lease(received.memories, body, sender)
            except OSError:
                pass  # not even the table can be mapped: the block stays lent
            received.memories = ()
            received.leased = True
        return received

    def dealt(self, sender: int) -> None:
        """All that was received from `sender` so far is where it belongs."""
        self._coming.pop(sender, None)

    def _open(
        self, body: bytes | bytearray | memoryview
    ) -> tuple[list[object], list[memoryview], memoryview]:
        """What keeps it mapped, the buffers, and the pickle."""
        _, slot, count, _, _, offset, size, inside = HEAD.unpack_from(body)
        top = HEAD.size + 16 * count
        places = memoryview(body)[HEAD.size : top].cast("Q").tolist()
        ends = [offset + size, *map(sum, zip(places[::2], places[1::2], strict=True))]
        # A page behind the file's end would be SIGBUS, which nobody can catch.
        if max(ends) > self._size or inside > size or slot >= SLOTS or top > len(body):
            raise ValueError("a payload that is said to lie where there is no room for any")
        memories: list[object] = []
        own = self._map(offset, size, memories)
        buffers = []
        for at, length in zip(places[::2], places[1::2], strict=True):
            if offset <= at < offset + size:
                buffers.append(own[at - offset : at - offset + length])
            else:
                buffers.append(self._map(at, length, memories))
        stream = own[size - inside :] if inside else memoryview(body)[top:]
        return memories, buffers, stream

    def _map(self, offset: int, size: int, memories: list[object]) -> memoryview:
        file = self._file
        if file is None:
            raise MemoryError("the arena is closed")
        if size >= WORTH_MAPPING:
            from rankwise.wire.mapping import Mapping

            try:
                mapping = Mapping(file.fd, offset, size, shared=False)
            except OSError:
                pass  # too many mappings, or too little address space
            else:
                memories.append(mapping.memory)
                return mapping.view
        view = memoryview(bytearray(size))
        done = 0
        while done < size:
            done += os.preadv(file.fd, [view[done:]], offset + done)
        return view

    def _lease(
        self, memories: Sequence[object], body: bytes | bytearray | memoryview, sender: int
    ) -> None:
        """Tell of the end of `body` when all of `memories` have gone; now, where there are none."""
        _, slot, _, _, message, _, _, _ = HEAD.unpack_from(body)
        row = self._row(sender)
        held = [None] * len(memories)
        if not memories:
            _end(held, row, slot, message, _forks[0])
        for memory in memories:
            from weakref import finalize  # 1 ms, which a rank without large payloads need not wait

            finalize(memory, _end, held, row, slot, message, _forks[0]).atexit = False

    def close(self) -> None:
        """Map no more. What is mapped stays."""
        self._file = None
        self._coming = {}


def _end(held: list[None], row: memoryview, slot: int, message: int, forks: int) -> None:
    if held:
        held.pop()
    if not held and forks == _forks[0] and row[slot] < message:
        row[slot] = message
