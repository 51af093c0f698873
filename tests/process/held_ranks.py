"""The ranks of test_held.py and test_keeper.py."""

from __future__ import annotations

import time

from rankwise import worker_info


class Held:
    def echo(self, value: object = None) -> object:
        return value

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ValueError("fail as told")

    def fail_or_nap(self, rank: int) -> None:
        """`rank` fails, the others nap for a while."""
        if worker_info().rank == rank:
            self.fail()
        self.nap(8.0)

    def chatter(self, seconds: float) -> None:
        """Print a line every few milliseconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            print("chatter", flush=True)
            time.sleep(0.005)

    def text(self, size: int) -> str:
        return "x" * size
