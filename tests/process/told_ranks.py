"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import signal
from typing import Any


class Worker:
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Fails:
    """Rank 1 does, when it is made."""

    def __init__(self, how: str) -> None:
        if os.environ["RANK"] == "1":
            if how == "exits":
                os._exit(3)
            raise ValueError("no weights")


class FailsTheSecondTime:
    def __init__(self, path: str) -> None:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) == 2:
            os._exit(3)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def die(worker: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
