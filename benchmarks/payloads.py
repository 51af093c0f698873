"""What large arguments and results cost, beside one `memcpy` of them in the same round.

    to N ranks      call(array), and every rank reads one byte of each page
    back            a result of that size, and the caller reads one byte of each page
    shared          a `shared_array` of 1 GB, passed to all ranks
    sweep           bytes a second that one rank is passed, from 1 KB up

"cold" is the very first call: fresh memory is dear, used memory is used again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from rankwise import WorkerGroup

PAGE = 4096
MB = 1 << 20
WARM = 3  # rounds before those that count: the second use of memory puts it on huge pages


class Reader:
    def __init__(self, size: int) -> None:
        self.array = np.ones(size, np.uint8)

    def read(self, array: np.ndarray) -> int:
        return int(array[::PAGE].sum())

    def give(self) -> np.ndarray:
        return self.array

    def nothing(self, array: np.ndarray) -> None:
        pass


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(ranks: int, rounds: int, size: int = 256 * MB) -> dict[str, list[float]]:
    """Seconds of each row, one number a round; the first call of all stands alone."""
    source = np.ones(size, np.uint8)
    target = np.zeros(size, np.uint8)
    found: dict[str, list[float]] = {"memcpy": [], "to all": [], "result": [], "shared 1 GB": []}
    with WorkerGroup(Reader, ranks, args=(size,)) as group:
        found["to all, cold"] = [seconds(lambda: group.call(Reader.read, source))]
        found["result, cold"] = [seconds(lambda: group[0].call(Reader.give)[::PAGE].sum())]
        shared = group.shared_array(1 << 30, "uint8")
        for turn in range(rounds + WARM):
            took = {
                "memcpy": seconds(lambda: np.copyto(target, source)),
                "to all": seconds(lambda: group.call(Reader.read, source)),
                "result": seconds(lambda: group[0].call(Reader.give)[::PAGE].sum()),
                "shared 1 GB": seconds(lambda: group.call(Reader.nothing, shared)),
            }
            for name, value in took.items():
                if turn >= WARM:
                    found[name].append(value)
    return found


def sweep(rounds: int, most: int = 1 << 28) -> dict[int, float]:
    """Size -> bytes a second, to one rank that only takes it: the median of `rounds`."""
    found = {}
    with WorkerGroup(Reader, 1, args=(1,)) as group:
        size = 1 << 10
        while size <= most:
            array = np.ones(size, np.uint8)
            times = max(1, min(200, (32 * MB) // size))
            samples = []
            for _ in range(rounds + WARM):
                began = time.perf_counter()
                for _ in range(times):
                    group.call(Reader.nothing, array)
                samples.append((time.perf_counter() - began) / times)
            found[size] = size / statistics.median(samples[WARM:])
            size *= 2
    return found


def table(found: dict[str, list[float]], swept: dict[int, float], ranks: int) -> str:
    lines = [f"{'ms, 256 MB, ' + str(ranks) + ' ranks':<24}{'median (least-most)':>24}{'x':>7}"]
    for name, values in found.items():
        ms = sorted(value * 1e3 for value in values)
        spread = f"{statistics.median(ms):.2f} ({ms[0]:.2f}-{ms[-1]:.2f})"
        if len(values) == len(found["memcpy"]) and name != "shared 1 GB":
            times = statistics.median(
                value / copy for value, copy in zip(values, found["memcpy"], strict=True)
            )
            lines.append(f"{name:<24}{spread:>24}{times:>7.2f}")
        else:
            lines.append(f"{name:<24}{spread:>24}")
    lines.append("x: times one memcpy, median of the ratios within each round")
    lines.append("")
    lines.append("size to one rank        MB/s")
    for size, rate in swept.items():
        shown = f"{size >> 10} KB" if size < MB else f"{size >> 20} MB"
        lines.append(f"{shown:<18}{rate / 1e6:>10.0f}")
    return "\n".join(lines)
