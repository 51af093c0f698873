"""What surrounds a rank goes wrong: launcher, memory, descriptors, output, disk."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from rankwise import GroupBroken, RemoteError, SerializationError, WorkerGroup

cell = pytest.mark.cell
methods = pytest.mark.parametrize(
    "options",
    [{"start_method": "spawn"}, {"start_method": "forkserver", "preload": ("json",)}],
    ids=["spawn", "forkserver"],
)


class Worker:
    def parent(self) -> int:
        return os.getppid()

    def echo(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        signal.pause()

    def give(self, what: str) -> Any:
        if what == "unpicklable":
            return open("/dev/null")
        if what == "unrebuildable":
            return Unrebuildable()
        raise NeedsTwo("one", "two")

    def exhaust_memory(self) -> int:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        room = pages * os.sysconf("SC_PAGE_SIZE") + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
        try:
            return len(bytearray(1 << 30))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    def exhaust_descriptors(self) -> None:
        import resource

        self.taken = []
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        try:
            while True:
                self.taken.append(os.dup(0))
        except OSError:
            pass

    def print_much(self, nbytes: int) -> int:
        print("x" * nbytes, flush=True)
        return nbytes

    def fill_the_disk(self) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)


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


@methods
@cell(
    stage="run",
    gets="GroupBroken: its launcher, and how that ended; the ranks are gone",
    within=8,
)
@pytest.mark.parametrize("fault", ["launcher killed"])
def test_the_launchers_death_is_told(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        launcher = group[0].call(Worker.parent)
        future = group.submit(Worker.wait)
        os.kill(launcher, signal.SIGKILL)
        with pytest.raises(GroupBroken, match=rf"launcher \(pid {launcher}\) was killed"):
            future.result(5)


@methods
@cell(
    stage="reply",
    gets="SerializationError or RemoteError with the rank and the reason; the group lives on",
    within=8,
)
@pytest.mark.parametrize("fault", ["unpicklable", "unrebuildable", "unrebuildable exception"])
def test_what_cannot_travel_fails_its_call_only(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        with pytest.raises((SerializationError, RemoteError)) as caught:
            group.call(Worker.give, fault)
        assert "rank" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(stage="run", gets="the rank's own MemoryError or OSError; the group lives on", within=8)
@pytest.mark.parametrize(
    ("fault", "error"),
    [("out of memory", MemoryError), ("disk full", OSError)],
)
def test_what_the_rank_has_none_of_is_its_own_exception(
    options: dict[str, Any], fault: str, error: type[Exception]
) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        with pytest.raises(error):
            group.call(Worker.exhaust_memory if error is MemoryError else Worker.fill_the_disk)
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(
    stage="run, large transfer",
    gets="the results: nothing of a call needs a descriptor, or waits for who shows output",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached", "log pipe full"])
def test_what_calls_do_not_need_does_not_stop_them(options: dict[str, Any], fault: str) -> None:
    data = bytes(3 << 20)
    with WorkerGroup(Worker, 2, logs="off", **options) as group:
        if fault == "log pipe full":
            assert group.call(Worker.print_much, 5 << 20) == [5 << 20] * 2
        else:
            # The first large message has a rank import what maps it, which needs a descriptor.
            assert group.call(Worker.echo, data) == [data, data]
            group.call(Worker.exhaust_descriptors)
        for _ in range(3):
            assert group.call(Worker.echo, data) == [data, data]
