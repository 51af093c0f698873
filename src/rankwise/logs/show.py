"""Writing the workers' lines where the user looks, on a thread of its own.

    put(stream, data) > queue > thread: descriptor 1 or 2    where sys.stdout, sys.stderr are these
                                  |     sys.stdout.write()   elsewhere (notebook, capture)
                                  `---> shown(nbytes)        room for the launcher to send more

A terminal may be stopped and a pipe's reader may sleep. Then this thread waits and nobody else
does: `put` only appends, and the launcher drops lines once 16 MB have not been shown.

The descriptors are the user's. O_NONBLOCK is a property of the open file, shared with every
process that has it, so it is never touched; a single write can be asked not to wait instead.
Where the kernel refuses that (a terminal), a poll precedes a write that is short enough to fit.
So even while the reader sleeps, `close` is heard.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import select
import stat
import sys
import threading
from _queue import SimpleQueue

from rankwise._background import Background, Bell
from rankwise._deadline import deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, TextIO

# A pipe polls as writable when it has room for this much (PIPE_BUF), and takes it in one piece.
_ONE_WRITE: Final = 4096
# What a kernel says that knows no RWF_NOWAIT, or not for this kind of file (pipes: from 6.4).
_NOT_ASKED: Final = (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
# How long close() waits for the thread: it is then inside a write that nobody can interrupt.
_PATIENCE: Final = 1.0


class Printer:
    """Shows a group's output, in the order of `put`; `shown` is called on the printer's thread."""

    def __init__(self, name: str, shown: Callable[[int], None]) -> None:
        self._shown = shown
        self._queue: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        # Of what is put, and the mark behind it; a handler may close the group in the midst of it.
        self._order = threading.RLock()
        self._change = Bell()  # something was written
        self._put = 0
        self._done = 0
        self._written = 0  # bytes, also of what is not done yet
        self._closing = False
        self._marked: list[None] = []  # the mark that ends the thread is in the queue
        self._left = False  # nobody waits for the thread any more
        self._decoders = {
            stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (1, 2)
        }
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._owner = os.getpid()
        # Started here and not when it is needed: an interpreter that exits starts no thread. A
        # daemon, since what it waits for may never come.
        self._thread = Background(self._run, f"rankwise-{name}-logs")
        try:
            self._thread.start()
        except BaseException:
            os.close(self._wake)
            raise

    def put(self, stream: int, data: bytes) -> None:
        """Show `data` on stream 1 or 2. Never blocks; after close() it is thrown away."""
        with self._order:
            if self._closing:
                return
            self._put += len(data)
            # Under the lock, so that nothing can come behind close()'s mark.
            self._queue.put((stream, data))

    def drain(self, patience: float | None = None) -> bool:
        """Wait until all that was put is written; False once nothing got on for `patience` seconds.

        A reader that is slow but reads is waited for: what was printed is not ours to throw away.
        """
        target = self._put
        while self._done < target:
            before = self._written
            got_on = self._change.wait_for(
                lambda: self._done >= target or self._written > before,  # noqa: B023
                deadline(patience),
            )
            if not got_on:
                return False
        return True

    def close(self) -> None:
        """End the thread. What was put is still written as far as it can be without waiting.

        A thread that hangs inside a write (to a terminal that is stopped) is left behind: it is a
        daemon and holds nothing but itself.
        """
        if os.getpid() != self._owner:
            return  # a forked child has no such thread, and the lock may have been held
        with self._order:
            self._closing = True
            if not self._marked:
                os.eventfd_write(self._wake, 1)  # first: behind the mark the thread closes it
                # One C call puts the mark and notes it, so a signal handler finds both or neither.
                self._marked.extend(map(self._queue.put, (None,)))
        if not self._left:
            self._thread.join(deadline(_PATIENCE))
        self._left = True

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            stream, data = item
            # The user's stdout may be closed, or an object of his that raises. There is nowhere to
            # say so, and the lines that follow must still be acknowledged.
            with contextlib.suppress(Exception):
                self._show(stream, data)
            self._done += len(data)
            self._change.ring()
            with contextlib.suppress(Exception):
                self._shown(len(data))
        os.close(self._wake)

    def _show(self, stream: int, data: bytes) -> None:
        file = sys.stdout if stream == 1 else sys.stderr
        if file is None:
            return  # closed when the interpreter started; the number may be anything by now
        if _is_descriptor(file, stream):
            self._write(stream, data)
            return
        text = self._decoders[stream].decode(data)
        try:
            file.write(text)
        except UnicodeEncodeError:
            encoding = file.encoding
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        file.flush()

    def _write(self, fd: int, data: bytes) -> None:
        left = memoryview(data)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            while left:  # a file has no reader to wait for
                left = left[self._got_on(os.write(fd, left)) :]
        ask = True
        while left:
            try:
                if ask:
                    count = os.pwritev(fd, (left,), -1, os.RWF_NOWAIT)
                    left = left[self._got_on(count) :]
                    continue
                left = left[self._got_on(os.write(fd, left[:_ONE_WRITE])) :]
            except BlockingIOError:
                pass
            except OSError as error:
                if not ask or error.errno not in _NOT_ASKED:
                    raise
                ask = False
            if left and not self._writable(fd):
                return

    def _got_on(self, count: int) -> int:
        self._written += count
        self._change.ring()
        return count

    def _writable(self, fd: int) -> bool:
        """Wait until `fd` takes something; False if it does not and close() has been called:
        nobody reads, and nobody waits for it any more."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.register(self._wake, select.POLLIN)
        return fd in dict(poll.poll())


def _is_descriptor(file: TextIO, stream: int) -> bool:
    """Whether writing to `file` is writing to the descriptor `stream`."""
    try:
        return file.fileno() == stream
    except Exception:  # a notebook's stream has none, a user's own may lack the method
        return False


def use_color(stream: int = 1) -> bool:
    """Whether `stream` may be coloured: a terminal that can, and no NO_COLOR (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and os.isatty(stream)
