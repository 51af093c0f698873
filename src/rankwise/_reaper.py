"""Ends: of one rank, with its report; and of everything, so that nothing is left.

    SIGCHLD > Reaper.reap > its process group killed > wait4 > report > its orphans killed
    Finish, or the driver's end > Reaper.end > every group killed > every descendant killed
                                     ^            > reap until there is no child: subreaper
                                     `--------------------------------'
A descendant whose parent ends becomes the launcher's child (PR_SET_CHILD_SUBREAPER), whatever
session or group it has made for itself; so "no child left" is "nothing left".
"""

from __future__ import annotations

import os

from rankwise import _procfs
from rankwise._deadline import clock
from rankwise._messages import Exited
from rankwise._spawn import SIGKILL

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Collection
    from typing import Final

    from rankwise._spawn import Child
else:
    import _signal

# How long nothing may end before what is left counts as out of the kernel's own reach (a driver or
# a network file system that hangs). Freeing memory takes 30 ms a GB.
PATIENCE: Final = 10.0
# How long in all, though some still end: descendants that fork faster than they are killed.
LIMIT: Final = 60.0
_CRASH_REPORT: Final = 1 << 18


class ChildSignal:
    """SIGCHLD as a descriptor: readable when a child may have ended. The one handler of ours."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def arm(self) -> None:
        # What is ignored came from the driver: the kernel would then reap the ranks itself, and
        # tell nobody how they ended. A handler of Python's is what makes it write to the pipe.
        _signal.signal(_signal.SIGCHLD, lambda number, frame: None)
        _signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._read

    def clear(self) -> None:
        try:
            while os.read(self._read, 4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """In a forked rank, which has left the handler behind already."""
        os.close(self._read)
        os.close(self._write)


class Reaper:
    """Knows the ranks that have not been reaped.

    last_words: called for a rank that has ended, to read what is still in its pipes.
    ended: called with its report.
    """

    def __init__(
        self, last_words: Callable[[Child], None], ended: Callable[[Child, Exited], None]
    ) -> None:
        self.alive: dict[int, Child] = {}  # by pid
        self._last_words = last_words
        self._ended = ended
        self._own: frozenset[int] = frozenset()
        self._oom_kills = _procfs.OomKills()
        self._oom_explained = self._oom_kills.count()
        self._oom_at_kill = False

    def spare_children(self) -> None:
        """The children of now (what a preloaded module has started) are nobody's orphans."""
        self._own = frozenset(_procfs.children(os.getpid()))

    def spared_none(self) -> bool:
        """Whether there were no such children."""
        return not self._own

    def reap(self, *, silent: bool = False) -> bool:
        """Reap one process that has ended, and report it if it was a rank; False if there is none.
        Raises ChildProcessError if no child is left. silent: call neither of our callers."""
        # Look first: until a rank is reaped, its number belongs to it and to its process group.
        # After that it may be given to a stranger, who would then get the SIGKILL.
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return False
        pid = found.si_pid
        child = self.alive.pop(pid, None)
        if child is None or silent:
            os.waitpid(pid, 0)
            return True
        _kill_group(pid)
        self._last_words(child)
        _, status, usage = os.wait4(pid, 0)
        exitcode = os.waitstatus_to_exitcode(status)
        report = Exited(
            rank=child.rank,
            pid=pid,
            exitcode=exitcode,
            peak_rss=usage.ru_maxrss * 1024,
            oom_killed=self._oom_killed(child) if exitcode == -SIGKILL else False,
            log_tail=child.tail.text(),
            stack=_crash_report(child),
        )
        self._ended(child, report)
        try:
            self._kill_orphans()  # after the report: callers wait for that, and nobody for these
        except (OSError, MemoryError):
            pass  # no descriptors, no memory: the next death looks again, and so does the end
        return True

    def signal(self, ranks: tuple[int, ...], number: int) -> None:
        """Send `number` to the process groups of those of `ranks` that have not been reaped."""
        chosen = [child for child in self.alive.values() if child.rank in ranks]
        if number == SIGKILL:
            self._note_kill(chosen)
        for child in chosen:
            try:
                os.killpg(child.pid, number)
            except OSError:
                pass  # no such signal; or it has ended: its report is on its way

    def end(self, wait: Callable[[], object], *, silent: bool = False) -> tuple[int, ...]:
        """SIGKILL every rank and descendant, and reap them. Returns the pids of those that the
        kernel does not let die.

        wait: sleeps until a child has ended, or for some milliseconds.
        """
        for pid in self.alive:
            _kill_group(pid)  # all of them before anything else is done about one
        if not silent:
            self._note_kill(self.alive.values())
        moved = began = clock()
        while True:
            _kill_descendants()
            try:
                while self.reap(silent=silent) and clock() - began < LIMIT:
                    moved = clock()
            except ChildProcessError:
                return ()
            if clock() - moved > PATIENCE or clock() - began > LIMIT:
                return tuple(_procfs.children(os.getpid()))
            wait()

    def _kill_orphans(self) -> None:
        """SIGKILL what a dead rank has left behind outside of its group: it may hold the device.

        It is our child by now, as are orphans of ranks that live; those are known by their process
        group or by the RANK that they have inherited.
        """
        groups = set(self.alive)
        living = {str(child.rank) for child in self.alive.values()}
        for pid in _procfs.children(os.getpid()):
            if pid in self.alive or pid in self._own:
                continue
            process = _procfs.stat(pid)
            if process is None or process.pgrp in groups or _rank_of(pid) in living:
                continue
            for descendant in (pid, *_procfs.descendants(pid)):
                _kill(descendant)

    def _note_kill(self, children: Collection[Child]) -> None:
        for child in children:
            child.killed = True
        self._oom_at_kill = self._oom_at_kill or self._oom_has_killed() is True

    def _oom_killed(self, child: Child) -> bool | None:
        """Whether a rank that ended by SIGKILL was killed for lack of memory; None: cannot tell."""
        if child.killed:
            # By us; unless the kernel was killing somebody just then, which may have been this one.
            return None if self._oom_at_kill else False
        killed = self._oom_has_killed()
        if killed and self._oom_explained is not None:
            self._oom_explained += 1  # each of the kernel's kills explains one death
        return killed

    def _oom_has_killed(self) -> bool | None:
        now, explained = self._oom_kills.count(), self._oom_explained
        return None if now is None or explained is None else now > explained


def _rank_of(pid: int) -> str | None:
    """The RANK in the environment with which a process was started."""
    for variable in (_procfs.read_text(f"/proc/{pid}/environ") or "").split("\0"):
        if variable.startswith("RANK="):
            return variable[5:]
    return None


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, SIGKILL)
    except OSError:
        pass  # just forked and not in it yet, or it has moved to another
    _kill(pid)


def _kill_descendants() -> None:
    # Out of descriptors, of memory: the next round has what the dead have given back.
    try:
        for pid in _procfs.descendants(os.getpid()):
            _kill(pid)
    except (OSError, MemoryError):
        pass


def _kill(pid: int) -> None:
    try:
        os.kill(pid, SIGKILL)
    except OSError:
        pass


def _crash_report(child: Child) -> str | None:
    """What faulthandler wrote for a rank that crashed."""
    try:
        text = os.pread(child.crash, _CRASH_REPORT, child.dumped)
    except OSError:
        return None
    # Before it there may be stacks that were asked for, and came too late or not in whole.
    _, begin, rest = text.partition(b"Fatal Python error")
    return (begin + rest).decode("utf-8", "replace") or None
