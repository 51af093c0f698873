"""Ranks without a model, for the executor itself: without vLLM, whose import takes a rank 20 s."""

from __future__ import annotations

import os
import signal
import time

from rankwise import Late, worker_info


class Model:
    """What an executor calls of a rank."""

    def __init__(self, config):
        self.backend = config.parallel_config.distributed_executor_backend
        self.rank = worker_info().rank
        self.steps = []

    @classmethod
    def make(cls, config):
        return cls(config)

    def get_backend(self):
        return self.backend

    def variable(self, name):
        return os.environ.get(name)

    def execute_model(self, step):
        if step == "hangs but on rank 1":
            if self.rank != 1:
                self.pause()
            raise KeyError("nothing of that name")
        self.steps.append(step)
        return Late(lambda: f"{step} by {self.rank}")

    def sample_tokens(self, grammar):
        return self.rank, grammar

    def take_draft_token_ids(self):
        return self.rank

    def execute_dummy_batch(self):
        self.steps.append("dummy")

    def get_steps(self):
        return self.steps

    def fails_on_rank_1(self):
        if self.rank == 1:
            raise KeyError("nothing of that name")
        time.sleep(0.5)  # its work

    def pause(self):
        os.kill(os.getpid(), signal.SIGSTOP)


class Tools:
    """A user's functions: their names mean nothing to a worker."""

    @staticmethod
    def doubled(rank):
        return 2 * rank.rank

    def get_steps(rank):
        return "not the worker's own"
