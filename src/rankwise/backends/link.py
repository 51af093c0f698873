"""The driver's end of a group's launcher: what it says, what it is told, and how it ends.

    launcher ==Spawned, Output, Told, Exited, Gone=> hear > pids, printer, Sockets.deaths, news
    send > keeper's flush ==Signal, Ask, Finish, Shown=> launcher
    Finish ==> SIGKILL to what is left, Gone ==> the launcher exits by itself, or is killed here,
                                                 or stays, warm, for the ranks of a restart

The control channel belongs to the keeper's thread: `hear`, `flush` and what they call run there;
`send`, `wait_for` and `end` are for any thread. `news` rings after every message.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

from rankwise import _procfs
from rankwise._background import Bell
from rankwise._calls import Garbled
from rankwise._deadline import clock, deadline
from rankwise._lifetime import wait_readable
from rankwise._messages import (
    Exited,
    Finish,
    Gone,
    Output,
    Preloaded,
    Shown,
    Spawned,
    SpawnFailed,
    Told,
)
from rankwise.errors import describe_exit
from rankwise.logs.show import Printer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise.backends.launching import Held, Started
    from rankwise.backends.local import LocalEngine

PATIENCE = 1.0  # seconds; a launcher that does not answer for so long is stopped, or gone


class LauncherLink:
    """One launcher, as its driver sees it. Its end is `end`, after which nothing of it is left."""

    def __init__(self, engine: LocalEngine, started: Started) -> None:
        self._engine = engine
        self.held = started.held
        self._control = started.held.control
        self.control_fd = self._control.fileno()
        self.launcher_pidfd = started.held.pidfd
        self.stay = engine.spec.restart is not None  # the launcher, when its ranks are gone
        self.warm: Held | None = None  # then it can be had here
        self._warm = False
        self.gone = False  # no rank is left, and none will be started
        self.news = Bell()
        self.printer = Printer(engine.name, self.shown)
        # When the launcher last said something, or was told to finish: its PATIENCE runs from here.
        self._heard = 0.0
        self._finishing: list[None] = []  # not empty once it was told to finish
        self._outbox: list[object] = []
        self._outer = engine.pump.outer
        self._outer.register(self.control_fd, 1)
        self._outer.register(self.launcher_pidfd, 1)

    # -- what it says: the keeper's thread ----------------------------------------------------

    def hear(self) -> None:
        """Deal with what the launcher has said, or with its end."""
        try:
            messages = self._control.receive()
            if not messages and wait_readable(self.launcher_pidfd, 0):
                # A process that was forked with its end of the channel may keep that open: no end
                # of file comes then. What it had said before it ended is there by now.
                messages = self._control.receive()
                if not messages:
                    raise EOFError("the launcher has ended")
        except (EOFError, ValueError, OSError) as error:
            self._lost(error)
            return
        self._heard = clock()
        engine = self._engine
        ranks = engine.ranks
        for message in messages:
            match message:
                case Spawned(rank, pid, starttime):
                    ranks.pids[rank] = pid
                    ranks.starttimes[rank] = starttime
                case Output(stream, data):
                    self.printer.put(stream, data)
                case Told():
                    engine.reports.heard(message)
                case Exited():
                    ranks.reports[message.rank] = message
                    engine.pump.sockets.deaths[message.rank] = message
                case SpawnFailed(rank, reason):
                    engine.break_group(Garbled(rank, f"could not be started: {reason}"))
                case Preloaded(seconds, refused):
                    self._preloaded(seconds, refused)
                case Gone(left, warm):
                    if left:
                        what = "%s: SIGKILL was sent, but the kernel still has processes %s"
                        engine.log(logging.ERROR, what, engine.name, left)
                    self._stop_hearing()
                    self._warm = warm
                    self.gone = True
        self.news.ring()

    def _preloaded(self, seconds: float, refused: str | None) -> None:
        engine = self._engine
        if refused is None:
            engine.log(
                logging.INFO, "%s: the launcher has preloaded in %.2f s", engine.name, seconds
            )
        else:
            engine.log(
                logging.WARNING, "%s: the ranks are spawned, not forked: %s", engine.name, refused
            )

    def _lost(self, reason: Exception) -> None:
        """The launcher has ended before it said Gone: the ranks have a SIGKILL from the kernel."""
        self._stop_hearing()
        try:
            orphans = self._kill_ranks()
            if not self._finishing:
                self._tell_lost(reason)
            _await_ends(orphans)
        finally:
            self.gone = True  # nobody will hear of it again
            self.news.ring()

    def _tell_lost(self, reason: Exception) -> None:
        # Its descriptors close before it ends.
        wait_readable(self.launcher_pidfd, 0.1)
        ended = describe_exit(self.held.exitcode())
        cause = f"its launcher (pid {self.held.process.pid}) {ended}"
        if not isinstance(reason, EOFError):
            cause += f" ({reason})"
        self._engine.break_group(Garbled(-1, cause))
        self._engine.pump.spread()

    def _stop_hearing(self) -> None:
        self._outer.unregister(self.control_fd)
        self._outer.unregister(self.launcher_pidfd)

    # -- what it is told ----------------------------------------------------------------------

    def send(self, message: object) -> None:
        """Have the keeper send `message`."""
        self._outbox.append(message)
        self._engine.pump.kick()

    def flush(self) -> None:
        """Send what is to be sent, as far as the channel takes it. The keeper's."""
        while self._outbox:
            self._control.send(self._outbox.pop(0))
        sent = self._control.flush()
        if not self.gone:
            self._outer.modify(self.control_fd, 1 if sent else 1 | 4)

    def shown(self, nbytes: int) -> None:
        """So many bytes of output are shown: the launcher may send more. From any thread."""
        if not self._engine.ending.closed:
            self.send(Shown(nbytes))

    def finish(self) -> None:
        """Have the launcher SIGKILL what is left, report and go. It is told once; again this only
        kicks the keeper, for one who was struck before he had."""
        now, put = clock(), map(self._outbox.append, (Finish(self.stay),))
        # Straight code up to the one C call that puts it and notes it: a signal handler, or another
        # thread, finds both or neither.
        if not self._finishing:
            self._heard = now
            self._finishing.extend(put)
        self._engine.pump.kick()

    # -- its end ------------------------------------------------------------------------------

    def wait_for(self, happened: Callable[[], bool], until: float | None) -> bool:
        """Wait until `happened()`, which is asked after every message, or the clock is `until`."""
        return self.news.wait_for(happened, until)

    def end(self) -> None:
        """Have the ranks and the launcher gone and reaped, by its own exit or by SIGKILL; but a
        warm launcher of an engine that is retired is left for who comes after it, as `warm`.

        What strikes it leaves it to be called again.
        """
        self.finish()
        while not self.gone and clock() < self._heard + PATIENCE:
            # It says Dying while the kernel still frees a rank's memory, some 30 ms a GB.
            self.wait_for(lambda: self.gone, self._heard + PATIENCE)
        if not self.gone:
            self._kill()
            self.wait_for(lambda: self.gone, deadline(PATIENCE))
        if self._warm:
            if self._engine.retired:
                self.warm = self.warm or self.held.hand_over()
                return
            self._kill()
        if self.held.exitcode() is None and not wait_readable(self.launcher_pidfd, PATIENCE):
            self._kill()
        self.held.exitcode(wait=True)

    def _kill(self) -> None:
        self.held.kill()
        if not self.gone:
            _await_ends(self._kill_ranks())

    def _kill_ranks(self) -> list[int]:
        """SIGKILL each rank's process group ourselves: the launcher cannot any more.

        Returns a pidfd of each rank that still ends. A driver that is out of descriptors sends the
        signal all the same.
        """
        orphans = []
        ranks = self._engine.ranks
        for rank, pid in list(ranks.pids.items()):
            try:
                process = _procfs.stat(pid)
            except OSError:
                if rank in ranks.reports:
                    continue  # the number may have gone to somebody else
                process = None
            if process is not None and process.starttime != ranks.starttimes[rank]:
                continue  # the number has gone to somebody else
            with suppress(OSError):
                orphans.append(os.pidfd_open(pid))
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return orphans

    def become_inert(self) -> None:
        """This is a forked child's copy, whose destructor would warn of a child not waited for."""
        self.held.process.returncode = 0


def _await_ends(pidfds: list[int]) -> None:
    """Wait for processes that nobody of ours can reap, and that may be watched; close `pidfds`."""
    for pidfd in pidfds:
        wait_readable(pidfd, PATIENCE)
        os.close(pidfd)
