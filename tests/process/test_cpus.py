"""`cpus`: where each rank may run, before it has imported anything."""

from __future__ import annotations

import os

import pytest
from cpus_ranks import Worker

from rankwise import StartupError, WorkerGroup

ALLOWED = sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.skipif(len(ALLOWED) < 2, reason="one CPU cannot be split")
def test_split_gives_each_rank_its_own(start_method):
    with WorkerGroup(Worker, 2, cpus="split", start_method=start_method) as group:
        (first, one), (second, other) = group.call(Worker.where)
    assert sorted(first + second) == ALLOWED
    assert (len(first), len(second)) == (int(one), int(other))
    assert os.sched_getaffinity(0) == set(ALLOWED), "the driver's own is left alone"


def test_each_rank_is_where_it_is_told_to_be():
    with WorkerGroup(Worker, 2, cpus=[ALLOWED[-1:], ALLOWED[:1]]) as group:
        assert group.call(Worker.where) == [(ALLOWED[-1:], "1"), (ALLOWED[:1], "1")]


def test_a_cpu_that_is_not_there_is_told_by_its_number():
    with pytest.raises(StartupError, match="sched_setaffinity to CPUs") as caught:
        WorkerGroup(Worker, 2, cpus=[ALLOWED[:1], [4095]])
    assert caught.value.rank == 1
    assert "4095" in str(caught.value)
