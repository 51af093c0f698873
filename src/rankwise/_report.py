"""What the ranks that owe an answer are doing, as it stands in CallTimeout and in the log.

    status pages, /proc > look > RankReport < hear < the launcher's Told
                                   `> line: rank 3: pid 4127, running load() for 29.8 s,
                                                    in shard.py:88 all_reduce; last line: "x"

`look` never blocks, and comes before the launcher is asked: C code in `sleep` may return early from
the signal at which a rank writes its stack, and the rank would be seen idle after it.
"""

from __future__ import annotations

import sys

from rankwise._calls import Expired, Stuck
from rankwise._deadline import clock
from rankwise._messages import Told
from rankwise._stacks import place
from rankwise.logs.lines import last_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rankwise._calls import Call
    from rankwise._cpu import CpuUse
    from rankwise._engine import Engine

# What the kernel's letters mean to somebody who asks why a rank does not answer.
_PROCESS = {"R": "runnable", "S": "asleep", "D": "asleep in the kernel (D)"}


class RankReport:
    """One rank at one moment.

    state: as in RankHealth. process: the kernel's letter for it, "" where it has none of its own.
    running, seconds: the id of the call that it is in (0: none), and for how long.
    method: that call's; where it is in none, that of the oldest call that it owes.
    cpu: how many cores it keeps busy; None where that is not known.
    stack, reason: its Python stacks, or why there are none; both None where nobody asked.
    """

    __slots__ = (
        "cpu", "last_line", "method", "phase", "pid", "process", "rank", "reason", "running",
        "seconds", "stack", "state",
    )  # fmt: skip

    def __init__(
        self,
        rank: int,
        pid: int,
        state: str,
        *,
        phase: str = "ready",
        process: str = "",
        running: int = 0,
        seconds: float = 0.0,
        method: str | None = None,
        cpu: float | None = None,
        stack: str | None = None,
        reason: str | None = None,
        last_line: str = "",
    ) -> None:
        self.rank = rank
        self.pid = pid
        self.state = state
        self.phase = phase
        self.process = process
        self.running = running
        self.seconds = seconds
        self.method = method
        self.cpu = cpu
        self.stack = stack
        self.reason = reason
        self.last_line = last_line

    def hear(self, told: Told) -> None:
        """What the launcher says of it."""
        self.stack, self.reason = told.stack, told.reason
        self.last_line = told.last_line or self.last_line

    def state_in(self, call: Call) -> str:
        """Its state as `call` sees it: "queued" where it is not in that call."""
        if self.state in ("running", "idle") and self.running != call.id:
            return "queued"
        return "queued" if self.state == "idle" else self.state

    def seconds_in(self, call: Call) -> float:
        """Seconds that it has been in `call`; 0.0 where it is not."""
        return self.seconds if self.running == call.id else 0.0

    def line(self, call: Call) -> str:
        """One line on it, as whoever waits for `call` wants to know it."""
        parts = [f"rank {self.rank}: pid {self.pid}, {self._doing(call)}"]
        where = place(self.stack)
        if where:
            parts.append(f", in {where}")
        elif self.reason is not None and self.state not in ("dead", "stopped"):
            parts.append(f", no stack ({self.reason})")
        if self.last_line:
            parts.append(f'; last line: "{self.last_line}"')
        if self.state not in ("dead", "stopped") and self.process in _PROCESS:
            parts.append(f"; {_PROCESS[self.process]}")
            if self.cpu is not None:
                parts.append(f", {self.cpu:.0%} CPU")
        return "".join(parts)

    def _doing(self, call: Call) -> str:
        state = self.state_in(call)
        seconds = f" for {self.seconds:.1f} s"
        if state == "running":
            return f"running {call.method}(){seconds}"
        if state == "queued" and self.running and self.method is not None:
            return f"queued behind {self.method}(), running{seconds}"
        if state == "queued" and self.method is not None and self.method != call.method:
            return f"queued behind {self.method}()"
        if state == "stopped" and self.running:
            name = call.method if self.running == call.id else self.method
            return f"stopped in {name}(){seconds}" if name else "stopped"
        return self.phase if state == "starting" else state


def look(
    engine: Engine,
    ranks: Iterable[int],
    cpu: CpuUse | None = None,
) -> dict[int, RankReport]:
    """What each of `ranks` is doing now; its stack is not asked for."""
    known = engine.ranks
    owed = engine.owed()
    now = clock()
    reports = {}
    for rank in ranks:
        pid = known.pid(rank)
        state, seconds = known.state(rank)
        process = known.process(rank) if state != "dead" else None
        running = known.running(rank) if state in ("running", "stopped") else 0
        call = owed.get(rank)
        if state == "running" and (call is None or call.id != running):
            state, running, seconds = "idle", 0, 0.0  # it has answered a moment ago
        method = call.method if call is not None and (not running or call.id == running) else None
        ended = known.reports.get(rank)
        reports[rank] = RankReport(
            rank,
            pid,
            state,
            phase=known.phase(rank),
            process="" if process is None else process.state,
            running=running,
            seconds=seconds,
            method=method,
            cpu=None if cpu is None or process is None else cpu.share(pid, now),
            last_line="" if ended is None else last_line(ended.log_tail),
        )
    return reports


def overdue_ranks(call: Call) -> tuple[int, ...]:
    """The ranks that had not answered `call` at its deadline, or when its grace was over."""
    if call.stuck is not None:
        return call.stuck.missing
    return call.error.missing if isinstance(call.error, Expired) else ()


def give_reports(call: Call, reports: dict[int, RankReport] | None) -> None:
    """Keep with `call` what its `overdue_ranks` were doing, for the error that tells it."""
    if reports is not None:
        for why in (call.error, call.stuck):
            if isinstance(why, (Expired, Stuck)) and reports.keys() >= set(why.missing):
                why.reports = why.reports or reports


def thread_stacks(threads: Mapping[int, int | None]) -> dict[int, Told]:
    """The stacks of ranks that are `threads` of this process (rank -> its ident), as a launcher
    would tell them."""
    frames = sys._current_frames()
    told = {}
    for rank, ident in threads.items():
        frame = frames.get(ident or 0)
        lines = []
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
        header = "Stack (most recent call first):"
        stack = "\n".join((header, *lines, "")) if lines else None
        told[rank] = Told(0, rank, stack, None if lines else "its thread has ended", "")
    return told
