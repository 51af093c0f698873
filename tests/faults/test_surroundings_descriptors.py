"""No descriptor is left: in a rank, in the launcher, in the driver."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from faulty import Faulty
from kernel import no_descriptors
from surroundings_ranks import ExhaustsDescriptors, Worker
from test_surroundings import methods
from untold import explained
from waiters import ALL, NAMES, by_callback, by_each

from rankwise import CallTimeout, StartupError, WorkerGroup

cell = pytest.mark.cell


@methods
@cell(
    stage="spawn",
    gets="StartupError: the rank that was not started, and why",
    told="at once",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached in the launcher"])
def test_a_launcher_without_descriptors_names_the_rank_that_it_cannot_start(
    options: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 16 && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(StartupError, match=r"rank \d: .*Too many open files"):
        WorkerGroup(Worker, 4, **options)


@methods
@cell(
    stage="spawn",
    gets="the OSError itself: it is the caller's own process that has none",
    told="at once",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached in the driver"])
def test_a_driver_without_descriptors_starts_no_group(options: dict[str, Any], fault: str) -> None:
    refused = 0
    with no_descriptors() as taken:
        while True:  # one more each time: every descriptor of a start is the one that is not there
            try:
                group = WorkerGroup(Worker, 2, **options)
            except OSError as error:
                assert error.errno == errno.EMFILE
                refused += 1
                os.close(taken.pop())
            else:
                group.close()
                break
    assert refused > 10


@methods
@cell(
    stage="construct, run, close",
    waiter=f"the constructor, {NAMES}, `close`",
    gets="a group that starts, answers and ends: none of it needs a descriptor",
    told="as ever",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached"])
def test_a_rank_without_descriptors_starts_and_ends(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(ExhaustsDescriptors, 2, **options) as group:
        for waiter in ALL:
            assert waiter(group, 1, method=Worker.echo) == [1, 1]
    assert group.failure is None


@methods
@cell(
    stage="the first large transfer",
    waiter=NAMES,
    gets="the rank's OSError, in that call alone: it imports what maps a file; from the first "
    "free descriptor on, the results",
    told="when every rank has answered, 50 ms after the first failure at most",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached"])
def test_a_first_large_message_wants_a_descriptor(options: dict[str, Any], fault: str) -> None:
    data = bytes(3 << 20)
    with WorkerGroup(Worker, 2, **options) as group:
        group.call(Worker.exhaust_descriptors)
        for waiter in ALL:
            with pytest.raises(OSError, match="Too many open files"):
                waiter(group, data, method=Worker.echo)
            assert waiter(group, 1, method=Worker.echo) == [1, 1]
        group.call(Worker.release_descriptors)
        assert group.call(Worker.echo, data) == [data, data]


@methods
@cell(
    stage="run",
    waiter="call, result, callback, each, flush, health",
    gets="CallTimeout, as ever: without what /proc alone tells",
    told="at its deadline, and 0.15 s later at most",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached in the driver"])
def test_a_driver_without_descriptors_is_told_of_its_deadlines(
    options: dict[str, Any], fault: str
) -> None:
    with WorkerGroup(Faulty, 2, args=("run", "sleep"), **options) as group:
        assert group.call(Faulty.pid) == group.pids
        with no_descriptors():
            error = explained(lambda: group.options(timeout=1.0).call(Faulty.work))
            assert (error.answered, error.missing) == ((0,), (1,))
            assert "in go_wrong" in error.stacks[1], "the launcher has descriptors"
            with pytest.raises(CallTimeout, match="rank 1: pid"):
                group[1].submit(Faulty.pid).result(0.1)
            for waiter in (by_callback, by_each):
                with pytest.raises(CallTimeout, match="rank 1: pid"):
                    waiter(group[1:].options(timeout=0.1), method=Faulty.pid)
            with pytest.raises(CallTimeout, match="rank 1: pid"):
                group.flush(0.1)
            assert [each.state for each in group.health()] == ["idle", "running"]
        group.kill()
