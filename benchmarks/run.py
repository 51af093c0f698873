"""What a call costs: rankwise beside the machine's floor and the queue design, in one run.

    python benchmarks/run.py [--ranks 1 2 4 8] [--rounds 5] [--seconds 0.25] [--json FILE]

Every subject runs in every round, for a moment each, in an order that changes from round to round;
the number of a round is the median of its calls, and the table gives the median of the rounds with
their least and greatest. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from queues import Queues

from rankwise import WorkerGroup

SUBJECTS = ("floor", "call", "submit().result()", "await", "queue design")


class Echo:
    def echo(self, value: object) -> object:
        return value


Timing = Callable[[float], float]  # seconds to run -> median seconds a call


def timed(call: Callable[[int], object]) -> Timing:
    def run(seconds: float) -> float:
        clock = time.perf_counter
        samples = []
        end = clock() + seconds
        number = 0
        while (began := clock()) < end:
            call(number)
            samples.append(clock() - began)
            number += 1
        return statistics.median(samples)

    return run


def awaited(group: WorkerGroup) -> Timing:
    async def main(seconds: float) -> float:
        clock = time.perf_counter
        samples = []
        end = clock() + seconds
        number = 0
        while (began := clock()) < end:
            await group.submit(Echo.echo, number)
            samples.append(clock() - began)
            number += 1
        return statistics.median(samples)

    return lambda seconds: asyncio.run(main(seconds))


@contextmanager
def subjects(ranks: int) -> Iterator[dict[str, Timing]]:
    # The floor forks: first, while this process has one thread. It spins, so that it is stopped
    # while another is measured, like each of the others (which sleep when they have nothing to do).
    with WorkerGroup(Echo, ranks, name="bench") as group:
        queues = Queues(ranks)
        try:
            yield {
                "call": timed(lambda n: group.call(Echo.echo, n)),
                "submit().result()": timed(lambda n: group.submit(Echo.echo, n).result()),
                "await": awaited(group),
                "queue design": timed(queues.call),
            }
        finally:
            queues.close()


def measure(ranks: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    order = random.Random(ranks)
    with subjects(ranks) as others:
        for _ in range(rounds):
            names = list(SUBJECTS)
            order.shuffle(names)
            for name in names:
                if name == "floor":
                    found[name].append(measure_floor(ranks, seconds))
                else:
                    others[name](seconds / 5)  # warm up
                    found[name].append(others[name](seconds))
    return found


def measure_floor(ranks: int, seconds: float) -> float:
    """In a process of its own, forked from a fresh interpreter: the floor's workers spin, and a
    process with threads should not fork."""
    import subprocess

    code = (
        "import statistics, sys, time; sys.path.insert(0, sys.argv[1]); from floor import Floor\n"
        "floor = Floor(int(sys.argv[2])); clock = time.perf_counter; samples = []\n"
        "end = clock() + float(sys.argv[3]); number = 0\n"
        "while (began := clock()) < end:\n"
        "    floor.call(number); samples.append(clock() - began); number += 1\n"
        "print(statistics.median(samples[len(samples) // 5:])); floor.close()\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(Path(__file__).parent),
        str(ranks),
        str(seconds * 1.2),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(results: dict[int, dict[str, list[float]]]) -> str:
    lines = [
        f"{'us a call':<20}" + "".join(f"{f'{ranks} ranks':>26}" for ranks in results),
        f"{'':<20}" + f"{'median (least-most)   x':>26}" * len(results),
    ]
    for name in SUBJECTS:
        cells = []
        for found in results.values():
            us = sorted(value * 1e6 for value in found[name])
            ratio = statistics.median(
                value / floor for value, floor in zip(found[name], found["floor"], strict=True)
            )
            spread = f"{statistics.median(us):.1f} ({us[0]:.0f}-{us[-1]:.0f})"
            cells.append(f"{spread:>20}{ratio:>6.2f}")
        lines.append(f"{name:<20}" + "".join(cells))
    return "\n".join(lines)


def machine() -> dict[str, object]:
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="per subject and round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("  ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    results = {}
    for ranks in options.ranks:
        results[ranks] = measure(ranks, options.rounds, options.seconds)
    print(table(results))
    print("x: times the floor, median of the ratios within each round")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "seconds": results}, indent=1))


if __name__ == "__main__":  # the queue design's workers import this file
    main()
