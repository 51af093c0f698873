"""Python stacks of ranks, at the driver's word and without a rank's help.

    Ask > Dumps.ask > Dump: STACK_SIGNAL > faulthandler, in the rank's handler > its crash memfd
    Told <--------- Dumps.look: the handler has returned, or `PATIENCE` is over <---'

faulthandler writes from the signal handler, in C and without the GIL: also while C code holds it.
It writes the threads newest first, so the main one comes last; but what stands in the file cannot
tell that the last line has been written. The kernel can. A handler runs with its own signal
blocked, so the dump is complete when

    something was written, and the signal is neither pending nor blocked by any thread that did not
    block it before

in that order of looking: what was written proves that the handler has begun. (Between taking a
signal and blocking it the kernel shows neither; but nothing is written then.)

One dump a rank at a time: who asks meanwhile gets the same. One signal at most is pending: a rank
that blocks it, or is starved, would get a queue of them. The file's position only grows and
belongs to the rank; `Child.dumped` is how far it has been read, so a crash report begins after it.
"""

from __future__ import annotations

import os
from contextlib import suppress

from rankwise import _procfs
from rankwise._deadline import clock
from rankwise._messages import STACK_SIGNAL, Told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Final

    from rankwise._messages import Ask
    from rankwise._spawn import Child

PATIENCE: Final = 0.1  # seconds from the signal to the last word
LOOK: Final = 1.0  # milliseconds between two looks, while somebody waits
# More than a hundred threads of a hundred frames, which is where faulthandler stops; a file that
# has grown beyond it is emptied.
_LONGEST: Final = 1 << 20
_BIT: Final = 1 << (STACK_SIGNAL - 1)


class Dumps:
    """The questions that are open. `say` sends an answer."""

    def __init__(self, say: Callable[[Told], object]) -> None:
        self._say = say
        self._open: dict[Child, Dump] = {}

    def ask(self, ask: Ask, alive: Iterable[Child]) -> None:
        """Begin to answer: `alive` are the ranks that have not been reaped."""
        children = {child.rank: child for child in alive}
        fresh = []
        for rank in ask.ranks:
            child = children.get(rank)
            if child is None:
                self._say(Told(ask.number, rank, None, "it has no process", ""))
            elif not ask.stacks:
                self._say(Told(ask.number, rank, None, None, child.tail.last_line()))
            elif child in self._open:
                self._open[child].askers.append(ask.number)
            else:
                self._open[child] = dump = Dump(child, ask.number)
                fresh.append(dump)
        for step in (Dump.prepare, Dump.send):  # so that all ranks are asked at almost one moment
            for dump in fresh:
                _try(step, dump)
        self.look()

    def look(self) -> None:
        """Answer what can be answered now."""
        for child, dump in list(self._open.items()):
            _try(Dump.look, dump)
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
        if dump.stack is None:
            child.blocking = dump.blocking
        line = child.tail.last_line()
        for number in dump.askers:
            self._say(Told(number, child.rank, dump.stack, dump.reason, line))


def _try(step: Callable[[Dump], object], dump: Dump) -> None:
    try:
        step(dump)
    except OSError as error:  # no descriptors, no memory: no reason for the launcher to end
        dump.reason = f"the launcher cannot look: {error}"


