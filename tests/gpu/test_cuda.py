"""What needs a GPU: nccl, the choice of the device, one visible device a rank, tensors on a GPU.

Everything here is skipped where there is none. With one GPU the groups have one rank.
"""

from __future__ import annotations

import glob
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import cloudpickle
import pytest

from rankwise import WorkerGroup, worker_info

# By value: a worker need not import this file, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _count() -> int:
    """How many GPUs torch sees, asked in another process: the driver stays clean of CUDA."""
    devices = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd")
    if not devices or importlib.util.find_spec("torch") is None:
        return 0
    script = "import torch; print(torch.cuda.device_count())"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    return int(shown.stdout or 0)


GPUS = _count()
RANKS = min(GPUS, 2)

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="needs a GPU that torch can use"),
    pytest.mark.limit(300),  # torch with CUDA is several gigabytes to load
]


class Rank:
    def __init__(self, join: bool = True) -> None:
        if join:
            self.join()

    def join(self, **kw: object) -> None:
        import rankwise.torch

        rankwise.torch.init_process_group(**{"timeout": 120, **kw})

    def leave(self) -> None:
        import torch.distributed

        torch.distributed.destroy_process_group()

    def total(self) -> tuple[float, str, str]:
        """The sum of 10 ** rank, the device that it was made on, the backend that made it."""
        import torch

        # No device is named: it is the current one, which joining has chosen.
        value = torch.tensor([10.0 ** worker_info().rank]).cuda()
        torch.distributed.all_reduce(value)
        torch.distributed.barrier()
        return value.item(), str(value.device), torch.distributed.get_backend()

    def sees(self) -> tuple[int, str, str]:
        """How many GPUs this process sees, the rank's own, and what it is."""
        import torch

        import rankwise.torch

        own = rankwise.torch.device()
        return torch.cuda.device_count(), str(own), str(torch.cuda.get_device_properties(own).uuid)


@pytest.fixture(params=["spawn", "forkserver"])
def start(request: pytest.FixtureRequest) -> dict[str, object]:
    return {} if request.param == "spawn" else {"start_method": "forkserver", "preload": ("torch",)}


@pytest.mark.parametrize("devices", ["isolated", "shared"])
def test_nccl_and_the_ranks_own_gpu_are_chosen(devices, start):
    with WorkerGroup(Rank, RANKS, devices=devices, **start) as group:
        for _ in range(2):
            for rank, (total, device, backend) in enumerate(group.call(Rank.total)):
                assert (total, backend) == (float("1" * RANKS), "nccl")
                assert device == f"cuda:{rank if devices == 'shared' else 0}"
            group.call(Rank.leave)
            group.call(Rank.join)
        group.call(Rank.leave)


def test_an_isolated_rank_sees_its_own_gpu_alone(start):
    with WorkerGroup(Rank, RANKS, args=(False,), devices="isolated", **start) as group:
        seen = group.call(Rank.sees)
    assert [(count, device) for count, device, _ in seen] == [(1, "cuda:0")] * RANKS
    assert len({uuid for _, _, uuid in seen}) == RANKS


def test_a_list_of_devices_is_kept_to():
    order = list(reversed(range(RANKS)))
    with (
        WorkerGroup(Rank, RANKS, args=(False,), devices="isolated") as straight,
        WorkerGroup(Rank, RANKS, args=(False,), devices=order) as turned,
    ):
        uuids = [uuid for _, _, uuid in straight.call(Rank.sees)]
        assert [uuid for _, _, uuid in turned.call(Rank.sees)] == uuids[::-1]


def test_without_devices_it_is_gloo_on_the_cpu():
    with WorkerGroup(Rank, RANKS) as group:
        assert {backend for _, _, backend in group.call(Rank.total)} == {"gloo"}


def test_gloo_may_be_taken_on_a_gpu():
    with WorkerGroup(Rank, RANKS, args=(False,), devices="isolated") as group:
        group.call(Rank.join, backend="gloo")
        assert {backend for _, _, backend in group.call(Rank.total)} == {"gloo"}


def test_more_ranks_than_gpus_are_told():
    told = pytest.raises(RuntimeError, match=f"rank {GPUS} of workers has device {GPUS}")
    with WorkerGroup(Rank, GPUS + 1, args=(False,), devices="shared") as group, told:
        group[GPUS].call(Rank.join)


# -- tensors as arguments and results ----------------------------------------------------------


class Holder:
    """In a driver of its own, so that the tests' stays clean of CUDA, it holds what it is given."""

    def __init__(self, given: object = None) -> None:
        self.kept: object = given

    def add(self, tensor, number):
        tensor += number
        self.kept = tensor
        return float(tensor.sum()), str(tensor.device)

    def total(self):
        return float(self.kept.sum())

    def make(self, size, value, index=0):
        import torch

        return torch.full((size,), float(value), device=f"cuda:{index}")

    def used(self):
        """Bytes of this rank's tensors on its GPU."""
        import gc

        import torch

        gc.collect()
        return torch.cuda.memory_allocated()


def drive(body: str, seconds: float = 240.0) -> None:
    """Run `body`, with `Holder`, in a driver of its own, which may have a CUDA context."""
    source = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import gc, torch
