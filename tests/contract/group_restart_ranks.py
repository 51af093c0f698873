"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import threading
from typing import Any

from rankwise import worker_info


class Counting:
    """Counts its calls, and knows what it was made of."""

    def __init__(self, made_of: list[str]) -> None:
        self.made_of = made_of
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def get(self) -> list[str]:
        return self.made_of


class FailsWhen:
    def __init__(self, told: list[bool]) -> None:
        if told[0]:
            raise ValueError("told to")


def stuck_but_one(worker: Any) -> None:
    if worker_info().rank == 0:
        raise ValueError("first")
    threading.Event().wait(1)
