"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Worker:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def pids(self) -> tuple[int, int]:
        return os.getpid(), os.getppid()

    def die(self, number: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), number)

    def stay(self) -> None:
        threading.Event().wait(3600)


class FailsTheSecondTime:
    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) > 1:
            raise ValueError("the weights are gone")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Meets:
    def __init__(self) -> None:
        import torch.distributed

        torch.distributed.init_process_group("gloo")

    def total(self) -> int:
        import torch

        mine = torch.tensor(torch.distributed.get_rank() + 1)
        torch.distributed.all_reduce(mine)
        return int(mine)


class TakesAnything:
    def __init__(self, anything: Any) -> None:
        pass


class SlowTheSecondTime:
    def __init__(self, path: str) -> None:
        if os.path.exists(path):
            threading.Event().wait(3600)
        open(path, "w").close()
