"""vLLM on rankwise: `LLM(..., distributed_executor_backend="rankwise.vllm.RankwiseExecutor")`.

    EngineCore > RankwiseExecutor.execute_model > WorkerGroup ==call=> Rank.execute_model > vLLM's own
    its future < the output rank's value                      <=value==  output, late or not

vLLM's engine process is the driver, and each of vLLM's workers a rank: the processes, the calls,
the deaths and the end are rankwise's, all else is vLLM's own. On the public names of rankwise alone.
Nothing else of rankwise imports this file.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from concurrent.futures import Future
from typing import Any

from vllm.version import __version__ as _VERSION

from rankwise import GroupBroken, WorkerGroup, worker_info

TESTED = ("0.32",)  # releases of vLLM whose executors and workers have this interface
if _VERSION.rpartition(".")[0] not in TESTED and not os.environ.get("RANKWISE_VLLM_UNTESTED"):
    raise ImportError(
        f"rankwise.vllm is made for vLLM {', '.join(TESTED)}, and this is {_VERSION}: install one "
        "of these, or a newer rankwise; to try it all the same, set RANKWISE_VLLM_UNTESTED=1"
    )

import vllm.envs as envs  # noqa: E402  # what is below is not there in every release
from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed import (  # noqa: E402
    destroy_distributed_environment,
    destroy_model_parallel,
)
from vllm.logger import configure_logging, init_logger  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.tracing import maybe_init_worker_tracer  # noqa: E402
from vllm.utils.ompmultiprocessing import OMPProcessManager  # noqa: E402
from vllm.utils.torch_utils import (  # noqa: E402
    OMP_NUM_THREADS_SET_BY_VLLM,
    set_torch_threads_for_runtime,
)
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.executor.vllm_net_devices import set_worker_net_device  # noqa: E402
from vllm.v1.outputs import AsyncModelRunnerOutput  # noqa: E402
from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Rank", "RankwiseExecutor"]

logger = init_logger("vllm.rankwise")


class RankwiseExecutor(Executor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """vLLM's executor whose workers are the ranks of a `rankwise.WorkerGroup`.

    What WorkerGroup is to get besides may stand in vLLM's `additional_config`, under "rankwise":
    `{"rankwise": {"start_method": "spawn", "start_timeout": 600}}`.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        config: VllmConfig = self.vllm_config
        parallel = config.parallel_config
        if parallel.enable_elastic_ep:
            raise ValueError("RankwiseExecutor cannot change the number of its ranks: leave out "
                             "enable_elastic_ep, or use distributed_executor_backend='mp'")
        # The first tensor-parallel rank of the last pipeline stage has what is sampled.
        self.output_rank = parallel.world_size - (
            parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
        )
        self._callback: Callable[[], None] | None = None
        me = weakref.ref(self)  # the group must not keep its executor: nobody would collect them

        def failed(broken: GroupBroken) -> None:
            if (executor := me()) is not None:
                executor._failed(broken)

        _show_our_log()
        name = "vllm" if parallel.data_parallel_size == 1 else f"vllm-dp{parallel.data_parallel_rank}"
        options = _options(config) | config.additional_config.get("rankwise", {})
        self._group = WorkerGroup(
            Rank.make, parallel.world_size, args=(config,), name=name, on_failure=failed, **options
        )
        set_torch_threads_for_runtime()  # this process only schedules

    def _failed(self, broken: GroupBroken) -> None:
        logger.error("%s", broken.first)
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        if self._group.failure is not None:  # it may have come before there was anybody to tell
            self._callback = None
            callback()

    def check_health(self) -> None:
        failure = self._group.failure
        if failure is not None:
            raise failure

    def shutdown(self) -> None:
        group = getattr(self, "_group", None)
        if group is not None:
            group.close(envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS)

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    # -- calls --------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        kv_output_aggregator: Any = None,
        ec_output_aggregator: Any = None,
    ) -> Any:
        """What every rank returns, as a list; of `unique_reply_rank` alone, or with an aggregator
        what that makes of them, the bare value. `non_block`: a future of it."""
        aggregators = [one for one in (kv_output_aggregator, ec_output_aggregator) if one]
        if not aggregators:
            return self._group.collective_rpc(
                method, timeout, args, kwargs, non_block, unique_reply_rank
            )
        answers = self._group.collective_rpc(method, timeout, args, kwargs, non_block)

        def aggregate(outputs: list[Any]) -> Any:
            rank = unique_reply_rank or 0
            value = outputs[rank]
            for one in aggregators:
                value = one.aggregate(outputs, output_rank=rank)
            return value

        return _then(answers, aggregate) if non_block else aggregate(answers)

    def _step(self, method: str, *args: Any, non_block: bool = False, whole: bool = False) -> Any:
        """A call whose value is that of the output rank."""
        return self.collective_rpc(
            method,
            envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            args,
            None,
            non_block,
            self.output_rank,
            self.kv_output_aggregator if whole else None,
            self.ec_output_aggregator if whole else None,
        )

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        return self._step("execute_model", scheduler_output, non_block=non_block, whole=True)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        return self._step("sample_tokens", grammar_output, non_block=non_block, whole=True)

    def execute_dummy_batch(self) -> None:
        self._step("execute_dummy_batch")

    def take_draft_token_ids(self) -> Any:
        return self._step("take_draft_token_ids")


