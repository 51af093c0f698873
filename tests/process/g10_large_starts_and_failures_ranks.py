"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import numpy as np

LARGE = 1 << 20  # bytes: a mapping of its own


class Holder:
    def __init__(self, array, keep=True, fail=False):
        self.array = array if keep else None
        self.seen = (int(array.min()), int(array.max()))
        if fail:
            raise Loaded("at the start", array * 2)

    def first(self):
        return self.seen

    def now(self):
        return int(self.array.min()), int(self.array.max())

    def add(self, number):
        self.array += number

    def forget(self):
        self.array = None

    def total(self, array):
        return int(array.sum())

    def fail(self, size, value):
        raise Loaded("in a call", np.full(size, value, np.uint8))


class Loaded(Exception):
    """An exception that carries an array, and does not pass it on to its base."""

    def __init__(self, text, array):
        super().__init__(text)
        self.array = array


def full(value, size=LARGE):
    return np.full(size, value, np.uint8)
