"""Which processes belong to this one: its descendants, and orphans that carry its mark.

Standard library only, and nothing of rankwise's own: a watchdog of tests can use it by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import NamedTuple

MARK = "RANKWISE_TEST_SESSION"


class Process(NamedTuple):
    """One process, as /proc has it. A pid comes again; a pid with its start time does not."""

    pid: int
    started: int  # clock ticks since boot

    def read(self, name: str) -> str:
        """The file /proc/PID/`name`, or why it cannot be read."""
        try:
            return Path(f"/proc/{self.pid}/{name}").read_bytes().decode(errors="replace")
        except OSError as error:
            return f"({error.strerror})"

    def lives(self) -> bool:
        """Whether it is there still, as a zombie at least."""
        stat = _stat(self.pid)
        return stat is not None and stat.started == self.started

    def __str__(self) -> str:
        stat = _stat(self.pid)
        if stat is None or stat.started != self.started:
            return f"process {self.pid}, gone by now"
        command = " ".join(self.read("cmdline").replace("\0", " ").split()) or f"[{stat.name}]"
        return (
            f"process {self.pid} (state {stat.state}, parent {stat.parent}, session {stat.session})"
            f": {command[:200]}"
        )


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    session: int
    started: int


def _stat(pid: int) -> _Stat | None:
    text = _read(pid, "stat")
    if text is None:
        return None
    # The name stands in parentheses and may hold any byte, a parenthesis too.
    end = text.rindex(b")")
    fields = text[end + 2 :].split(None, 20)
    name = text[text.index(b"(") + 1 : end].decode(errors="replace")
    state = fields[0].decode()
    return _Stat(name, state, int(fields[1]), int(fields[3]), int(fields[19]))


def _read(pid: int, name: str) -> bytes | None:
    """The first 4 KB of /proc/PID/`name`; None where the process has gone. By system calls alone:
    a look at every process is taken twice a test."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)


def mark(environ: MutableMapping[str, str]) -> None:
    """Put this process's mark into `environ`, beside those of the runs that it is part of."""
    pid = str(os.getpid())
    marks = environ.get(MARK, "").split("/")
    environ[MARK] = "/".join([*(one for one in marks if one and one != pid), pid])


class Family(NamedTuple):
    """The descendants of process `root`, and those who left the tree and still carry its mark: what
    was started has it in its environment, what was only forked holds the root's end of `pipe`."""

    root: int
    ours: frozenset[int]  # pids of the tests' own machinery, which do not count
    pipe: str  # as /proc/PID/fd shows it

    def members(self) -> list[Process]:
        """All that live now, zombies too (somebody owes them a wait), without the root itself."""
        stats = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (stat := _stat(int(entry))) is not None:
                stats[int(entry)] = stat
        began = stats[self.root].started if self.root in stats else 0
        children: dict[int, list[int]] = {}
        found = {self.root}
        for pid, stat in stats.items():
            children.setdefault(stat.parent, []).append(pid)
            if stat.started >= began and self._is_marked(Process(pid, stat.started)):
                found.add(pid)
        new = list(found)
        while new:
            for child in children.get(new.pop(), ()):
                if child not in found:
                    found.add(child)
                    new.append(child)
        found -= {self.root, *self.ours}
        return [Process(pid, stats[pid].started) for pid in sorted(found) if pid in stats]

    def _is_marked(self, process: Process) -> bool:
        # Once seen, for good: nobody comes by the mark later, and whoever drops it was ours.
        seen = _seen.get((self, process))
        if seen is None:
            pid = process.pid
            marks = _marks(pid)
            seen = str(self.root) in (marks or ()) or (
                bool(self.pipe) and self.pipe in open_files(pid).values()
            )
            if seen or marks is not None:  # in the middle of an exec it has no environment
                _seen[self, process] = seen
        return seen


_seen: dict[tuple[Family, Process], bool] = {}


def _marks(pid: int) -> list[str] | None:
    """The marks in its environment; None where it shows none."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    if not environ:
        return None
    for entry in environ.split(b"\0"):
        if entry.startswith(MARK.encode() + b"="):
            return entry.decode(errors="replace").partition("=")[2].split("/")
    return []


def open_files(pid: int | str) -> dict[int, str]:
    found = {}
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            try:
                found[int(entry)] = os.readlink(f"/proc/{pid}/fd/{entry}")
            except OSError:
                pass  # closed meanwhile: in our own case, the descriptor of this very listing
    except OSError:
        pass
    return found


def end(processes: Iterable[Process]) -> None:
    """SIGKILL `processes`, and wait for those that are our own children."""
    for process in processes:
        stat = _stat(process.pid)
        if stat is None or stat.started != process.started:
            continue
        try:
            os.kill(process.pid, signal.SIGKILL)
            if stat.parent == os.getpid():
                os.waitpid(process.pid, 0)
        except (ProcessLookupError, ChildProcessError, PermissionError):
            pass
