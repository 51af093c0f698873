"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import time

from rankwise import current_call


class Worker:
    def __init__(self):
        self.ran = []

    def echo(self, value):
        self.ran.append(value)
        return value

    def fails(self, text):
        raise LookupError(text)

    def hold(self, path, value="held"):
        """Wait until the test lets it go."""
        with open(path, "rb") as file:
            file.read()
        return value

    def hold_and_fail(self, path):
        self.hold(path)
        raise LookupError("let go")

    def until_cancelled(self):
        while not current_call().cancelled():
            time.sleep(0.0005)
        return "saw it"

    def take_ran(self):
        ran, self.ran = self.ran, []
        return ran
