"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

from faulty import RANK
from kernel import exhaust_descriptors


class Worker:
    def parent(self) -> int:
        return os.getppid()

    def echo(self, value: Any) -> Any:
        return value

    def give(self, what: str) -> Any:
        if what == "unpicklable":
            return open("/dev/null")
        if what == "unrebuildable":
            return Unrebuildable()
        raise NeedsTwo("one", "two")

    def want(self, what: str) -> Any:
        return want(what)

    def wanting(self, what: str) -> Any:
        return Wanting(what)

    def exhaust_descriptors(self) -> None:
        self.taken = exhaust_descriptors()

    def release_descriptors(self) -> None:
        for fd in self.taken:
            os.close(fd)

    def print_much(self, nbytes: int) -> int:
        print("x" * nbytes, flush=True)
        return nbytes


class WantsAtStart(Worker):
    def __init__(self, what: str) -> None:
        want(what)


class Prints(Worker):
    """Prints more than any pipe holds when it is made, and when it is told to leave."""

    def __init__(self) -> None:
        self.print_much(1 << 20)

    def __enter__(self) -> Prints:
        return self

    def __exit__(self, *error: object) -> None:
        self.print_much(1 << 20)


class ExhaustsDescriptors(Worker):
    """Has none left from its construction on."""

    def __init__(self) -> None:
        self.exhaust_descriptors()


class KillsItsLauncher(Worker):
    """When it is made or told to leave, and is rank 1."""

    def __init__(self, stage: str, bomb: object = None) -> None:
        self.stage = stage
        if stage == "construct":
            _kill_launcher()

    def __enter__(self) -> KillsItsLauncher:
        return self

    def __exit__(self, *error: object) -> None:
        if self.stage == "exit" and os.environ["RANK"] == str(RANK):
            os.kill(os.getppid(), signal.SIGKILL)


class LauncherBomb:
    """Kills the launcher of rank 1, when it is unpickled there."""

    def __reduce__(self) -> Any:
        return _kill_launcher, ()


def _kill_launcher() -> None:
    if os.environ["RANK"] == str(RANK):
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()


def want(what: str) -> None:
    """Ask for what there is none of."""
    if what == "disk full":
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = pages * os.sysconf("SC_PAGE_SIZE") + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    try:
        bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Wanting:
    """Asks for it wherever it is pickled in a rank, or unpickled there."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        if "RANK" in os.environ:
            want(self.what)
        return want, (self.what,)


class Unrebuildable:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("cannot be made here")


class NeedsTwo(Exception):
    """Like many: its __init__ wants more than its `args` keep."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two

    def __reduce__(self) -> Any:
        return _refuse, ()
