"""The same tokens, however many ranks there are and whoever runs them; calls; idling."""

from __future__ import annotations

import os
import time

import pytest
from conftest import DRIVERS, EXECUTOR, Drive, gone

pytestmark = pytest.mark.limit(900)

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def expected(checkpoint):
    """What vLLM's own executor says, on one rank."""
    drive = Drive([*DRIVERS, "tokens", str(checkpoint), "mp", "1"], {})
    try:
        return drive.event("tokens")[1]
    finally:
        drive.end()


@pytest.mark.parametrize(
    ("executor", "tp", "pp", "bind"),
    [
        ("rankwise", 1, 1, "auto"),
        ("rankwise", 2, 1, "nobind"),
        ("rankwise", 2, 1, "1|0"),
        ("class", 1, 2, "auto"),
    ],
    ids=["one", "nobind", "bound", "pipeline"],
)
def test_the_tokens_are_the_same(drive, expected, executor, tp, pp, bind):
    worker = "late_worker.WarmWorker" if pp > 1 else "auto"
    env = {"PYTHONPATH": "tests/vllm", "VLLM_CPU_OMP_THREADS_BIND": bind}
    vllm = drive("tokens", executor, tp, pp, worker, **env)
    assert vllm.event("tokens")[1] == expected
    assert vllm.wait() == 0
    if pp > 1:
        assert "Worker_PP1" in vllm.log(), "named as vLLM names it"


def test_output_that_is_late_gives_the_same_tokens(drive, expected):
    vllm = drive("tokens", "rankwise", 2, 1, "late_worker.LateWorker", PYTHONPATH="tests/vllm")
    assert vllm.event("tokens")[1] == expected
    assert vllm.wait() == 0
    assert "FETCHED by 0" in vllm.log()
    assert "FETCHED by 1" not in vllm.log(), "nobody asks for it"


def test_two_ranks_by_default(drive, expected):
    """Default binding, where vLLM's own executor does not start: bound all the same."""
    vllm = drive("tour")
    assert vllm.event("tokens")[1] == expected
    ranks = vllm.event("affinity")[1]
    if len(CPUS) > 1:
        assert sorted(cpu for cpus, _, _ in ranks for cpu in cpus) == CPUS, "each has its own"
    assert [threads for _, threads, _ in ranks] == [len(cpus) for cpus, _, _ in ranks]
    assert vllm.event("function")[1] == [42, 43], "sent by value, with what it refers to"
    assert vllm.event("method")[1] == [["generate"]] * 2
    assert "nothing of that name" in vllm.event("failed")[1]
    vllm.event("again")
    vllm.event("idle")
    processes = [one for one in vllm.processes() if one.pid in {pid for *_, pid in ranks}]
    assert len(processes) == 2
    before = [sum(one.cpu_times()[:2]) for one in processes]
    time.sleep(2.0)
    used = [sum(one.cpu_times()[:2]) - at for one, at in zip(processes, before, strict=True)]
    assert max(used) <= 0.05, f"idle ranks have used {used} s of CPU in 2 s"
    everything = vllm.processes()
    vllm.go_on()
    assert vllm.wait() == 0
    assert gone(everything, 10) == []
    assert EXECUTOR in vllm.log()
    for rank in (0, 1):
        assert f"vllm: rank {rank} (pid" in vllm.log(), "it is shown how far each rank has come"


def test_streams(drive, expected):
    vllm = drive("streams")
    deltas = vllm.event("deltas")[1]
    assert [[token for delta in each for token in delta] for each in deltas] == expected
    assert all(len(each) > 30 for each in deltas), "token by token"
    vllm.event("healthy")
    vllm.event("over")
    assert vllm.wait() == 0
