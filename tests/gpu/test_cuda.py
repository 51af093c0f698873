"""What needs a GPU: nccl, the choice of the device, one visible device a rank.

Everything here is skipped where there is none. With one GPU the groups have one rank.
"""

from __future__ import annotations

import glob
import importlib.util
import subprocess
import sys

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