class Dump:
    """One rank's, from the signal to its outcome: `stack`, or the `reason` why there is none."""

    __slots__ = ("_child", "_start", "_until", "askers", "blocking", "reason", "stack")

    def __init__(self, child: Child, asker: int) -> None:
        self.askers = [asker]
        self.stack: str | None = None
        self.reason: str | None = None
        self.blocking: set[str] | None = None  # threads that block the signal by themselves
        self._child = child
        self._start = 0
        self._until = clock() + PATIENCE

    def prepare(self) -> None:
        child = self._child
        self._start = max(os.fstat(child.crash).st_size, child.dumped)
        self.blocking = _blocking(child.pid)
        if child.blocking is not None:
            # The last dump may still be under way: who did not block it then is in the handler.
            self.blocking &= child.blocking
            child.blocking = None

    def send(self) -> None:
        """Send the signal, unless there is a `reason` not to."""
        pid = self._child.pid
        masks = _masks(pid)
        if masks is None or masks.state in "ZX":
            self.reason = "it has ended"
        elif masks.state in "Tt":
            self.reason = _STOPPED
        elif not masks.caught:  # it would not be heard; before it is armed, it would kill
            self.reason = f"it does not listen to signal {STACK_SIGNAL} (yet, or not any more)"
        elif not self._writes_to_us():
            self.reason = "the descriptor that its stacks go to was closed"
        elif self.reason is None and not masks.pending:
            # We are its parent and have not reaped it: the number is nobody else's.
            os.kill(pid, STACK_SIGNAL)

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

    def look(self) -> None:
        """Find out whether it has come to an end."""
        if self.reason is not None:
            return
        written = os.fstat(self._child.crash).st_size > self._start
        masks = _masks(self._child.pid)
        if masks is None or masks.state in "ZX":
            self.reason = "it has ended"
        elif written and not masks.pending and self._handled(masks):
            self._read()
        elif clock() >= self._until:
            self.reason = self._why_not(masks, written)

    def _handled(self, masks: Masks) -> bool:
        """Whether the handler, which has begun, has returned: in whichever thread it was."""
        pid, blocking = self._child.pid, self.blocking or ()
        if masks.blocked and str(pid) not in blocking:
            return False  # mostly: the kernel gives a signal to the main thread, if that takes it
        return _blocking(pid).issubset(blocking)

    def _read(self) -> None:
        child = self._child
        end = os.fstat(child.crash).st_size
        start = max(self._start, end - _LONGEST)
        self.stack = os.pread(child.crash, end - start, start).decode("utf-8", "replace")
        child.dumped = end
        if end > _LONGEST:
            # The position, which is the rank's, stays where it is: before it there is a hole then.
            os.ftruncate(child.crash, 0)

    def _why_not(self, masks: Masks, written: bool) -> str:
        limit = f"{PATIENCE * 1000:.0f} ms"
        if masks.state in "Tt":
            return _STOPPED
        if written:
            why = f"it was still writing them after {limit}"
        elif masks.state == "D":
            why = "it is in the kernel, which lets it take no signal (state D)"
        elif not masks.pending:
            why = f"it took signal {STACK_SIGNAL} and wrote nothing in {limit}"
        elif masks.blocked:
            why = f"it blocked signal {STACK_SIGNAL} for {limit}"
        else:
            why = f"it did not get to take signal {STACK_SIGNAL} in {limit}"
        channel = _procfs.wchan(self._child.pid) if masks.state in "SD" else None
        return f"{why}, asleep in {channel}" if channel else why


_STOPPED: Final = "it is stopped"


class Masks:
    """What the kernel says of a process, its main thread, and STACK_SIGNAL."""

    __slots__ = ("blocked", "caught", "pending", "state")

    def __init__(self, text: str) -> None:
        self.state = _field(text, "State")[:1]
        # Of the thread, of the process.
        self.pending = bool((_mask(text, "SigPnd") | _mask(text, "ShdPnd")) & _BIT)
        self.blocked = bool(_mask(text, "SigBlk") & _BIT)
        self.caught = bool(_mask(text, "SigCgt") & _BIT)


def _masks(pid: int) -> Masks | None:
    text = _procfs.read_text(f"/proc/{pid}/status")
    return Masks(text) if text else None


def _blocking(pid: int) -> set[str]:
    """The threads of `pid` that block the signal; a handler of it blocks it while it runs."""
    threads: list[str] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        threads = os.listdir(f"/proc/{pid}/task")
    found = set()
    for thread in threads:
        text = _procfs.read_text(f"/proc/{pid}/task/{thread}/status")
        if text and _mask(text, "SigBlk") & _BIT:
            found.add(thread)
    return found


def _mask(text: str, key: str) -> int:
    return int(_field(text, key) or "0", 16)


def _field(text: str, key: str) -> str:
    # From the second line on: the first is a name that the process chose.
    return text.partition(f"\n{key}:")[2].partition("\n")[0].strip()
