"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import time


class Napper:
    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds
