"""What the parent sets in its own environment before it starts workers, and what it reads there."""

from __future__ import annotations

import os
import sys
from typing import Any

from rankwise.compat._vllm_worker import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from multiprocessing.context import BaseContext


def mp_context() -> BaseContext:
    """The multiprocessing context that VLLM_WORKER_MULTIPROC_METHOD names. By default "spawn",
    which is how rankwise starts a worker whatever the variable says."""
    import multiprocessing

    return multiprocessing.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") or "spawn")


def set_multiprocessing_worker_envs(parallel_config: object) -> None:
    """Set what workers shall inherit in the caller's own environment, before they are started.

    VLLM_WORKER_MULTIPROC_METHOD becomes "spawn", with the reason logged, where CUDA is initialised
    or the process is a Ray actor. Where OMP_NUM_THREADS is unset and torch is there and uses more
    than one thread, that becomes 1, in the variable and in torch.
    """
    _force_spawn_where_needed()
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        import torch
    except ImportError:
        return
    threads = torch.get_num_threads()
    if threads > 1:
        logger.warning(
            "Torch uses 1 thread a process from now on, not %d: the workers would compete for the "
            "CPUs. Set OMP_NUM_THREADS before the start to choose another number.",
            threads,
        )
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def _force_spawn_where_needed() -> None:
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn":
        return
    # Who has initialised CUDA, or runs in an actor, has imported the module: we import none.
    torch: Any = sys.modules.get("torch")
    ray: Any = sys.modules.get("ray")
    reason = None
    if torch is not None and torch.cuda.is_initialized():
        reason = "CUDA is initialized"
    elif ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        if context.get_actor_id() is not None:
            # A worker that calls ray.init() has to find this cluster, and inherits variables alone.
            os.environ["RAY_ADDRESS"] = context.gcs_address
            reason = "the process is a Ray actor"
    if reason is not None:
        logger.warning("VLLM_WORKER_MULTIPROC_METHOD is set to 'spawn': %s.", reason)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