from rankwise import RemoteError, WorkerGroup, per_rank
from test_cuda import GPUS, Holder
def raises(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")
{textwrap.dedent(body)}
print("all of it")
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.stdout.endswith("all of it\n"), done.stderr


@pytest.mark.parametrize("size", [1, 1000, 50_000_000])
def test_a_gpu_tensor_arrives_and_is_each_ranks_own(size):
    drive(f"""
    with WorkerGroup(Holder, 3, devices=[0, 0, 0]) as group:
        for value in range(1, 4):
            given = torch.full(({size},), float(value), device="cuda:0")
            future = group.submit("add", given, 1)
            given += 50  # in the stream's order, which comes after the copy
            for total, device in future.result():
                assert abs(total / {size} - value - 1) < 1e-3, total
                assert device == "cuda:0"
            assert abs(float(given.mean()) - value - 50) < 1e-3
        group[0].call("add", torch.zeros({size}, device="cuda:0"), 0)
        assert abs(group[2].call("total") / {size} - 4) < 1e-3
    """)


def test_results_on_a_gpu_arrive_and_outlive_their_rank():
    drive("""
    with WorkerGroup(Holder, 1, devices=[0]) as group:
        kept = [group[0].call("make", 1000 + n, n) for n in range(20)]
        views = group[0].call(lambda worker: torch.arange(64.0, device="cuda").reshape(8, 8).T)
    for n, tensor in enumerate(kept):
        tensor += 1
        assert tensor.device.type == "cuda" and float(tensor.sum()) == (1000 + n) * (n + 1)
    assert torch.equal(views.cpu(), torch.arange(64.0).reshape(8, 8).T)
    """)


def test_what_was_sent_is_freed_on_both_sides():
    drive("""
    MB = 1 << 20
    with WorkerGroup(Holder, 2, devices=[0, 0]) as group:
        for _ in range(20):
            group.call("add", torch.ones(25 * MB, device="cuda:0"), 1)  # 100 MB each
            group.submit("make", 25 * MB, 1)  # which nobody fetches
            group.flush()
            gc.collect()
        group.call("add", torch.ones(1, device="cuda:0"), 1)
        group.call("make", 1, 1)
        assert torch.cuda.memory_allocated() <= 201 * MB, torch.cuda.memory_allocated()
        assert max(group.call("used")) <= 201 * MB, group.call("used")
    """)


def test_dtypes_layouts_and_parameters_on_a_gpu_arrive():
    drive("""
    def echo(worker, *values):
        return values
    with WorkerGroup(Holder, 1, devices=[0]) as group:
        base = torch.arange(64.0, device="cuda:0").reshape(8, 8)
        sent = [base, base.T, base[::2, 1:5], base[0].expand(5, 8), base[:0], base[3, 3]]
        kinds = (torch.bfloat16, torch.int8, torch.complex64, torch.bool)
        sent += [base.to(kind) for kind in kinds]
        sent += [torch.nn.Parameter(base.clone()), base.clone().requires_grad_(), base.cpu()]
        for one, got in zip(sent, group[0].call(echo, *sent)):
            assert torch.equal(one.cpu(), got.cpu()) and one.dtype == got.dtype
            assert type(one) is type(got) and one.requires_grad == got.requires_grad
            assert one.device == got.device
        twice = group[0].call(lambda worker, one, two: one is two, base, base)
        assert twice
    """)


def test_a_constructor_argument_on_a_gpu_arrives():
    drive("""
    with WorkerGroup(Holder, 2, args=(torch.full((1000,), 3.0, device="cuda:0"),)) as group:
        assert group.call("total") == [3000.0] * 2
    """)


def test_a_rank_that_does_not_see_the_gpu_says_so_and_goes_on():
    drive("""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    with WorkerGroup(Holder, 1, env=hidden) as group:
        said = raises(RuntimeError, lambda: group[0].call("add", torch.ones(5, device="cuda:0"), 1))
        assert "does not see: it sees no GPU" in said, said
        assert group[0].call("add", torch.ones(5), 1) == (10.0, "cpu")
    """)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_the_gpu_is_found_under_whatever_index_the_rank_has_it():
    drive("""
    with WorkerGroup(Holder, 2, devices=[1, 0]) as group:
        total, device = group[0].call("add", torch.ones(5, device="cuda:1"), 1)
        assert (total, device) == (10.0, "cuda:0")
        got = group[0].call("make", 5, 2)
        assert got.device.index == 1 and float(got.sum()) == 10
        said = raises(RuntimeError, lambda: group[1].call("add", torch.ones(5, device="cuda:1"), 1))
        assert "does not see" in said, said
    """)


def test_a_driver_that_does_not_see_the_gpu_is_told_so():
    drive("""
    import os
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with WorkerGroup(Holder, 1, env={"CUDA_VISIBLE_DEVICES": "0"}) as group:
        said = raises(RemoteError, lambda: group[0].call("make", 5, 1))
        assert "could not be rebuilt in the driver" in said and "sees no GPU" in said, said
        assert group[0].call("used") >= 0
    """)
