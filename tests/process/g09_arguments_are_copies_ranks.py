"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations


class Worker:
    def __init__(self, *made_with):
        self.made_with = made_with
        self.kept = []

    def echo(self, value):
        return value

    def fill(self, value, byte):
        """Write to all of what was received."""
        memoryview(value).cast("B")[:] = bytes([byte]) * memoryview(value).nbytes

    def keep(self, value):
        self.kept.append(value)

    def forget(self):
        self.kept = []

    def hold(self, path):
        with open(path, "rb") as file:
            file.read()
