"""Deaths in the middle of large transfers: no lock is shared, so nobody is left waiting."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from stuck_ranks import go_wrong_after
from transfers_ranks import Mirror

from rankwise import GroupBroken, WorkerDied, WorkerGroup


@pytest.mark.cell(
    stage="large transfer",
    method="spawn, forkserver",
    waiter="result, of four calls at once",
    gets="the result, WorkerDied, or GroupBroken with it, whatever the moment",
    told="at once",
    within=30,
)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSEGV", "SIGABRT", "os._exit"])
@pytest.mark.parametrize("seed", range(4))
def test_a_death_at_a_random_moment_of_a_transfer_settles_every_future(
    seed: int, fault: str
) -> None:
    chance = random.Random(f"{seed} {fault}")
    data = b"x" * (8 << 20)
    method = ("spawn", "forkserver")[seed % 2]
    with WorkerGroup(Mirror, 2, start_method=method) as group:
        victim = chance.randrange(2)
        delay = chance.random() * 0.05
        if fault == "os._exit":
            doomed = group[victim].submit(go_wrong_soon, delay, fault)
            exitcode, timer = 3, None
        else:
            exitcode = -getattr(signal, fault)
            timer = threading.Timer(delay, os.kill, (group.pids[victim], -exitcode))
            timer.start()
        outcomes = []
        futures = []
        for _ in range(4):
            try:
                futures.append(group.submit(Mirror.mirror, data))
            except GroupBroken as error:
                outcomes.append(error)
        for future in futures:
            try:
                outcomes.append([len(part) for part in future.result(timeout=20)])
            except GroupBroken as error:
                outcomes.append(error)
        if timer is None:
            doomed.exception(timeout=20)
        else:
            timer.join()
        assert len(outcomes) == 4
        for outcome in outcomes:
            if isinstance(outcome, GroupBroken):
                assert isinstance(outcome.first, WorkerDied)
                assert (outcome.first.rank, outcome.first.exitcode) == (victim, exitcode)
            else:
                assert outcome == [len(data)] * 2


def go_wrong_soon(worker: Mirror, seconds: float, fault: str) -> None:
    go_wrong_after(seconds, fault)


def test_a_rank_that_is_killed_while_it_writes_leaves_the_others_alone() -> None:
    """One channel a rank: a lock or a queue that all share would be stuck for good."""
    data = b"x" * (32 << 20)
    with WorkerGroup(Mirror, 1) as first, WorkerGroup(Mirror, 1) as second:
        lost = first.submit(Mirror.mirror, data)
        os.kill(first.pids[0], signal.SIGKILL)
        try:
            lost.result(timeout=20)
        except WorkerDied:
            pass
        else:  # it was faster than we
            limit = time.monotonic() + 20
            while first.healthy:
                assert time.monotonic() < limit
                time.sleep(0.01)
        assert second.call(Mirror.length, data) == [len(data)]


def test_a_driver_that_never_reads_does_not_block_its_own_submits() -> None:
    """Both directions full at once is the classic deadlock of a driver that blocks in send."""
    data = b"x" * 100_000
    with WorkerGroup(Mirror, 2) as group:
        futures = [group.submit(Mirror.mirror, data) for _ in range(300)]
        assert all(future.result(timeout=60) == [data, data] for future in futures)
