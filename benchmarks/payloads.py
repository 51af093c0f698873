"""What large arguments and results cost, beside one `memcpy` of them in the same round.

    to N ranks      call(array), and every rank reads one byte of each page
    back            a result of that size, and the caller reads one byte of each page
    shared          a `shared_array` of 1 GB, passed to all ranks
    5,000 arrays    of 1.6 KB in one call to one rank, with no more than 256 descriptors allowed
    sweep           bytes a second that one rank is passed, from 1 KB to 1 GB, beside `memcpy`

"cold" is the very first call: fresh memory is dear, used memory is used again.
"""

from __future__ import annotations

import resource
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


def many(rounds: int, count: int = 5000) -> list[float]:
    """Seconds of a call with `count` arrays of 200 integers, one number a round."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        arrays = [np.full(200, number) for number in range(count)]
        with WorkerGroup(Reader, 1, args=(1,)) as group:
            took = [repeated(1, group.call, Reader.nothing, arrays) for _ in range(rounds + WARM)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return took[WARM:]


def sweep(rounds: int, most: int = 1 << 30) -> tuple[dict[int, float], dict[int, float]]:
    """Size -> bytes a second, to one rank that only takes it, and of a `memcpy` of that size at the
    same time: the medians of `rounds`."""
    found, copied = {}, {}
    with WorkerGroup(Reader, 1, args=(1,)) as group:
        size = 1 << 10
        while size <= most:
            array = np.ones(size, np.uint8)
            target = np.ones_like(array)
            times = max(1, min(200, (32 * MB) // size))
            calls, copies = [], []
            for _ in range(rounds + WARM):
                calls.append(repeated(times, group.call, Reader.nothing, array))
                copies.append(repeated(times, np.copyto, target, array))
            found[size] = size / statistics.median(calls[WARM:])
            copied[size] = size / statistics.median(copies[WARM:])
            size *= 2
    return found, copied


def repeated(times: int, function: Callable[..., object], *args: object) -> float:
    """Seconds of one call of `function`, of `times` in a row."""
    began = time.perf_counter()
    for _ in range(times):
        function(*args)
    return (time.perf_counter() - began) / times


def table(
    found: dict[str, list[float]],
    few: list[float],
    swept: tuple[dict[int, float], dict[int, float]],
    ranks: int,
) -> str:
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
    ms = sorted(value * 1e3 for value in few)
    spread = f"{statistics.median(ms):.1f} ({ms[0]:.1f}-{ms[-1]:.1f})"
    lines.append(f"{'5,000 arrays of 1.6 KB':<24}{spread:>24}")
    lines.append("")
    lines.append("size to one rank        MB/s    memcpy")
    rates, copies = swept
    for size, rate in rates.items():
        shown = f"{size >> 10} KB" if size < MB else f"{size >> 20} MB"
        lines.append(f"{shown:<18}{rate / 1e6:>10.0f}{copies[size] / 1e6:>10.0f}")
    return "\n".join(lines)
