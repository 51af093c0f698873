"""The rank of `rankwise.vllm`: one of vLLM's workers, made ready to run the model.

make > vLLM's own worker: device > torch's groups, by this group's rendezvous > weights
execute_model, sample_tokens > its output, or a Late of what is still on the device; only the output
  rank's is fetched, unless a connector's is joined with it
all else > vLLM's worker
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.logger import configure_logging, init_logger
from vllm.platforms import current_platform
from vllm.tracing import maybe_init_worker_tracer
from vllm.utils.system_utils import decorate_logs
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.vllm_net_devices import set_worker_net_device
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from rankwise import Late, worker_info

try:
    from setproctitle import getproctitle
except ImportError:  # vLLM does without it too
    pass
else:
    getproctitle()  # it looks for the command's place in memory: a forked rank's is not found

logger = init_logger("vllm.rankwise")


def output_rank(parallel: Any) -> int:
    """The first tensor-parallel rank of the last pipeline stage: it has what is sampled."""
    stage = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    return int(parallel.world_size - stage)


def _unlink_names(port: int, rank: int) -> None:
    """Take the names from what vLLM's communicators on CPUs share in /dev/shm.

    C++ does it at an exit that no forked rank comes to, nor one that is killed. As a group's
    communicator is made, vLLM waits until all its ranks have mapped what it shares.
    """
    for name in os.listdir("/dev/shm"):
        shared = re.fullmatch(rf"{port}-.*\[([\d-]+)\]-cpushm_\d+", name)
        if shared and str(rank) in shared[1].split("-"):
            try:
                os.unlink(f"/dev/shm/{name}")
            except FileNotFoundError:
                pass  # another rank of the group was faster


class Rank(WorkerWrapperBase):  # type: ignore[misc]  # vLLM is not there when types are checked
    """One of vLLM's workers, by vLLM's own wrapper: what it has not, the worker has."""

    _answers = True  # a step's value is this rank's, or is joined with that of others
    _has_device = False  # the thread that fetches late output has set it

    @classmethod
    def make(cls, config: VllmConfig) -> Rank:
        began = time.monotonic()
        info = worker_info()
        parallel = config.parallel_config
        if logging_config := getattr(config, "logging_config", None):
            configure_logging(logging_config)
        if parallel.assigned_physical_gpu_ids is not None:
            from vllm.platforms.interface import set_assigned_physical_gpu_ids

            set_assigned_physical_gpu_ids(parallel.assigned_physical_gpu_ids)
        set_worker_net_device(info.local_rank, config)
        decorate_logs(f"Worker_{info.rank}")
        maybe_init_worker_tracer("vllm.worker", "worker", f"Worker_{info.rank}")
        rank = cls(rpc_rank=info.local_rank, global_rank=info.rank)
        connectors = (config.kv_transfer_config, config.ec_transfer_config)
        rank._answers = info.rank == output_rank(parallel) or connectors != (None, None)
        arguments = {
            "vllm_config": config,
            "local_rank": info.local_rank,
            "rank": info.rank,
            "distributed_init_method": f"tcp://{info.master_addr}:{info.master_port}",
            "is_driver_worker": info.rank % parallel.tensor_parallel_size == 0,
        }
        rank.init_worker([arguments] * info.world_size)
        rank.init_device()
        _unlink_names(info.master_port, info.rank)
        # By its place in vLLM's groups, which are there now: Worker_PP1_TP0, also as its title.
        WorkerProc.setup_proc_title_and_log_prefix(enable_ep=parallel.enable_expert_parallel)
        logger.info("device and process groups are ready after %.1f s", time.monotonic() - began)
        rank.load_model()
        logger.info("the model is loaded after %.1f s", time.monotonic() - began)
        current_platform.update_block_size_for_backend(config)
        envs.enable_envs_cache()
        return rank

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._late(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._late(self.worker.sample_tokens(grammar_output))

    def _late(self, output: Any) -> Any:
        """`output`, or under async scheduling the promise of it: the next step is begun before."""
        if not isinstance(output, AsyncModelRunnerOutput):
            return output
        if not self._answers:
            return None  # nobody asks for it, and vLLM's own does not fetch it either
        promised: Any = output

        def get() -> Any:
            if not self._has_device:  # one thread runs all of these
                # The device is a thread's own. CUDA would otherwise open a context on device 0.
                if (device := getattr(self.worker, "device", None)) is not None:
                    current_platform.set_device(device)
                self._has_device = True
            return promised.get_output()

        return Late(get)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()
