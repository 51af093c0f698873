"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import sys


class Worker:
    def print(self, text):
        print(text)

    def error(self, text):
        print(text, file=sys.stderr)
