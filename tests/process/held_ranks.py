"""The ranks of test_held.py."""

from __future__ import annotations

import time


class Held:
    def echo(self, value: object = None) -> object:
        return value

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ValueError("fail as told")

    def chatter(self, seconds: float) -> None:
        """Print a line every few milliseconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            print("chatter", flush=True)
            time.sleep(0.005)

    def text(self, size: int) -> str:
        return "x" * size
