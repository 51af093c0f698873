"""The executor by itself, on ranks without a model: what vLLM's engine relies on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ranks import Model

from rankwise import GroupBroken, WorkerGroup
from rankwise.vllm import RankwiseExecutor

pytestmark = pytest.mark.limit(300)


@pytest.fixture
def executor():
    """Four ranks, two pipeline stages of two: the first rank of the last one has the output."""
    made = object.__new__(RankwiseExecutor)
    made.output_rank = 2
    made._callback = None
    made.kv_output_aggregator = made.ec_output_aggregator = None
    made._group = WorkerGroup(Model, 4, name="vllm", logs="off")
    yield made
    made._group.kill()


def test_the_output_rank_alone_answers_a_step(executor):
    assert executor.execute_model("a") == "a by 2"
    assert executor.sample_tokens("g") == (2, "g")
    assert executor.take_draft_token_ids() == 2
    executor.execute_dummy_batch()
    assert executor.collective_rpc("get_steps") == [["a", "dummy"]] * 4


def test_steps_that_are_not_waited_for_come_in_order(executor):
    futures = [executor.execute_model(step, non_block=True) for step in range(50)]
    assert [future.result() for future in futures] == [f"{step} by 2" for step in range(50)]
    assert executor.collective_rpc("get_steps") == [list(range(50))] * 4


def test_a_function_has_the_rank_first(executor):
    assert executor.collective_rpc(lambda rank, n: rank.rank * n, args=(3,)) == [0, 3, 6, 9]
    assert executor.collective_rpc("sample_tokens", kwargs={"grammar": 1}, unique_reply_rank=3) == (
        3,
        1,
    )


class Joins:
    def __init__(self, mark):
        self.mark = mark
        self.threads = set()

    def aggregate(self, outputs, output_rank=0):
        self.threads.add(threading.current_thread())
        outputs[output_rank] = (outputs[output_rank], self.mark, len(outputs))
        return outputs[output_rank]


@pytest.mark.parametrize("non_block", [False, True])
def test_aggregators_have_what_every_rank_returns(executor, non_block):
    executor.kv_output_aggregator, executor.ec_output_aggregator = Joins("kv"), Joins("ec")
    value = executor.execute_model("a", non_block=non_block)
    value = value.result(20) if non_block else value
    assert value == (("a by 2", "kv", 4), "ec", 4)
    assert len(executor.kv_output_aggregator.threads) == 1


def test_an_aggregator_that_fails_fails_the_step(executor):
    executor.kv_output_aggregator = object()
    future = executor.execute_model("a", non_block=True)
    with pytest.raises(AttributeError, match="aggregate"):
        future.result(20)


def test_health_is_told_without_asking_a_rank(executor):
    executor.check_health()
    executor._group.submit(Model.pause)
    began = time.monotonic()
    executor.check_health()
    assert time.monotonic() - began < 0.05, "a rank that is stopped does not answer"
    told = []
    executor.register_failure_callback(lambda: told.append(True))
    os.kill(executor._group.pids[1], signal.SIGKILL)
    with pytest.raises(GroupBroken, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        while True:
            executor.check_health()
    late = []
    executor.register_failure_callback(lambda: late.append(True))
    assert late == [True], "also who comes when it has failed already"


def test_a_timeout_is_the_builtin_one(executor):
    with pytest.raises(TimeoutError, match="pause"):
        executor.collective_rpc("pause", timeout=0.2)


def test_an_unknown_release_is_refused_in_words():
    code = "import vllm.version; vllm.version.__version__ = '0.99.1'\nimport rankwise.vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: rankwise.vllm is made for vLLM 0.32, and this is 0.99.1:")
    assert "RANKWISE_VLLM_UNTESTED=1" in last
