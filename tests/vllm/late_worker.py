"""vLLM's CPU worker, whose output is late, as a GPU's is under async scheduling."""

from __future__ import annotations

import threading
from typing import Any

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
