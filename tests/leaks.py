"""What a test leaves behind, named piece by piece. Standard library only: the watchdog needs it.

    before = take()  >  the test runs  >  left = left_since(before)

Guarantee 6 promises that nothing remains of a closed group: no process, descendant, thread,
descriptor or shared memory; guarantee 8 that the driver's environment and signal handlers stay as
they were. So each of these is written down before a test and compared after it.

A process belongs to this run of the tests if it descends from pytest or carries its mark: an orphan
has lost its parents, but not the mark (`Family`).
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MARK = "RANKWISE_TEST_SESSION"

# What is on its way out may take so long: a finalizer, a thread that is between its last line and
# its end. Seconds.
SETTLING = 2.0

# pytest writes the name of the running test here.
NOT_OURS = frozenset({"PYTEST_CURRENT_TEST"})


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
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may hold any byte, a parenthesis too.
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(name, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


# --- processes ------------------------------------------------------------------------------------


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
            seen = str(self.root) in _marks(pid) or self.pipe in _open_files(pid).values()
            _seen[self, process] = seen
        return seen


_seen: dict[tuple[Family, Process], bool] = {}


def _marks(pid: int) -> list[str]:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return []
    for entry in environ.split(b"\0"):
        if entry.startswith(MARK.encode() + b"="):
            return entry.decode(errors="replace").partition("=")[2].split("/")
    return []


def _open_files(pid: int | str) -> dict[int, str]:
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


# --- this process ---------------------------------------------------------------------------------


def _threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.lower().startswith("rankwise")}


def _new_descriptors(before: dict[int, str], now: dict[int, str]) -> list[tuple[int, str]]:
    """Those whose target is new. Anonymous ones (eventpoll, eventfd, pidfd) are told apart by their
    number alone, so of these only as many count as there are more of than before."""
    more = Counter(now.values()) - Counter(before.values())
    new = []
    for fd, target in sorted(now.items(), reverse=True):
        if more[target] > 0 and before.get(fd) != target:
            more[target] -= 1
            new.append((fd, target))
    return new[::-1]


def _mappings() -> set[str]:
    """Shared memory that is mapped here: memfds, and what has a name in /dev/shm."""
    with open("/proc/self/maps") as maps:
        lines = [line.split(maxsplit=5) for line in maps]
    return {
        f"{parts[0]} {parts[5].strip()}"
        for parts in lines
        if len(parts) == 6 and re.match(r"/memfd:rankwise|/dev/shm/", parts[5])
    }


def _shared_memory() -> set[str]:
    """The entries of /dev/shm that are this user's."""
    found: set[str] = set()
    if not os.path.isdir("/dev/shm"):
        return found
    with os.scandir("/dev/shm") as entries:
        for entry in entries:
            try:
                if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    found.add(entry.path)
            except FileNotFoundError:
                pass
    return found


def _not_strangers(paths: set[str], family: Family) -> set[str]:
    """`paths` without those that only processes outside `family` have mapped or open: another
    program of this user, or another run of the tests, may be busy in /dev/shm at the same time."""
    if not paths:
        return paths
    ours = {os.getpid(), *(process.pid for process in family.members())}
    held_by_us: set[str] = set()
    held_by_others: set[str] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            held = held_by_us if int(entry) in ours else held_by_others
            maps = Process(int(entry), 0).read("maps")
            held |= {path for path in paths if path in maps}
            held |= paths & set(_open_files(entry).values())
    return paths - (held_by_others - held_by_us)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_OURS}


def _handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _masks() -> dict[str, str]:
    """What the kernel blocks and ignores: C code can change that, and Python does not know."""
    with open("/proc/self/status") as status:
        pairs = [line.split() for line in status if line.startswith(("SigBlk:", "SigIgn:"))]
    # glibc keeps signals 32 and 33 to itself: its posix_spawn, which make uses, has a child ignore
    # them, and the first thread that the child makes installs a handler.
    return {name.rstrip(":"): f"{int(mask, 16) & ~(3 << 31):016x}" for name, mask in pairs}


# --- before and after -----------------------------------------------------------------------------


@dataclass
class State:
    """What there was at one moment."""

    family: Family
    processes: list[Process]
    threads: set[threading.Thread] = field(default_factory=_threads)
    descriptors: dict[int, str] = field(default_factory=lambda: _open_files("self"))
    mappings: set[str] = field(default_factory=_mappings)
    shared_memory: set[str] = field(default_factory=_shared_memory)
    environment: dict[str, str] = field(default_factory=_environment)
    handlers: dict[int, object] = field(default_factory=_handlers)
    masks: dict[str, str] = field(default_factory=_masks)


def take(family: Family) -> State:
    """Write down what there is now, in this process and its `family`."""
    return State(family, family.members())


@dataclass
class Left:
    """What one test left behind; false if it is nothing."""

    processes: list[Process]
    lines: list[str]

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        return "\n".join(f"  {line}" for line in self.lines)


def compare(before: State) -> Left:
    """What there is now that was not there `before`."""
    known = set(before.processes)
    processes = [one for one in before.family.members() if one not in known]
    lines = [str(process) for process in processes]
    lines += [f"thread {thread.name!r}{_where(thread)}" for thread in _threads() - before.threads]
    lines += [
        f"descriptor {fd}: {target}"
        for fd, target in _new_descriptors(before.descriptors, _open_files("self"))
    ]
    lines += [f"mapped memory {one}" for one in sorted(_mappings() - before.mappings)]
    lines += sorted(_not_strangers(_shared_memory() - before.shared_memory, before.family))
    lines += _changed("environment variable", before.environment, _environment())
    lines += _changed("handler of", before.handlers, _handlers(), _signal_name)
    lines += _changed("signal mask", before.masks, _masks())
    return Left(processes, lines)


def left_since(before: State) -> Left:
    """As `compare`, but what is left must still be there after `SETTLING` seconds."""
    left = compare(before)
    until = time.monotonic() + SETTLING
    pause = 0.001
    while left and time.monotonic() < until:
        gc.collect()
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        left = compare(before)
    return left


def restore(before: State, left: Left) -> None:
    """Make good what the next test would suffer from: processes, environment, signal handlers."""
    end(left.processes)
    now = _environment()
    for name in now.keys() - before.environment.keys():
        del os.environ[name]
    for name, value in before.environment.items():
        if now.get(name) != value:
            os.environ[name] = value
    for number, handler in before.handlers.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)  # type: ignore[arg-type]


def _changed(
    what: str, before: dict[Any, Any], now: dict[Any, Any], name: Callable[[Any], str] = str
) -> list[str]:
    lines = []
    for key in [*before, *(now.keys() - before.keys())]:
        if before.get(key) != now.get(key):
            was, new = (repr(one[key]) if key in one else "not set" for one in (before, now))
            lines.append(f"{what} {name(key)}: was {was}, now {new}")
    return lines


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    code = frame.f_code
    return f", in {code.co_name} ({code.co_filename}:{frame.f_lineno})"
