"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import time


class Worker:
    def __init__(self, hold=None, fail=False):
        if fail:
            raise ValueError("no such model")
        if hold:
            with open(hold, "rb") as file:
                file.read()

    def echo(self, value):
        return value

    def fails(self, text):
        raise LookupError(text)

    def hold(self, path):
        with open(path, "rb") as file:
            return file.read().decode()

    def cancelled(self):
        from rankwise import current_call

        while not current_call().cancelled():
            time.sleep(0.001)
        return "saw it"
