"""Python stacks of ranks, at the driver's word and without a rank's help.

    Ask > Dumps.ask > Dump: STACKS_SIGNAL > Python runs our handler: all threads, then DUMPED
    Told < Dumps.look         ten milliseconds, and it has not, though it had the CPU
                              STACK_SIGNAL > faulthandler writes the main thread, in C

Both go to the rank's main thread alone and write to its crash memfd. The first is handled by
Python code, at the next bytecode and with the GIL: nothing changes while it writes. Code that holds
the GIL, or waits in C, never comes to a bytecode. That is what the second is for, and why it is
safe then: faulthandler walks the frames from a C signal handler, with or without the GIL, and a
thread that is in C code does not change its own. It shows the main thread only. To have it walk
those of other threads while they run Python kills the process: some thirty such dumps did, where
threads came and went (CPython 3.11), and the main thread's own one in 24,000, in the same busy
code. Also it stops at a hundred threads, the newest first, and the main one would be the last.

When is a dump whole? The first says so. For the second the kernel does: a handler runs with its own
signal blocked, so it has returned if something was written and the signal is neither pending nor
blocked, asked in that order. (Between taking a signal and blocking it the kernel shows neither; but
nothing is written then.)

One dump a rank at a time: who asks meanwhile gets the same. No signal is sent while one is pending:
a rank that blocks it, or gets no CPU, would have a queue of them. What comes late is left behind by
the next `_start`. The file's position is the rank's and only grows; `Child.dumped` says how far it
has been read, so a crash report begins after it.
"""

from __future__ import annotations

import os
from _ctypes import call_function, dlopen, dlsym  # `ctypes` itself takes 2 ms

from rankwise import _procfs
from rankwise._deadline import clock
from rankwise._messages import DUMPED, STACK_SIGNAL, STACKS_SIGNAL, Told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Final

    from rankwise._messages import Ask
    from rankwise._spawn import Child

PATIENCE: Final = 0.1  # seconds from the first signal to the last word
PYTHON_PATIENCE: Final = 0.01  # seconds that Python has to come to its handler
_ON_CPU: Final = 2_000_000  # nanoseconds that it must have run in them, if it does not sleep
LOOK: Final = 1.0  # milliseconds between two looks, while somebody waits
_LONGEST: Final = 1 << 20  # bytes of one dump, a hundred threads; a longer file is emptied
_TGKILL: Final = {"x86_64": 234, "aarch64": 131}.get(os.uname().machine, 234)
_SIGNALS: Final = f"signals {STACKS_SIGNAL} and {STACK_SIGNAL}"
_STOPPED: Final = "it is stopped"

_syscall = dlsym(dlopen(None, 0), "syscall")  # type: ignore[arg-type]


class Dumps:
    """The questions that are open. `say` sends an answer."""

    def __init__(self, say: Callable[[Told], object]) -> None:
        self._say = say
        self._open: dict[Child, Dump] = {}

    def ask(self, ask: Ask, alive: Iterable[Child]) -> None:
        """Begin to answer: `alive` are the ranks that have not been reaped."""
        children = {child.rank: child for child in alive}
        for rank in ask.ranks:
            child = children.get(rank)
            if child is None:
                self._say(Told(ask.number, rank, None, "it has no process", ""))
            elif not ask.stacks:
                self._say(Told(ask.number, rank, None, None, child.tail.last_line()))
            elif child in self._open:
                self._open[child].askers.append(ask.number)
            else:
                self._open[child] = Dump(child, ask.number)
        self.look()

    def look(self) -> None:
        """Answer what can be answered now."""
        for child, dump in list(self._open.items()):
            try:
                dump.look()
            except OSError as error:  # no descriptors, no memory: no reason for us to end
                dump.reason = f"the launcher cannot look: {error}"
            if dump.reason is not None or dump.stack is not None:
                self._answer(child)

    def ended(self, child: Child) -> None:
        """The process of `child` has been reaped; its descriptors are about to be closed."""
        if child in self._open:
            self._open[child].reason = "it has ended"
            self._answer(child)

    def timeout(self) -> float | None:
        """Milliseconds to the next look; None: no question is open."""
        return LOOK if self._open else None

    def _answer(self, child: Child) -> None:
        dump = self._open.pop(child)
        line = child.tail.last_line()
        for number in dump.askers:
            self._say(Told(number, child.rank, dump.stack, dump.reason, line))


