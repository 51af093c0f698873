"""A worker that waits, dies, fails and sticks as the bounds' benchmark wants it. Imports little."""

import ctypes
import os
import signal
import time

MB = 1 << 20
ALL = -2  # in the place of a rank: every one


class Failure(Exception):
    """Its argument: when it was raised, by CLOCK_MONOTONIC."""


class Mortal:
    """A rank with `resident` bytes of its own, if it is the one that `large` names, or ALL are."""

    def __init__(self, large: int = -1, resident: int = 0) -> None:
        self.rank = int(os.environ["RANK"])
        if large in (self.rank, ALL):
            with open("/proc/self/statm") as file:
                has = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.memory = b"x" * max(0, resident - has)

    def hello(self) -> int:
        return self.rank

    def wait(self) -> None:
        signal.pause()

    def hold(self) -> None:
        """Stay in C code, and keep the interpreter's lock there."""
        ctypes.PyDLL(None).sleep(600)

    def count(self, number: int) -> int:
        """Stay in C code that no signal wakes, and keep the interpreter's lock there."""
        return sum(range(number))

    def collective(self, failing: int, path: str) -> int:
        """A fake collective: the others wait for one that fails. `path`: a FIFO to let them go."""
        with open(path, "rb", buffering=0) as file:
            if self.rank == failing:
                time.sleep(0.02)  # the others have come to wait
                raise Failure(time.monotonic())
            file.read(1)
        return self.rank
