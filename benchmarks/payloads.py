"""What large arguments and results cost, beside one `memcpy` of them in the same round.

    to N ranks      call(array), and every rank reads one byte of each page; the same through the
                    drop-in, whose workers are a group each: a copy for each of them
    back            a result of that size, and the caller reads one byte of each page
    shared          a `shared_array` of 1 GB, passed to all ranks; the same call without an array
    5,000 arrays    of 1.6 KB in one call to one rank, with no more than 256 descriptors allowed
    sweep           bytes a second that one rank is passed, from 1 KB to 1 GB, beside `memcpy`, and
                    the largest step down from a size to twice that size

"cold" is the very first call: fresh memory is dear, used memory is used again.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
from dropin import DropIn
from figures import spread

from rankwise import WorkerGroup

PAGE = 4096
MB = 1 << 20
NO_COPY = ("shared 1 GB", "no array")
WARM = 3  # rounds before those that count: the second use of memory puts it on huge pages


class Reader:
    def __init__(self, size: int) -> None:
        self.array = np.ones(size, np.uint8)

    def read(self, array: np.ndarray) -> int:
        return int(array[::PAGE].sum())

    def give(self) -> np.ndarray:
        return self.array

    def nothing(self, array: np.ndarray | None) -> None:
        pass


def reader_worker(config: object, rank: int) -> Reader:
    return Reader(1)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def usual(work: Callable[[], object], times: int = 9) -> float:
    """The median of some in a row: what is short, and comes after ranks have slept."""
    return statistics.median(seconds(work) for _ in range(times))


def measure(ranks: int, rounds: int, size: int = 256 * MB) -> dict[str, list[float]]:
    """Seconds of each row, one number a round; the first call of all stands alone."""
    source = np.ones(size, np.uint8)
    target = np.zeros(size, np.uint8)
    found: dict[str, list[float]] = {
        "memcpy": [], "to all": [], "to all, drop-in": [], "result": [], "shared 1 GB": [],
        "no array": [],
    }  # fmt: skip
    with (
        WorkerGroup(Reader, ranks, args=(size,)) as group,
        closing(DropIn(ranks, reader_worker)) as drop_in,
    ):
        found["to all, cold"] = [seconds(lambda: group.call(Reader.read, source))]
        found["result, cold"] = [seconds(lambda: group[0].call(Reader.give)[::PAGE].sum())]
        shared = group.shared_array(1 << 30, "uint8")
        for turn in range(rounds + WARM):
            took = {
                "memcpy": seconds(lambda: np.copyto(target, source)),
                "to all": seconds(lambda: group.call(Reader.read, source)),
                "to all, drop-in": seconds(lambda: drop_in.call("read", source)),
                "result": seconds(lambda: group[0].call(Reader.give)[::PAGE].sum()),
                "shared 1 GB": usual(lambda: group.call(Reader.nothing, shared)),
                "no array": usual(lambda: group.call(Reader.nothing, None)),
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


Sweep = dict[int, list[float]]  # size -> bytes a second, one number a round


def sweep(rounds: int, most: int = 1 << 30) -> tuple[Sweep, Sweep]:
    """What one rank is passed that only takes it, and a `memcpy` of that size at the same time."""
    found: Sweep = {}
    copied: Sweep = {}
    with WorkerGroup(Reader, 1, args=(1,)) as group:
        size = 1 << 10
        while size <= most:
            array = np.ones(size, np.uint8)
            target = np.ones_like(array)
            times = max(1, min(200, (32 * MB) // size))
            more = max(1, min(5000, (32 * MB) // size))  # of 1 KB: in 1 us
            calls, copies = [], []
            for _ in range(rounds + WARM):
                calls.append(repeated(times, group.call, Reader.nothing, array))
                copies.append(repeated(more, np.copyto, target, array))
            found[size] = [size / took for took in calls[WARM:]]
            copied[size] = [size / took for took in copies[WARM:]]
            size *= 2
    return found, copied


def step(rates: Sweep) -> tuple[float, int]:
    """The largest step down: how many times slower a byte is than in an array of half the size, and
    the size. Where a call costs the same whatever the size, the rate doubles: that is no step."""
    middle = {size: statistics.median(values) for size, values in rates.items()}
    return max((middle[size // 2] / middle[size], size) for size in list(middle)[1:])


def relative(rates: Sweep, copies: Sweep) -> Sweep:
    """The rate as a part of `memcpy`'s, round by round."""
    return {
        size: [rate / copy for rate, copy in zip(values, copies[size], strict=True)]
        for size, values in rates.items()
    }


def repeated(times: int, function: Callable[..., object], *args: object) -> float:
    """Seconds of one call of `function`, of `times` in a row."""
    began = time.perf_counter()
    for _ in range(times):
        function(*args)
    return (time.perf_counter() - began) / times


def table(
    found: dict[str, list[float]],
    few: list[float],
    swept: tuple[Sweep, Sweep],
    ranks: int,
) -> str:
    lines = [f"{'ms, 256 MB, ' + str(ranks) + ' ranks':<24}{'median (least-most)':>24}{'x':>7}"]
    for name, values in found.items():
        line = f"{name:<24}{spread(scaled(values, 1e3), 2):>24}"
        if len(values) == len(found["memcpy"]) and name not in NO_COPY:
            times = statistics.median(
                value / copy for value, copy in zip(values, found["memcpy"], strict=True)
            )
            line += f"{times:>7.2f}"
        lines.append(line)
    lines.append("x: times one memcpy, median of the ratios within each round")
    lines.append(f"{'5,000 arrays of 1.6 KB':<24}{spread(scaled(few, 1e3)):>24}")
    lines.append("")
    lines.append(f"{'size to one rank':<18}{'MB/s':>24}{'memcpy':>24}{'of it':>20}")
    rates, copies = swept
    parts = relative(rates, copies)
    for size in rates:
        shown = [spread(scaled(of[size], 1e-6), 0) for of in swept]
        part = spread(parts[size], 3)
        lines.append(f"{named(size):<18}{shown[0]:>24}{shown[1]:>24}{part:>20}")
    for what, of in (("a byte", rates), ("a byte, relative to memcpy's", parts)):
        times, size = step(of)
        lines.append(f"largest step: {what}, {times:.2f} x, {named(size // 2)} to {named(size)}")
    return "\n".join(lines)


def scaled(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def named(size: int) -> str:
    return f"{size >> 10} KB" if size < MB else f"{size >> 20} MB"
