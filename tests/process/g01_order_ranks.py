"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations


class Worker:
    def __init__(self):
        self.ran = []

    def note(self, item, padding=None):
        self.ran.append(item)
        return item

    def fails(self, item):
        self.ran.append(item)
        raise LookupError(item)

    def hold(self, path, item):
        self.ran.append(item)
        with open(path, "rb") as file:
            file.read()

    def take_ran(self):
        ran, self.ran = self.ran, []
        return ran
