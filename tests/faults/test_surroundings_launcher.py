"""The launcher is killed, whatever its ranks are doing: the caller is told, and nothing stays."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from faulty import RANK, Bomb, Faulty
from kernel import children
from surroundings_ranks import KillsItsLauncher, LauncherBomb, Worker
from test_no_caller_waits_forever import START, methods
from waiters import NAMES, SOON, Everybody

from rankwise import GroupBroken, StartupError, WorkerGroup
from rankwise.testing import delay, faults

cell = pytest.mark.cell
killed = pytest.mark.parametrize("fault", ["launcher killed"])
LARGE = bytes(8 << 20)


@contextlib.contextmanager
def launcher_killed_when_it_has(ranks: int) -> Iterator[None]:
    """Whoever starts a launcher in this block loses it as soon as it has so many children."""
    over = threading.Event()
    before = children(os.getpid())

    def wait() -> None:
        while not over.wait(0.001):
            for child in children(os.getpid()) - before:
                if len(children(child)) >= ranks:
                    os.kill(child, signal.SIGKILL)
                    return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@methods
@cell(
    stage="start",
    gets="StartupError: its launcher, and how that ended; the ranks are gone",
    told="at once",
    within=8,
)
@killed
@pytest.mark.parametrize("stage", ["spawn", "import", "construct"])
def test_the_launchers_death_ends_a_start(stage: str, method: str, fault: str) -> None:
    with pytest.raises(StartupError, match=r"launcher \(pid \d+\) was killed by SIGKILL"):
        if stage == "spawn":
            with faults(delay(None, 600, at="spawn")), launcher_killed_when_it_has(2):
                WorkerGroup(Worker, 2, **START[method])
        elif stage == "import":
            WorkerGroup(KillsItsLauncher, 2, args=("", LauncherBomb()), **START[method])
        else:
            WorkerGroup(KillsItsLauncher, 2, args=("construct",), **START[method])


@methods
@cell(
    stage="receive, run, reply, large transfer",
    waiter=NAMES,
    gets="GroupBroken: its launcher, and how that ended; the ranks are gone",
    told="at once",
    within=8,
)
@killed
@pytest.mark.parametrize("stage", ["load", "run", "reply", "large transfer"])
def test_the_launchers_death_ends_every_wait(stage: str, method: str, fault: str) -> None:
    args = {"load": (Bomb("sleep"),), "large transfer": (LARGE,)}.get(stage, ())
    with WorkerGroup(Faulty, 2, args=(stage, "sleep"), **START[method]) as group:
        launcher = group[0].call(lambda worker: os.getppid())
        if stage == "large transfer":
            os.kill(group.pids[RANK], signal.SIGSTOP)
        on_its_way = group.submit(Faulty.work, *args)
        everybody = Everybody(group, *args)
        while group.health()[RANK].state not in ("running", "stopped"):
            pass
        os.kill(launcher, signal.SIGKILL)
        errors = {"submit": on_its_way.exception(SOON), **everybody.errors()}
        for name, error in errors.items():
            assert isinstance(error, GroupBroken), name
            assert f"launcher (pid {launcher}) was killed by SIGKILL" in str(error), name


@methods
@cell(
    stage="idle",
    waiter="`on_failure`",
    gets="the same GroupBroken as later calls",
    told="at once",
    within=8,
)
@killed
def test_the_launchers_death_is_told_while_nothing_runs(method: str, fault: str) -> None:
    failures: queue.SimpleQueue[GroupBroken] = queue.SimpleQueue()
    with WorkerGroup(Worker, 2, on_failure=failures.put, **START[method]) as group:
        os.kill(group[0].call(Worker.parent), signal.SIGKILL)
        told = failures.get(timeout=SOON)
        with pytest.raises(GroupBroken) as caught:
            group.call(Worker.echo, 1)
        assert str(told) == str(caught.value)
        assert "launcher" in str(told) and "SIGKILL" in str(told)


@methods
@cell(
    stage="exit",
    waiter="`close`",
    gets="close returns, and nothing is left",
    told="at once: nobody is left to be waited for",
    within=8,
)
@killed
def test_the_launchers_death_does_not_hold_up_close(method: str, fault: str) -> None:
    group: Any = WorkerGroup(KillsItsLauncher, 2, args=("exit",), **START[method])
    assert group.call(Worker.echo, 1) == [1, 1]
    group.close()
    assert not group.healthy
