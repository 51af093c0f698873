"""A rank that is there and does not get on: stopped, asleep, or in C code with the GIL held.

Nobody takes it for dead, so what ends a wait is the caller's own limit, or the group's end. Every
group has two ranks; rank 1 is the one that sticks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faulty import RANK, Bomb, Faulty, hold_gil
from stuck_ranks import Clockwork
from test_no_caller_waits_forever import START, methods, start, start_that_sticks
from untold import late
from waiters import NAMES, Everybody, by_each, waiters

from rankwise import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    StartupError,
    StartupTimeout,
    WorkerDied,
    WorkerGroup,
)
from rankwise.testing import delay, faults, kill, refuse
from rankwise.testing import hold_gil as planned_hold

cell = pytest.mark.cell
STUCK = pytest.mark.parametrize("fault", ["sleep", "hold-gil", "SIGSTOP"])
TIMEOUT = 0.5
LARGE = bytes(8 << 20)


@pytest.fixture
def made(method: str) -> Iterator[Callable[[str, str], WorkerGroup]]:
    """Makes a group that goes wrong as told, and ends it whatever its rank does."""
    groups: list[WorkerGroup] = []

    def make(stage: str, fault: str) -> WorkerGroup:
        groups.append(start(stage, fault, method))
        # The first call of a group takes its time: it is not to take that of a deadline.
        assert groups[-1].call(Faulty.pid) == groups[-1].pids
        return groups[-1]

    yield make
    for group in groups:
        group.kill()


def wait_out(
    waiter: Callable[..., None], group: WorkerGroup, *args: object, timeout: float = TIMEOUT
) -> CallTimeout:
    """The CallTimeout that `waiter` gets, at its deadline. On a slow machine the rank that is well
    may be among the missing, too: `check` wants one of which only RANK is."""
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        waiter(group.options(timeout=timeout), *args)
    assert timeout * 0.9 < time.monotonic() - began < timeout + 3.0
    return caught.value


def check(error: CallTimeout, waiter: Callable[..., None], group: WorkerGroup) -> None:
    assert error.missing == (RANK,)
    assert error.answered == (() if waiter is by_each else (1 - RANK,))
    assert f"\n  rank {RANK}: pid {group.pids[RANK]}, " in str(error)


@cell(
    stage="receive, run, reply",
    gets="CallTimeout at the deadline: answered, missing, and for each its state, CPU, "
    "stack and last line; the other ranks go on",
    told="at its deadline, and 0.15 s later at most",
    within=30,
)
@methods
@waiters
@STUCK
@pytest.mark.parametrize("stage", ["load", "run", "reply"])
def test_a_stuck_rank_costs_its_timeout_and_no_more(
    stage: str, fault: str, waiter, method: str, made
) -> None:
    stopped = fault == "SIGSTOP"
    for _ in range(3):
        group = made(stage, fault)
        error = wait_out(waiter, group, *((Bomb(fault),) if stage == "load" else ()))
        if error.missing == (RANK,) and not late(error):
            break
    check(error, waiter, group)
    assert error.states[RANK] == ("stopped" if stopped else "running")
    assert error.seconds[RANK] > 0
    assert error.reasons == ({RANK: "it is stopped"} if stopped else {})
    if not stopped:
        assert f"in {'hold_gil' if fault == 'hold-gil' else 'go_wrong'}\n" in error.stacks[RANK]
    assert group[1 - RANK].call(Faulty.pid) == group.pids[1 - RANK]


def _hold_in_a_thread(worker: Any) -> None:
    threading.Thread(target=hold_gil, daemon=True).start()


@cell(
    stage="idle, large transfer",
    gets="CallTimeout at the deadline; the call is with the rank, and runs when that goes on",
    told="at its deadline, and 0.15 s later at most",
    within=30,
)
@methods
@waiters
@pytest.mark.parametrize("fault", ["SIGSTOP", "another thread holds the GIL"])
@pytest.mark.parametrize("stage", ["idle", "large transfer"])
def test_a_rank_that_does_not_take_its_call_costs_its_timeout(
    stage: str, fault: str, waiter, method: str, made
) -> None:
    group = made("", "")
    pid = group.pids[RANK]
    args = (LARGE,) if stage == "large transfer" else ()
    if fault == "SIGSTOP":
        os.kill(pid, signal.SIGSTOP)
    else:
        # The answer of this very call may not leave any more: nobody waits for it.
        group[RANK].submit(_hold_in_a_thread)
    error = wait_out(waiter, group, *args)
    if error.missing != (RANK,):
        error = wait_out(waiter, group, *args, timeout=4 * TIMEOUT)
    check(error, waiter, group)
    if fault == "SIGSTOP":
        assert error.states[RANK] == "stopped"
        os.kill(pid, signal.SIGCONT)
        assert group.call(Faulty.pid) == group.pids
    else:
        assert error.states[RANK] in ("queued", "running")


@cell(
    stage="run, then close",
    waiter=NAMES,
    gets="GroupClosed when close() has waited its timeout; the rank is killed",
    told="after the timeout of `close`; the rank has 1 s more",
    within=8,
)
@methods
@STUCK
def test_close_ends_every_wait_for_a_stuck_rank(fault: str, method: str, made) -> None:
    group = made("run", fault)
    everybody = Everybody(group)
    while group.health()[RANK].state not in ("running", "stopped"):
        pass
    began = time.monotonic()
    group.close(timeout=0.2)
    assert time.monotonic() - began < 5.0
    for name, error in everybody.errors().items():
        assert isinstance(error, GroupClosed), name


@cell(
    stage="spawn",
    gets="StartupError: rank, phase 'spawn', exit status; its cause is a WorkerDied",
    told="at once",
    within=8,
)
@methods
@pytest.mark.parametrize("fault", ["SystemExit", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_rank_that_dies_before_it_has_read_anything(fault: str, method: str) -> None:
    if fault == "SystemExit":
        plan, status, words = refuse(RANK, at="spawn"), 1, "exited with status 1"
    else:
        number = getattr(signal, fault)
        plan, status, words = kill(RANK, at="spawn", signal=number), -number, fault
    with pytest.raises(StartupError) as caught:
        with faults(plan):
            WorkerGroup(Faulty, 2, args=("", ""), **START[method])
    assert (caught.value.rank, caught.value.phase) == (RANK, "spawn")
    assert caught.value.exit_status == status
    assert isinstance(caught.value.__cause__, WorkerDied)
    assert words in str(caught.value)


@cell(
    stage="spawn",
    gets="StartupTimeout at start_timeout: who is not ready, its phase",
    told="after `start_timeout`, and 0.3 s later at most",
    within=30,
)
@methods
@STUCK
def test_a_rank_that_sticks_before_it_has_read_anything(fault: str, method: str) -> None:
    plan = {
        "sleep": delay(RANK, 600, at="spawn"),
        "hold-gil": planned_hold(RANK, 600, at="spawn"),
        "SIGSTOP": kill(RANK, at="spawn", signal=signal.SIGSTOP),
    }
    with faults(plan[fault]):
        start_that_sticks("spawn", method, "", "")


@cell(
    stage="construct, ready, run",
    waiter="the constructor, call",
    gets="whatever the moment: StartupError, WorkerDied in the first call, or GroupBroken with it "
    "where it died before that; all name the rank, and its signal or status",
    told="at once",
    within=8,
)
@methods
@pytest.mark.parametrize(
    "fault",
    [
        *(f"SIGALRM after {us} us" for us in (1, 200, 500, 1000, 3000)),
        *(f"{fault} after {us} us" for fault in ("SIGSEGV", "os._exit") for us in (100, 1000)),
    ],
)
def test_a_rank_that_dies_about_when_it_is_ready(fault: str, method: str) -> None:
    what, us = fault.removesuffix(" us").split(" after ")
    with pytest.raises((StartupError, WorkerDied, GroupBroken)) as caught:
        with WorkerGroup(Clockwork, 2, args=(what, int(us) * 1e-6), **START[method]) as group:
            group.call(Clockwork.wait)
    error = caught.value
    dead = error.first if isinstance(error, GroupBroken) else error
    assert isinstance(dead, (StartupError, WorkerDied))
    assert dead.rank == RANK
    number = None if what == "os._exit" else getattr(signal, what)
    assert dead.exitcode == (3 if number is None else -number)
    assert ("exited with status 3" if number is None else what) in str(error)


@cell(
    stage="construct, ready, run",
    waiter="the constructor, call",
    gets="whatever the moment: StartupTimeout, or CallTimeout in the first call that it does not "
    "answer; both name the rank",
    told="after `start_timeout`, or at the deadline, and 0.3 s later at most",
    within=30,
)
@methods
@pytest.mark.parametrize(
    "fault", [f"{fault} after {us} us" for fault in ("SIGSTOP", "hold-gil") for us in (100, 1000)]
)
def test_a_rank_that_sticks_about_when_it_is_ready(fault: str, method: str) -> None:
    what, us = fault.removesuffix(" us").split(" after ")
    for limit in (0.5, 3.0):  # a slow machine needs longer for the other to be ready
        group = None
        try:
            with pytest.raises((StartupTimeout, CallTimeout)) as caught:
                group = WorkerGroup(
                    Clockwork, 2, args=(what, int(us) * 1e-6), start_timeout=limit, **START[method]
                )
                while True:
                    group.options(timeout=limit).call(Clockwork.nothing)
        finally:
            if group is not None:
                group.kill()
        error = caught.value
        late = error.phases if isinstance(error, StartupTimeout) else error.missing
        if tuple(late) == (RANK,):
            break
    assert tuple(late) == (RANK,)
    assert f"\n  rank {RANK}: pid " in str(error)