class Dump:
    """One rank's, from the first signal to its outcome: `stack`, or the `reason` why not."""

    __slots__ = ("_child", "_on_cpu", "_sent", "_start", "_step", "_until", "askers",
                 "reason", "stack")  # fmt: skip

    def __init__(self, child: Child, asker: int) -> None:
        self.askers = [asker]
        self.stack: str | None = None
        self.reason: str | None = None
        self._child = child
        self._step = 0  # the signals that were sent: none, the first, both
        self._start = 0  # where in the file what is asked for begins
        self._sent = clock()
        self._until = self._sent + PATIENCE
        self._on_cpu = 0

    def look(self) -> None:
        """Take the next step, if it is time, or find out whether this is the end."""
        now = clock()
        masks = _masks(self._child.pid)
        if masks is None or masks.state in "ZX":
            self.reason = "it has ended"
        elif masks.state in "Tt":
            self.reason = _STOPPED
        elif not self._step:
            self._begin(masks)
        elif self._whole(masks):
            self._read()
        elif now >= self._until:
            self.reason = self._why_not(masks)
        elif self._step == 1 and now >= self._sent + PYTHON_PATIENCE and self._in_c(masks):
            self._step = 2
            if STACK_SIGNAL in masks.caught - masks.pending:
                self._send(STACK_SIGNAL)

    def _begin(self, masks: Masks) -> None:
        self._step = 1
        self._start = self._size()
        self._on_cpu = _on_cpu(self._child.pid)
        if not masks.caught:  # neither would be heard; before they are armed, they would kill
            self.reason = f"it does not listen to {_SIGNALS} (yet, or not any more)"
        elif not self._writes_to_us():
            self.reason = "the descriptor that its stacks go to was closed"
        elif STACKS_SIGNAL in masks.caught - masks.pending:
            self._send(STACKS_SIGNAL)

    def _send(self, number: int) -> None:
        # To the main thread: none other is to be woken. The number is nobody else's: we are its
        # parent, and have not reaped it.
        pid = self._child.pid
        call_function(_syscall, (_TGKILL, pid, pid, number))

    def _in_c(self, masks: Masks) -> bool:
        """Whether the main thread has taken the first signal and goes on in C code."""
        if STACKS_SIGNAL in masks.pending or self._size() > self._start:
            return False
        # One that got no CPU is perhaps between two bytecodes: it will come to the handler.
        return masks.state in "SD" or _on_cpu(self._child.pid) >= self._on_cpu + _ON_CPU

    def _whole(self, masks: Masks) -> bool:
        size = self._size()
        if size <= self._start:
            return False
        end = max(self._start, size - len(DUMPED))
        if os.pread(self._child.crash, len(DUMPED), end) == DUMPED:
            return True
        if self._step == 1:
            return False
        masks = _masks(self._child.pid) or masks  # after the look at what was written
        return STACK_SIGNAL not in masks.pending | masks.blocked

    def _read(self) -> None:
        child = self._child
        end = self._size()
        start = max(self._start, end - _LONGEST)
        text = os.pread(child.crash, end - start, start).decode("utf-8", "replace")
        # What came late, of an earlier question, stands before it.
        whole = text.removesuffix(DUMPED.decode()).rpartition(DUMPED.decode())[2]
        lines = whole.splitlines(keepends=True)
        if any(line.startswith(_MAIN) for line in lines):
            self.stack = "".join(line for line in lines if not line.endswith(_HANDLER))
        else:
            self._start = end  # the rest of one that an earlier question was not waiting for
        child.dumped = end
        if end > _LONGEST:
            # The position, which is the rank's, stays where it is: before it there is a hole then.
            os.ftruncate(child.crash, 0)

    def _size(self) -> int:
        return max(os.fstat(self._child.crash).st_size, self._child.dumped)

    def _writes_to_us(self) -> bool:
        """Whether its descriptor is the memfd still: what has the number now may be its data."""
        try:
            # The rank has it under our own number, from before the fork.
            path = os.readlink(f"/proc/{self._child.pid}/fd/{self._child.crash}")
        except FileNotFoundError:
            return False
        except OSError:
            return True  # we may not look
        return path.startswith("/memfd:rankwise-crash")

    def _why_not(self, masks: Masks) -> str:
        limit = f"{PATIENCE * 1000:.0f} ms"
        if self._size() > self._start:
            why = f"it was still writing them after {limit}"
        elif masks.state == "D":
            why = "it is in the kernel, which lets it take no signal (state D)"
        elif not masks.pending:
            why = f"it took {_SIGNALS} and wrote nothing in {limit}"
        elif masks.pending <= masks.blocked:
            why = f"it blocked {_SIGNALS} for {limit}"
        else:
            why = f"it did not get to take {_SIGNALS} in {limit}"
        channel = _procfs.wchan(self._child.pid) if masks.state in "SD" else None
        return f"{why}, asleep in {channel}" if channel else why


_MAIN: Final = ("Current thread 0x", "Stack (most recent")  # how faulthandler heads the main thread
_HANDLER: Final = " in _write_stacks\n"  # the function in `_worker` that writes them


class Masks:
    """What the kernel says of a process and of its main thread: its state, one letter, and which of
    our two signals are pending, blocked, and caught by a handler."""

    __slots__ = ("blocked", "caught", "pending", "state")

    def __init__(self, text: str) -> None:
        self.state = _field(text, "State")[:1]
        self.pending = _signals(text, "SigPnd") | _signals(text, "ShdPnd")  # of thread, of process
        self.blocked = _signals(text, "SigBlk")
        self.caught = _signals(text, "SigCgt")


def _masks(pid: int) -> Masks | None:
    text = _procfs.read_text(f"/proc/{pid}/status")
    return Masks(text) if text else None


def _signals(text: str, key: str) -> set[int]:
    mask = int(_field(text, key) or "0", 16)
    return {number for number in (STACKS_SIGNAL, STACK_SIGNAL) if mask >> (number - 1) & 1}


def _field(text: str, key: str) -> str:
    # From the second line on: the first is a name that the process chose.
    return text.partition(f"\n{key}:")[2].partition("\n")[0].strip()


def _on_cpu(pid: int) -> int:
    """Nanoseconds that the main thread has run; a kernel that does not count them says 0, always,
    and such a rank is asked once more only while it sleeps."""
    try:
        return _procfs.read_integers(f"/proc/{pid}/schedstat")[0] or 0
    except IndexError:
        pass
    return 0
