"""torch.distributed inside a group: `rankwise.torch`, and torch's own init as it stands.

The driver of these tests never imports torch: only the workers do.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from torch_ranks import Rank

import rankwise
from rankwise import WorkerGroup

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch"),
    pytest.mark.limit(300),  # an import of torch takes a second, or ten where others compute too
]

# By value: a worker need not import this file, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

FORKED = {"start_method": "forkserver", "preload": ("torch",)}
ROOT = Path(__file__).parents[2]


# -- what is promised -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ours", "plain"])
@pytest.mark.parametrize(
    ("size", "start"),
    [
        pytest.param(2, {}, id="2-spawn"),
        pytest.param(2, FORKED, id="2-forkserver"),
        pytest.param(4, FORKED, id="4-forkserver"),
    ],
)
def test_all_reduce_is_right(how, size, start):
    with WorkerGroup(Rank, size, args=(how,), **start) as group:
        for _ in range(3):
            assert group.call(Rank.total) == [float("1" * size)] * size


def test_one_rank_is_a_group_too():
    with WorkerGroup(Rank, 1, **FORKED) as group:
        assert group.call(Rank.total) == [1.0]


# Where torch has MKL it computes with no more threads than there are cores, so this asks for few:
# for one where torch left alone takes all, and for more than the one that a launcher imports with.
@pytest.mark.parametrize(
    ("size", "threads", "start"),
    [
        pytest.param(2, 1, {}, id="spawn"),
        pytest.param(2, 2, FORKED, id="forkserver"),
        pytest.param(1, "auto", FORKED, id="forkserver-auto"),
    ],
)
def test_torch_computes_with_the_threads_of_the_budget(size, threads, start):
    if threads == 2 and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    with WorkerGroup(Rank, size, threads=threads, **start) as group:
        told = group.call(Rank.run, "int(__import__('os').environ['OMP_NUM_THREADS'])")
        assert threads == "auto" or told == [threads] * size
        assert group.call(Rank.run, "torch.get_num_threads()") == told


def test_rankwise_alone_imports_no_torch():
    script = "import sys, rankwise; rankwise.WorkerGroup; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], env=with_path(), capture_output=True)
    assert (shown.stdout, shown.stderr) == (b"False\n", b"")


def test_nothing_listens_beyond_loopback():
    with WorkerGroup(Rank, 2, **FORKED) as group:
        assert group.call(Rank.listeners) == [{"0100007F"}] * 2


# -- rounds -----------------------------------------------------------------------------------


def test_a_group_can_be_left_and_joined_again():
    with WorkerGroup(Rank, 2, **FORKED) as group:
        for _ in range(5):
            assert group.call(Rank.again) == [2.0, 2.0]


@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_may_come_to_the_next_round_first(early, tmp_path):
    fifo = tmp_path / "left"
    os.mkfifo(fifo)
    with WorkerGroup(Rank, 2, **FORKED) as group:
        for _ in range(3):
            first = group[early].submit(Rank.again, str(fifo))
            assert fifo.read_text() == "left"  # while the other rank is in the old round
            second = group[1 - early].submit(Rank.again)
            assert (first.result(30), second.result(30)) == (2.0, 2.0)


@pytest.mark.parametrize("absent", [0, 1])
def test_who_did_not_come_is_named_and_the_next_round_works(absent):
    others = [rank for rank in range(3) if rank != absent]
    with WorkerGroup(Rank, 3, args=("none",), **FORKED) as group:
        outcomes = group[others].options(return_exceptions=True).call(Rank.join, timeout=0.5)
        for rank, error in zip(others, outcomes, strict=True):
            assert type(error) in (TimeoutError, ConnectionError)
            assert str(error).startswith(f"rank {rank} of workers ")
        named = rf"init_process_group for ranks? .*\b{absent}\b.*every rank of the group must"
        assert re.search(named, str(outcomes[0]))
        group.call(Rank.join)
        assert group.call(Rank.total) == [111.0] * 3


# -- misuse -----------------------------------------------------------------------------------


def test_outside_a_worker_it_says_where_to_call_it():
    script = (
        "import rankwise.torch as rt\n"
        "for call in rt.init_process_group, rt.device:\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], env=with_path(), capture_output=True)
    first, second = shown.stdout.decode().splitlines()
    assert first.startswith("rankwise.torch.init_process_group was called outside a worker")
    assert second.startswith("worker_info() was called outside a worker")


def test_ranks_that_are_threads_are_refused():
    with WorkerGroup(Rank, 2, args=("none",), backend="inline") as group:
        with pytest.raises(RuntimeError, match=r"needs a process a rank.*backend='local'"):
            group.call(Rank.join)
        assert group.call(Rank.run, "str(rt.device())") == ["cpu", "cpu"]


def test_misuse_is_told_before_anything_is_made():
    with WorkerGroup(Rank, 1, **FORKED) as group:
        with pytest.raises(ValueError, match=r"rank 0 .* already: call torch.*destroy_process"):
            group.call(Rank.join)
        group.call(Rank.leave)
        for name in ("init_method", "rank", "store", "world_size"):
            with pytest.raises(TypeError, match=f"takes no {name}"):
                group.call(Rank.join, **{name: 1})
        for wrong, kind in ((0, ValueError), (-1.0, ValueError), ("60", TypeError)):
            with pytest.raises(kind, match="timeout must be"):
                group.call(Rank.join, timeout=wrong)
        group.call(Rank.join)
        assert group.call(Rank.total) == [1.0]


def test_without_a_gpu_it_is_gloo_on_the_cpu():
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    with WorkerGroup(Rank, 2, devices="shared", env=hidden, **FORKED) as group:
        assert group.call(Rank.run, "str(rt.device())") == ["cpu"] * 2
        assert group.call(Rank.run, "torch.distributed.get_backend()") == ["gloo"] * 2
        group.call(Rank.leave)
        with pytest.raises(RuntimeError, match="has no GPU for backend 'nccl'"):
            group.call(Rank.join, backend="nccl")


def test_a_rank_that_reads_late_is_told_of_the_difference_too():
    def join_late(rank, backend):
        from torch.distributed import PrefixStore

        real = PrefixStore.multi_get

        def late(store, keys):
            time.sleep(0.5)  # rank 0 has read, and would have gone
            return real(store, keys)

        PrefixStore.multi_get = late
        try:
            rank.join(backend=backend)
        finally:
            PrefixStore.multi_get = real

    with WorkerGroup(Rank, 2, args=("none",), **FORKED) as group:
        futures = [group[0].submit(Rank.join), group[1].submit(join_late, "cpu:gloo")]
        for future in futures:
            with pytest.raises(RuntimeError, match="same backend: rank 0 gloo, rank 1 cpu:gloo"):
                future.result(60)


def test_ranks_that_differ_in_their_backend_are_told():
    with WorkerGroup(Rank, 2, args=("none",), **FORKED) as group:
        futures = [group[0].submit(Rank.join), group[1].submit(Rank.join, backend="cpu:gloo")]
        for future in futures:
            with pytest.raises(RuntimeError, match="same backend: rank 0 gloo, rank 1 cpu:gloo"):
                future.result(60)
        group.call(Rank.join)
        assert group.call(Rank.total) == [11.0, 11.0]


# -- failures and servers ---------------------------------------------------------------------


def test_a_failure_is_heard_while_the_peer_waits_in_a_collective():
    group = WorkerGroup(Rank, 2, **FORKED)
    try:
        began = time.monotonic()
        with pytest.raises(ValueError, match="no such token") as caught:
            group.call(Rank.fail_on, 1)
        heard = time.monotonic() - began
    finally:
        began = time.monotonic()
        group.close(timeout=0.2)
        closed = time.monotonic() - began
    print(f"heard after {heard * 1000:.0f} ms, closed in {closed:.2f} s")
    assert heard < 1.0
    assert closed < 10.0
    assert isinstance(caught.value.__cause__, rankwise.RemoteError)
    assert caught.value.__cause__.rank == 1
    assert any(note.startswith("rank 1 (pid ") for note in caught.value.__notes__)


def test_a_server_ticks_on_while_its_ranks_start_and_reduce():
    async def serve() -> tuple[int, list[list[float]]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        async with WorkerGroup.start(Rank, 2, **FORKED) as group:
            started = ticks
            answers = await asyncio.gather(*(group.submit(Rank.total) for _ in range(20)))
        ticker.cancel()
        return started, answers

    started, answers = asyncio.run(serve())
    assert answers == [[11.0, 11.0]] * 20
    assert started >= 10  # a start takes a second and more, of which the loop lost little


# -- the page of docs -------------------------------------------------------------------------


def _examples() -> list[tuple[str, str]]:
    """Each Python block of the page, with the text block that follows it: what it prints."""
    page = (ROOT / "docs" / "torch.md").read_text()
    return re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize(("script", "printed"), _examples())
def test_the_page_prints_what_it_says(script, printed, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(script)
    shown = subprocess.run(
        [sys.executable, str(path)], env=with_path(), capture_output=True, text=True, timeout=120
    )
    assert (shown.returncode, shown.stdout) == (0, printed), shown.stderr


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
