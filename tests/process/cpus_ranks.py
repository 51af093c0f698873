"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os


class Worker:
    def __init__(self):
        self.at_first = os.sched_getaffinity(0)

    def where(self):
        return sorted(self.at_first), os.environ["OMP_NUM_THREADS"]
