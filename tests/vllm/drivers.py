"""What the tests have vLLM do, in processes of their own: `python drivers.py WHAT CHECKPOINT ...`.

What happens is printed as a line `EVENT {"name": ..., "value": ...}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from checkpoint import PROMPTS


def tell(name: str, value: Any = None) -> None:
    print("EVENT " + json.dumps({"name": name, "value": value}), flush=True)


def engine_options(checkpoint: str, **options: Any) -> dict[str, Any]:
    return {
        "model": checkpoint,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "rankwise.vllm.RankwiseExecutor",
        **options,
    }


def make(checkpoint: str, **options: Any) -> Any:
    from vllm import LLM

    began = time.monotonic()
    llm = LLM(**engine_options(checkpoint, disable_log_stats=True, **options))
    tell("ready", time.monotonic() - began)
    return llm


def generate(llm: Any, prompts: list[str], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def executor_named(name: str) -> Any:
    """`uni`, `mp`, or for pipeline parallel our class itself: vLLM asks a name for nothing."""
    if name == "class":
        from rankwise.vllm import RankwiseExecutor

        return RankwiseExecutor
    return "rankwise.vllm.RankwiseExecutor" if name == "rankwise" else name


# -- what the tests name ---------------------------------------------------------------------------


def tokens(checkpoint: str, executor: str, tp: str, pp: str = "1", worker: str = "auto") -> None:
    """What the prompts go on with."""
    llm = make(
        checkpoint,
        tensor_parallel_size=int(tp),
        pipeline_parallel_size=int(pp),
        distributed_executor_backend=executor_named(executor),
        worker_cls=worker,
    )
    tell("tokens", generate(llm, PROMPTS, 60))


def tour(checkpoint: str) -> None:
    """Two ranks: several requests, calls of functions, idling."""
    llm = make(checkpoint, tensor_parallel_size=2)
    tell("tokens", generate(llm, PROMPTS, 60))
    tell("affinity", llm.collective_rpc(affinity))
    offset = 40
    tell("function", llm.collective_rpc(lambda worker, n: worker.rank + n + offset, args=(2,)))
    tell("method", [sorted(each) for each in llm.collective_rpc("get_supported_tasks")])
    try:
        llm.collective_rpc(fails_on_rank_1)
    except Exception as error:
        tell("failed", str(error))
    tell("again", generate(llm, PROMPTS[:1], 100))
    time.sleep(1.0)
    tell("idle")
    sys.stdin.readline()


def affinity(worker: Any) -> Any:
    import torch

    return sorted(os.sched_getaffinity(0)), torch.get_num_threads(), os.getpid()


def fails_on_rank_1(worker: Any) -> int:
    if worker.rank == 1:
        raise KeyError("nothing of that name")
    return worker.rank


def dies_in_step(checkpoint: str, step: str) -> None:
    """Rank 1 is killed in one of its steps, by itself, so that it is known when."""
    llm = make(checkpoint, tensor_parallel_size=2)
    generate(llm, PROMPTS[:1], 8)
    llm.collective_rpc(arm, args=(int(step),))
    tell("armed")
    sys.stdin.readline()
    try:
        generate(llm, PROMPTS, 400)
    except Exception as error:
        tell("heard", [time.time(), type(error).__name__, str(error)])
    tell("over")


def arm(worker: Any, steps: int) -> int:
    real = worker.worker.execute_model

    def execute_model(scheduler_output: Any) -> Any:
        nonlocal steps
        steps -= 1
        if steps == 0:
            print(f"DIES at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(scheduler_output)

    if worker.rank == 1:
        worker.worker.execute_model = execute_model
    return os.getpid()


def streams(checkpoint: str) -> None:
    """AsyncLLM: several requests at once, each token by token; one of them is given up."""
    import asyncio

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    async def one(engine: Any, number: int, count: int) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        prompt = PROMPTS[number]
        return [
            list(out.outputs[0].token_ids)
            async for out in engine.generate(prompt, sampling, request_id=f"{number}-{count}")
        ]

    async def main() -> None:
        arguments = AsyncEngineArgs(**engine_options(checkpoint, tensor_parallel_size=2))
        engine = AsyncLLM.from_engine_args(arguments)
        tell("ready")
        given_up = asyncio.ensure_future(one(engine, 0, 450))
        deltas = await asyncio.gather(*(one(engine, n, 60) for n in range(len(PROMPTS))))
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        tell("deltas", deltas)
        await engine.check_health()
        tell("healthy")
        engine.shutdown()

    asyncio.run(main())
    tell("over")


def idles(checkpoint: str) -> None:
    """Asks vLLM for nothing, but whether it is well, until it is not."""
    import asyncio

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def main() -> None:
        arguments = AsyncEngineArgs(**engine_options(checkpoint, tensor_parallel_size=2))
        engine = AsyncLLM.from_engine_args(arguments)
        tell("idle")
        while True:
            try:
                await engine.check_health()
            except Exception as error:
                tell("heard", [time.time(), type(error).__name__])
                break
            await asyncio.sleep(0.01)
        engine.shutdown()

    asyncio.run(main())
    tell("over")


def waits(checkpoint: str) -> None:
    """Generates until somebody ends it."""
    llm = make(checkpoint, tensor_parallel_size=2)
    generate(llm, PROMPTS, 8)
    tell("running")
    while True:
        generate(llm, PROMPTS, 400)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions, by value
    globals()[sys.argv[1]](*sys.argv[2:])
