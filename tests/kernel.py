"""What tests ask of the kernel, or take from it: a process's children, and every descriptor."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


def children(pid: int) -> set[int]:
    """The children of `pid` now; none where it has ended."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            # A thread may have ended meanwhile, too.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    found.update(map(int, file.read().split()))
    return found


def exhaust_descriptors() -> list[int]:
    """Take every descriptor that this process may still have, some hundred at most."""
    taken = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 64, limits[1]))
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        return taken


@contextlib.contextmanager
def no_descriptors() -> Iterator[list[int]]:
    """Meanwhile this process can open nothing, but for what it closes of those that it is given."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = exhaust_descriptors()
    try:
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