class Rank(WorkerWrapperBase):  # type: ignore[misc]
    """One of vLLM's workers, ready to run the model."""

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
        maybe_init_worker_tracer("vllm.worker", "worker", f"Worker_{info.rank}")
        rank = cls(rpc_rank=info.local_rank, global_rank=info.rank)
        arguments = {
            "vllm_config": config,
            "local_rank": info.local_rank,
            "rank": info.rank,
            "distributed_init_method": f"tcp://{info.master_addr}:{info.master_port}",
            "is_driver_worker": info.rank % parallel.tensor_parallel_size == 0,
        }
        rank.init_worker([arguments] * info.world_size)
        rank.init_device()
        logger.info("device and process groups are ready after %.1f s", time.monotonic() - began)
        rank.load_model()
        logger.info("the model is loaded after %.1f s", time.monotonic() - began)
        current_platform.update_block_size_for_backend(config)
        envs.enable_envs_cache()
        return rank

    def execute_model(self, scheduler_output: Any) -> Any:
        return _value(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return _value(self.worker.sample_tokens(grammar_output))

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()


def _value(output: Any) -> Any:
    return output.get_output() if isinstance(output, AsyncModelRunnerOutput) else output


def _then(answers: Future[Any], change: Callable[[Any], Any]) -> Future[Any]:
    """A future of `change(answers.result())`; changes are made one at a time, in order."""
    changed: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        try:
            changed.set_result(change(done.result()))
        except Exception as error:
            changed.set_exception(error)

    answers.add_done_callback(settle)
    return changed


def _options(config: VllmConfig) -> dict[str, Any]:
    """How the CPUs are shared: a rank that computes on all of them stands in the others' way."""
    parallel = config.parallel_config
    local = parallel.world_size * max(1, parallel.data_parallel_size_local)
    if not current_platform.is_cpu():
        # To load the weights by; vLLM's workers then go on with one, unless the user has said more.
        own = "OMP_NUM_THREADS" in os.environ
        return {"env": {} if own else {OMP_NUM_THREADS_SET_BY_VLLM: "1"}}
    try:
        cpus = OMPProcessManager(config).cpu_lists  # as VLLM_CPU_OMP_THREADS_BIND says
    except AssertionError:  # it wants a NUMA node a rank
        if envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
            raise
        cpus = "split" if local == parallel.world_size else None
    return {"cpus": cpus} if cpus else {"threads": max(1, len(os.sched_getaffinity(0)) // local)}


def _show_our_log() -> None:
    """What rankwise logs goes where vLLM's own log goes, unless the user has said where."""
    ours, theirs = logging.getLogger("rankwise"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.getEffectiveLevel())
