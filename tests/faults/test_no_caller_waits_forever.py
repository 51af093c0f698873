"""stage x fault x start method x waiter: what the caller gets, and that it gets it soon.

Every group has two ranks; rank 1 goes wrong. Where a process ends, the error names the rank, the
pid and how it ended; where code raises, the caller gets what was raised.
"""

from __future__ import annotations

import queue
import signal
import time

import pytest
from faulty import FAULTS, RANK, Bomb, Faulty, Oops
from untold import late, not_ready
from waiters import SOON, by_each, waiters

from rankwise import (
    GroupBroken,
    RemoteError,
    StartupError,
    WorkerDied,
    WorkerGroup,
)

cell = pytest.mark.cell

EXITS = {
    "os._exit": 3,
    "SIGKILL": -signal.SIGKILL,
    "SIGSEGV": -signal.SIGSEGV,
    "SIGABRT": -signal.SIGABRT,
    "SIGTERM": -signal.SIGTERM,
}

START = {
    "spawn": {"start_method": "spawn"},
    "forkserver": {"start_method": "forkserver", "preload": ("json",)},
}

methods = pytest.mark.parametrize("method", START)


def start(stage: str, fault: str, method: str, **options: object) -> WorkerGroup:
    return WorkerGroup(Faulty, 2, args=(stage, fault), **START[method], **options)


def start_that_sticks(phase: str, method: str, *args: object) -> None:
    """A group of `Faulty(*args)` is not made in time, for its rank 1 is still in `phase`."""
    error = not_ready(
        lambda limit: WorkerGroup(Faulty, 2, args=args, start_timeout=limit, **START[method]),
        lambda error: error.phases == {RANK: phase},
    )
    assert error.phases == {RANK: phase}
    assert f"rank {RANK}" in str(error)


def check_death(error: BaseException, fault: str) -> None:
    assert isinstance(error, WorkerDied), error
    assert error.rank == RANK
    assert error.exitcode == EXITS[fault]
    assert f"rank {RANK} (pid {error.pid})" in str(error)
    words = f"exited with status {error.exitcode}" if error.exitcode >= 0 else fault
    assert words in str(error)
    if fault in ("SIGSEGV", "SIGABRT"):
        assert "Fatal Python error" in (error.stack or "")


# -- before the group is there ----------------------------------------------------------------


@cell(
    stage="start",
    gets="StartupError: rank, phase, exit status, last output; its cause is what was "
    "raised, or a WorkerDied",
    told="at once",
    within=8,
)
@methods
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["import", "construct", "enter"])
def test_a_start_that_fails_names_rank_and_phase(stage: str, fault: str, method: str) -> None:
    args = ("", "", Bomb(fault)) if stage == "import" else (stage, fault)
    with pytest.raises(StartupError) as caught:
        WorkerGroup(Faulty, 2, args=args, **START[method])
    error = caught.value
    assert error.rank == RANK
    assert error.phase == ("import" if stage == "import" else "construct")
    assert f"rank {RANK}" in str(error) and repr(error.phase) in str(error)
    if fault == "raise":
        assert isinstance(error.__cause__, Oops)
        assert error.exit_status is None
    elif fault == "SystemExit":
        assert isinstance(error.__cause__, RemoteError)
        assert error.__cause__.type_name == "SystemExit"
    else:
        assert error.exit_status == EXITS[fault]
        check_death(error.__cause__, fault)


@cell(
    stage="start",
    gets="StartupTimeout at start_timeout: who is not ready, its phase, stack and last line",
    told="after `start_timeout`, and 0.3 s later at most",
    within=30,
)
@methods
@pytest.mark.parametrize("fault", ["sleep", "hold-gil", "SIGSTOP"])
@pytest.mark.parametrize("stage", ["import", "construct", "enter"])
def test_a_start_that_sticks_ends_at_start_timeout(stage: str, fault: str, method: str) -> None:
    args = ("", "", Bomb(fault)) if stage == "import" else (stage, fault)
    start_that_sticks("import" if stage == "import" else "construct", method, *args)


