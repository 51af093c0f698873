"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os


class Worker:
    def __init__(self):
        self.ran = []

    def echo(self, value):
        self.ran.append(value)
        return value

    def all_that_ran(self):
        return self.ran

    def environment(self):
        return sorted(name for name in os.environ if "RANKWISE" in name)
