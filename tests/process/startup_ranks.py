"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations


class Runner:
    def run(self, code):
        names = {}
        exec(code, names)
        return names["result"]
