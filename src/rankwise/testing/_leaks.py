"""What some code leaves behind, named piece by piece.

    before = take()  >  it runs  >  left = left_since(before)          `leak_check` is all of that

Guarantee 6 promises that nothing remains of a closed group: no process, descendant, thread,
descriptor or shared memory; guarantee 8 that the driver's environment and signal handlers stay as
they were. So each of these is written down before, and compared afterwards.

A process counts if it descends from this one or carries its mark: an orphan has lost its parents,
but not the mark (`Family`).
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rankwise.testing._processes import MARK, Family, Process, end, mark, open_files

__all__ = ["MARK", "Family", "Leaked", "Left", "Process", "State", "compare", "end", "leak_check",
           "left_since", "mark", "restore", "take"]  # fmt: skip

# What is on its way out may take so long: a finalizer, a thread that is between its last line and
# its end. Seconds.
SETTLING = 2.0

SIGNALS = tuple(sorted(signal.valid_signals()))

# pytest writes the name of the running test here.
NOT_OURS = frozenset({"PYTEST_CURRENT_TEST"})


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
        text = maps.read()
    # Nearly always there are none, and a process that has torch has a thousand other lines.
    if "/memfd:rankwise" not in text and "/dev/shm/" not in text:
        return set()
    lines = [line.split(maxsplit=5) for line in text.splitlines()]
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
            held |= paths & set(open_files(entry).values())
    return paths - (held_by_others - held_by_us)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_OURS}


def _handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in SIGNALS}


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
    """What there was at one moment. `surroundings`: with what guarantee 8 is about."""

    family: Family
    processes: list[Process]
    surroundings: bool = False
    threads: set[threading.Thread] = field(default_factory=_threads)
    descriptors: dict[int, str] = field(default_factory=lambda: open_files("self"))
    mappings: set[str] = field(default_factory=_mappings)
    shared_memory: set[str] = field(default_factory=_shared_memory)
    environment: dict[str, str] = field(default_factory=_environment)
    handlers: dict[int, object] = field(default_factory=_handlers)
    masks: dict[str, str] = field(default_factory=_masks)


def take(family: Family, *, surroundings: bool = False) -> State:
    """Write down what there is now, in this process and its `family`.

    surroundings: the environment, signal handlers and masks too.
    """
    return State(family, family.members(), surroundings)


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
        for fd, target in _new_descriptors(before.descriptors, open_files("self"))
    ]
    lines += [f"mapped memory {one}" for one in sorted(_mappings() - before.mappings)]
    lines += sorted(_not_strangers(_shared_memory() - before.shared_memory, before.family))
    if before.surroundings:
        lines += _changed("environment variable", before.environment, _environment())
        lines += _changed("handler of", before.handlers, _handlers(), _signal_name)
        lines += _changed("signal mask", before.masks, _masks())
    return Left(processes, lines)


def left_since(before: State, settling: float | None = None) -> Left:
    """As `compare`, but what is left must still be there after so many seconds (`SETTLING`)."""
    left = compare(before)
    until = time.monotonic() + (SETTLING if settling is None else settling)
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


class Leaked(AssertionError):
    """What `leak_check` raises: its message names each thing that was left."""


@contextmanager
def leak_check(*, settling: float = SETTLING) -> Iterator[None]:
    """Raises `Leaked` where something that the block has made is there still at its end.

    That is: a process (an orphan or a zombie, too), a thread of rankwise's, a descriptor, mapped
    memory of rankwise's, and what this user has in /dev/shm. settling: seconds that what is on its
    way out may take. Where the block raises, that is raised, and nothing is looked for.

    In the block the environment has the variable RANKWISE_TEST_SESSION, by which orphans are known.
    """
    family = Family(os.getpid(), frozenset(), "")
    inherited = os.environ.get(MARK)
    before = take(family)
    mark(os.environ)
    try:
        yield
    finally:
        if inherited is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = inherited
    left = left_since(before, settling)
    if left:
        raise Leaked(f"left behind:\n{left}")


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
