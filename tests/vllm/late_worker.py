"""vLLM's CPU worker: with output that is late, as a GPU's is under async scheduling; warmed up."""

from __future__ import annotations

import threading
from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker


class LateOutput(AsyncModelRunnerOutput):
    def __init__(self, output: Any, rank: int) -> None:
        self.output = output
        self.rank = rank

    def get_output(self) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        print(f"FETCHED by {self.rank}", flush=True)
        return self.output


class LateWorker(CPUWorker):
    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        return output if output is None else LateOutput(output, self.rank)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return output if output is None else LateOutput(output, self.rank)


class WarmWorker(CPUWorker):
    """vLLM 0.32 warms nothing up where it compiles nothing, and then has no buffers for what a
    pipeline's later stage receives: eager ones fail in their first step, under any executor."""

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        return super().determine_available_memory()
