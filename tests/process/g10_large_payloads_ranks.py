"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os

import numpy as np

LARGE = 1 << 20  # bytes: a mapping of its own


MIDDLE = 100 << 10  # bytes: through the arena, but copied out of it


class Keeper:
    def __init__(self) -> None:
        self.kept: dict[object, object] = {}

    def keep(self, key, value):
        self.kept[key] = value

    def forget(self, *keys):
        for key in keys:
            self.kept.pop(key, None)

    def sums(self):
        return {key: (int(array.min()), int(array.max())) for key, array in self.kept.items()}

    def add(self, array, number):
        array += number
        return int(array.sum())

    def total(self, array):
        return int(array.sum())

    def make(self, size, value):
        return np.full(size, value, np.uint8)

    def echo(self, value):
        return value

    def die(self, array):
        os._exit(3)


def full(value, size=LARGE):
    return np.full(size, value, np.uint8)