@cell(
    stage="spawn",
    gets="StartupError that names the interpreter",
    told="at once",
    within=8,
)
@methods
def test_an_interpreter_that_cannot_start_is_reported(method: str, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises((StartupError, OSError)) as caught:
        WorkerGroup(Faulty, 2, args=("", ""), **START[method])
    assert "/nonexistent/python" in str(caught.value)


@cell(
    stage="import",
    gets="StartupError; its cause is the ImportError",
    told="at once",
    within=8,
)
@methods
def test_a_module_that_ranks_cannot_import_is_reported(method: str) -> None:
    env = {"FAULTY_IMPORT": "1"}
    with pytest.raises(StartupError) as caught:
        WorkerGroup(lambda: __import__("no_such_module_here"), 2, env=env, **START[method])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "no_such_module_here" in str(caught.value)


# -- in a call --------------------------------------------------------------------------------


@cell(
    stage="receive, run, reply",
    gets="code that raises: its exception, and the rank lives on; a process that ends: "
    "WorkerDied with rank, signal or status, method; GroupBroken from then on",
    told="death: at once; what is raised: when every rank has answered, 50 ms after the first "
    "failure at most",
    within=8,
)
@methods
@waiters
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["load", "run", "reply"])
def test_no_caller_waits_forever(stage: str, fault: str, waiter, method: str) -> None:
    args = (Bomb(fault),) if stage == "load" else ()
    with start(stage, fault, method) as group:
        with pytest.raises(Exception) as caught:
            waiter(group, *args)
        error = caught.value
        if fault == "raise":
            # What a result's own __reduce__ raises is the reason why it cannot travel.
            assert isinstance(error, Oops) or isinstance(error.__cause__, RemoteError)
            assert group[1 - RANK].call(Faulty.pid) == group.pids[1 - RANK]
        elif fault == "SystemExit":
            assert isinstance(error, RemoteError)
            assert error.type_name == "SystemExit"
            assert group.call(Faulty.pid) == group.pids
        else:
            if waiter is by_each and isinstance(error, GroupBroken):
                assert isinstance(error.first, WorkerDied)
                error = error.first
            check_death(error, fault)
            assert error.method == "work"
            with pytest.raises(GroupBroken) as later:
                group.call(Faulty.pid)
            check_death(later.value.first, fault)


@cell(
    stage="idle",
    gets="on_failure hears WorkerDied without a method; later calls GroupBroken",
    told="at once",
    within=8,
)
@methods
@pytest.mark.parametrize("fault", ["os._exit", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_rank_that_dies_idle_breaks_the_group(fault: str, method: str) -> None:
    import os

    read_end, write_end = os.pipe()
    failures: queue.SimpleQueue = queue.SimpleQueue()
    try:
        with start("", "", method, on_failure=failures.put) as group:
            # The rank opens its own end: a pipe of the driver's does not reach a spawned process.
            path = f"/proc/{os.getpid()}/fd/{read_end}"
            group[RANK].call(go_wrong_when_readable, fault, path)
            os.write(write_end, b"x")
            failure = failures.get(timeout=SOON)
            check_death(failure.first, fault)
            assert failure.first.method is None
            assert not group.healthy
            assert isinstance(group.failure, GroupBroken)
    finally:
        os.close(read_end)
        os.close(write_end)


def go_wrong_when_readable(worker: Faulty, fault: str, path: str) -> None:
    import os

    worker.thread_then_go_wrong(fault, os.open(path, os.O_RDONLY))


@cell(
    stage="run",
    gets="the first failure, while the others wait in a collective; they get `grace`, then the "
    "group breaks, and says where each was (`each`: they are left)",
    told="death: at once; what is raised: 50 ms after it; the break: after `grace`, and 0.15 s "
    "later at most",
    within=8,
)
@methods
@waiters
@pytest.mark.parametrize("fault", ["os._exit", "SIGKILL", "raise"])
def test_a_failure_reaches_the_caller_while_peers_are_stuck(
    fault: str, waiter, method: str, tmp_path
) -> None:
    with start("run", fault, method) as group:
        path = tmp_path / "ended"
        group.call(Faulty.pid)
        began = time.monotonic()
        with pytest.raises(Exception) as caught:
            waiter(group.options(grace=0.2), str(path), method=Faulty.wait_for_a_file)
        assert time.monotonic() - began < SOON
        if fault != "raise":
            error = caught.value
            check_death(error.first if waiter is by_each else error, fault)
            return
        assert isinstance(caught.value, Oops)
        assert f"rank {RANK}" in caught.value.__notes__[0]
        if waiter is by_each:
            assert group.healthy, "the others are left alone"
            path.touch()
            return
        until = time.monotonic() + SOON
        while (failure := group.failure) is None:
            assert time.monotonic() < until
        assert isinstance(failure.first, Oops)
        # None at all: on a slow machine the time to find out was over first.
        stacks = failure.stacks
        assert not stacks or late(failure) or "in wait_for_a_file\n" in stacks[1 - RANK]
        assert f"\n  rank {1 - RANK}: pid {group.pids[1 - RANK]}, running wait_for_" in str(failure)


# -- at the end -------------------------------------------------------------------------------


@cell(
    stage="close",
    gets="close returns, and nothing is left",
    told="when the ranks have exited",
    within=8,
)
@methods
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["exit", "atexit"])
def test_close_ends_whatever_the_rank_does(stage: str, fault: str, method: str) -> None:
    group = start(stage, fault, method)
    assert group.call(Faulty.work) == [0, 1]
    group.close()
    assert not group.healthy


@cell(
    stage="close",
    gets="close returns after its timeout, SIGTERM, 1 s and SIGKILL; nothing is left",
    told="after the timeout of `close` and 1 s",
    within=8,
)
@methods
@pytest.mark.parametrize("fault", ["sleep", "hold-gil", "SIGSTOP"])
@pytest.mark.parametrize("stage", ["exit", "atexit"])
def test_close_ends_a_rank_that_will_not_leave(stage: str, fault: str, method: str) -> None:
    group = start(stage, fault, method)
    began = time.monotonic()
    group.close(timeout=0.3)
    assert time.monotonic() - began < 6.0
