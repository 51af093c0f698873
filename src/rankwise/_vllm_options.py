"""The options of the group of `rankwise.vllm`: from vLLM's config, and from its user.

worker class > preload
VLLM_CPU_OMP_THREADS_BIND > cpus      > group_options > WorkerGroup(...)
CPUs and replicas > threads, in env       ^ additional_config["rankwise"] wins over these
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.utils.torch_utils import OMP_NUM_THREADS_SET_BY_VLLM, startup_omp_num_threads

POLL = 0.01  # seconds: steps follow each other within less, and each sleep would cost its share


def group_options(config: VllmConfig, rank_module: str) -> dict[str, Any]:
    """What WorkerGroup gets besides the rank and what it is made of; `rank_module` defines it.

    Raises ValueError for what vLLM is asked and this executor cannot do.
    """
    parallel = config.parallel_config
    _refuse(parallel)
    given = config.additional_config  # a dict, or a platform's own class
    users = given.get("rankwise", {}) if isinstance(given, dict) else {}
    made: dict[str, Any] = {"name": _name(parallel), "start_method": "forkserver", "spin": POLL}
    if users.get("start_method", "forkserver") == "forkserver":  # spawned ranks share no imports
        made["preload"] = (rank_module, parallel.worker_cls.rpartition(".")[0])
    cpus, env = _share(config)
    made["cpus"] = cpus
    made |= users
    if env is not None and not {"threads", "cpus"} & users.keys():  # else he counts, not we
        made["env"] = _merged(env, users.get("env", {}))
    return made


def _refuse(parallel: Any) -> None:
    if parallel.enable_elastic_ep:
        raise ValueError("enable_elastic_ep needs distributed_executor_backend='mp' or 'ray'")
    if parallel.numa_bind:  # vLLM wraps each worker's interpreter in numactl, and ours are not
        raise ValueError(
            "numa_bind needs distributed_executor_backend='mp'. Or leave it out, and name each "
            'rank\'s CPUs: additional_config={"rankwise": {"cpus": [[0, 1], [2, 3]]}}'
        )


def _name(parallel: Any) -> str:
    # A replica of a model without experts is told that it is the only one, but not that it is the
    # first.
    replica = parallel.data_parallel_index
    return f"vllm-dp{replica}" if parallel.data_parallel_size > 1 or replica else "vllm"


def _share(config: VllmConfig) -> tuple[Any, list[dict[str, str]] | None]:
    """`cpus`, and an `env` a rank that says how many threads it has; None: they are not set.

    Each on all CPUs takes forty times as long.
    """
    parallel = config.parallel_config
    ranks = parallel.world_size
    local = ranks * max(1, parallel.data_parallel_size_local)
    on_cpus = current_platform.is_cpu()
    if on_cpus:
        try:
            cpus = OMPProcessManager(config).cpu_lists  # as VLLM_CPU_OMP_THREADS_BIND says
        except AssertionError as error:
            if envs.VLLM_CPU_OMP_THREADS_BIND != "auto" or "NUMA nodes" not in str(error):
                raise
            if local == ranks:  # it wants a node a rank; we do without
                return "split", None
            cpus = []
        if cpus:
            # As vLLM does, also where the engine has another number: these are its CPUs.
            return cpus, [{"OMP_NUM_THREADS": str(len(own))} for own in cpus]
    if "OMP_NUM_THREADS" in os.environ:
        return None, None
    env = {"OMP_NUM_THREADS": str(startup_omp_num_threads(local))}
    if not on_cpus:
        env[OMP_NUM_THREADS_SET_BY_VLLM] = "1"  # to load by: its worker then goes on with one
    return None, [env] * ranks


def _merged(ours: list[dict[str, str]], theirs: Any) -> Any:
    """An `env` a rank: `theirs`, a mapping or one a rank, over `ours`."""
    each = [theirs] * len(ours) if isinstance(theirs, Mapping) else theirs
    if not isinstance(each, list) or len(each) != len(ours):
        return theirs  # WorkerGroup says what is wrong with it
    # Where he counts threads himself, vLLM's mark would say that it was vLLM.
    return [
        own if not isinstance(own, Mapping) or "OMP_NUM_THREADS" in own else our | dict(own)
        for our, own in zip(ours, each, strict=True)
    ]
