"""vLLM on rankwise: `LLM(..., distributed_executor_backend="rankwise.vllm.RankwiseExecutor")`.

    EngineCore > RankwiseExecutor.execute_model > WorkerGroup ==call==> Rank > vLLM's own worker
    its future < the output rank's value                      <=value== its output, late or not

vLLM's engine process is the driver, and each of vLLM's workers a rank: processes, calls, deaths and
the end are rankwise's, all else is vLLM's own. On the public names of rankwise alone; nothing else
of rankwise imports this file.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from concurrent.futures import Future
from typing import Any

from vllm.version import __version__, __version_tuple__

from rankwise import GroupBroken, WorkerGroup

TESTED = (0, 32)  # the release of vLLM whose executors and workers have this interface
if __version_tuple__[:2] != TESTED and "RANKWISE_VLLM_UNTESTED" not in os.environ:
    raise ImportError(
        f"rankwise.vllm is made for vLLM {'.'.join(map(str, TESTED))}, and this is {__version__}: "
        "install that, or a newer rankwise. To try it all the same set RANKWISE_VLLM_UNTESTED=1"
    )

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.torch_utils import set_torch_threads_for_runtime
from vllm.v1.executor.abstract import Executor

from rankwise._vllm_options import group_options
from rankwise._vllm_rank import Rank, output_rank

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["RankwiseExecutor"]

logger = init_logger("vllm.rankwise")


class RankwiseExecutor(Executor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """vLLM's executor whose workers are the ranks of a `rankwise.WorkerGroup`.

    What else WorkerGroup is to get stands in vLLM's `additional_config`, under "rankwise":
    `{"rankwise": {"start_method": "spawn", "start_timeout": 600}}`.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        config: VllmConfig = self.vllm_config
        parallel = config.parallel_config
        options = group_options(config, Rank.__module__)
        # vLLM compares this name: the scheduler waits for the reports of all of a connector's
        # ranks where it is "mp", and of one where it is not; offloaded caches are shared, or not.
        # Our outputs are joined and our ranks placed as under "mp", and both the scheduler and the
        # ranks are made after this.
        parallel.distributed_executor_backend = "mp"
        self.output_rank = output_rank(parallel)
        self._callback: Callable[[], None] | None = None
        me = weakref.ref(self)  # a group that kept its executor would keep both from collection

        def failed(broken: GroupBroken) -> None:
            if (executor := me()) is not None:
                logger.error("%s", broken.first)
                executor._tell()

        _show_our_log()
        self._group = WorkerGroup(
            Rank.make, parallel.world_size, args=(config,), on_failure=failed, **options
        )
        set_torch_threads_for_runtime()  # this process only schedules

    # -- how it is ----------------------------------------------------------------------------

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        if not self._group.healthy:  # it broke before there was anybody to tell
            self._tell()

    def _tell(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def check_health(self) -> None:
        if (failure := self._group.failure) is not None:
            raise failure

    @property
    def is_failed(self) -> bool:
        """What vLLM's fault tolerance asks, to know that this engine will not recover."""
        return self._group.failure is not None

    def shutdown(self) -> None:
        if (group := getattr(self, "_group", None)) is not None:
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
        # "continue": a failure is the caller's, however long other ranks take. After that of a step
        # they wait in a collective for ever, and the group has to go.
        view = self._group.options(on_error="continue")
        joint = (kv_output_aggregator, ec_output_aggregator)
        return self._call(view, method, timeout, args, kwargs, non_block, unique_reply_rank, joint)

    def _step(self, method: str, *args: Any, non_block: bool = False, joined: bool = False) -> Any:
        """A call whose value is that of the output rank, `joined` with what connectors have."""
        timeout = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        joint = (self.kv_output_aggregator, self.ec_output_aggregator) if joined else ()
        rank = self.output_rank
        return self._call(self._group, method, timeout, args, None, non_block, rank, joint)

    def _call(
        self,
        view: Any,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        non_block: bool,
        reply_rank: int | None,
        joint: Sequence[Any],
    ) -> Any:
        if not isinstance(method, str):
            # By value: a function of a class would be sent as its name, which the worker has not.
            method = functools.partial(method)
        aggregators = [one for one in joint if one]
        if not aggregators:
            return view.collective_rpc(method, timeout, args, kwargs, non_block, reply_rank)

        def aggregate(outputs: list[Any]) -> Any:
            rank = reply_rank or 0
            value = outputs[rank]
            for one in aggregators:  # each adds its own to what the rank has
                value = one.aggregate(outputs, output_rank=rank)
            return value

        answers = view.collective_rpc(method, timeout, args, kwargs, non_block)
        return _then(answers, aggregate) if non_block else aggregate(answers)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        return self._step("execute_model", scheduler_output, non_block=non_block, joined=True)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        return self._step("sample_tokens", grammar_output, non_block=non_block, joined=True)

    def execute_dummy_batch(self) -> None:
        self._step("execute_dummy_batch")

    def take_draft_token_ids(self) -> Any:
        return self._step("take_draft_token_ids")


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


def _show_our_log() -> None:
    """What rankwise logs goes where vLLM's own log goes, unless the user has said where."""
    ours, theirs = logging.getLogger("rankwise"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.getEffectiveLevel())
