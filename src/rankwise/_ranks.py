"""What is known of each rank: its process, its page of the status memory, its end."""

from __future__ import annotations

import os
import time

from rankwise import _procfs
from rankwise._status import PHASE, PHASES, READY, RUNNING, SINCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._calls import Call
    from rankwise._ledger import Ledger
    from rankwise._messages import Exited
    from rankwise._status import StatusPage


class Ranks:
    """The ranks of one group. `pids` is empty where they are threads."""

    def __init__(self, world_size: int, status: StatusPage, *, threads: bool = False) -> None:
        self.world_size = world_size
        self._own_pid = os.getpid() if threads else 0
        self.pids: dict[int, int] = {}
        self.starttimes: dict[int, int] = {}
        self.reports: dict[int, Exited] = {}
        self._status: StatusPage | None = status

    def pid(self, rank: int) -> int:
        """The process id of `rank`: ours, where it is a thread; 0 where it was not started."""
        return self.pids.get(rank, self._own_pid)

    def alive(self) -> tuple[int, ...]:
        """The ranks that were started and whose end has not been reported."""
        return tuple(rank for rank in self.pids if rank not in self.reports)

    def exited(self, rank: int) -> bool:
        return rank in self.reports or self._status is None

    def word(self, rank: int, word: int) -> int:
        status = self._status
        try:
            return 0 if status is None else status.get(rank, word)
        except ValueError:
            return 0  # another thread has just closed the group

    def phase(self, rank: int) -> str:
        return PHASES[self.word(rank, PHASE)]

    def running(self, rank: int) -> int:
        """The id of the call that `rank` is in; 0: none."""
        return self.word(rank, RUNNING)

    def cancel(self, call: Call, ledger: Ledger) -> None:
        """Tell the ranks that owe `call` that it was cancelled. With the ledger's lock held."""
        if self._status is not None:
            for rank in ledger.to_be_told(call):
                self._status.cancel(rank, call.id)

    def cancel_all(self, ledger: Ledger) -> None:
        """As `cancel`, of every open call."""
        for call in list(ledger.open.values()):
            self.cancel(call, ledger)

    def state(self, rank: int, call_id: int | None = None) -> tuple[str, float]:
        """(what `rank` is doing, for how many seconds it has been in its call).

        "starting", "idle", "running", "stopped", "closing" or "dead"; with `call_id` also "queued":
        it has not begun that call.
        """
        if self.exited(rank):
            return "dead", 0.0
        running = self.word(rank, RUNNING)
        since = (time.monotonic_ns() - self.word(rank, SINCE)) / 1e9 if running else 0.0
        process = self.process(rank)
        if process is not None and process.state in "Tt":
            return "stopped", since
        if process is not None and process.state in "ZX":
            return "dead", 0.0
        phase = self.word(rank, PHASE)
        if phase != READY:
            return ("starting" if phase < READY else "closing"), 0.0
        if call_id is not None and running != call_id:
            return "queued", 0.0
        return ("running" if running else "idle"), since

    def process(self, rank: int) -> _procfs.ProcStat | None:
        """What the kernel says of it; None where it has no process, or no look can be had.

        This process may be out of descriptors, and a deadline is to be kept and told all the same.
        """
        try:
            return _procfs.stat(self.pids[rank]) if rank in self.pids else None
        except OSError:
            return None

    def memory(self, rank: int) -> int | None:
        """Resident memory in bytes; None where the rank has no process now, or it is not known."""
        process = self.process(rank)
        return None if process is None or self.exited(rank) else process.rss

    def forget_status(self) -> None:
        """The status memory is unmapped: from here on every rank has ended."""
        status, self._status = self._status, None
        if status is not None:
            try:
                status.close()
            except BufferError:
                pass  # a frame that a fork has frozen still looks at it
