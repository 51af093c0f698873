"""What a small call costs: rankwise beside the floor, the queue design and other libraries.

Every subject runs in every round, for a moment each, in an order that changes from round to round;
the number of a round is the median of its calls. Ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dropin import DropIn
from peers import PEERS
from queues import Queues

from rankwise import WorkerGroup


class Echo:
    def echo(self, value: object) -> object:
        return value


def echo_worker(config: object, rank: int) -> Echo:
    return Echo()


FLOORS = {"floor": False, "floor, spawned ranks": True}
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
    """All but the floor, running; each sleeps while another is measured."""
    with ExitStack() as stack:
        group = stack.enter_context(WorkerGroup(Echo, ranks, name="bench"))
        forked = stack.enter_context(
            WorkerGroup(Echo, ranks, name="forked", start_method="forkserver")
        )
        queues = Queues(ranks)
        stack.callback(queues.close)
        drop_in = DropIn(ranks, echo_worker)
        stack.callback(drop_in.close)
        found = {
            "call": timed(lambda n: group.call(Echo.echo, n)),
            "call, forked ranks": timed(lambda n: forked.call(Echo.echo, n)),
            "submit().result()": timed(lambda n: group.submit(Echo.echo, n).result()),
            "submit, forked ranks": timed(lambda n: forked.submit(Echo.echo, n).result()),
            "await": awaited(group),
            "await, forked ranks": awaited(forked),
            "queue design": timed(queues.call),
            "drop-in": timed(lambda n: drop_in.call("echo", n)),
        }
        for name, start in PEERS.items():
            peer = start(ranks)
            if peer is not None:
                stack.callback(peer.close)
                found[name] = timed(peer.call)
        yield found


def measure(ranks: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each subject, one number a round."""
    found: dict[str, list[float]] = {}
    order = random.Random(ranks)
    with subjects(ranks) as others:
        for _ in range(rounds):
            names = [*FLOORS, *others]
            order.shuffle(names)
            for name in names:
                if name in FLOORS:
                    took = measure_floor(ranks, seconds, spawned=FLOORS[name])
                else:
                    others[name](seconds / 5)  # warm up
                    took = others[name](seconds)
                found.setdefault(name, []).append(took)
    return {name: found[name] for name in [*FLOORS, *others]}


def measure_floor(ranks: int, seconds: float, spawned: bool = False) -> float:
    """In a process of its own, forked from a fresh interpreter: the floor's workers spin, and a
    process with threads should not fork."""
    code = (
        "import statistics, sys, time; sys.path.insert(0, sys.argv[1]); from floor import Floor\n"
        "floor = Floor(int(sys.argv[2]), sys.argv[4] == 'True')\n"
        "floor.call(0); clock = time.perf_counter; samples = []\n"
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
        str(spawned),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ratios(found: dict[str, list[float]], name: str) -> list[float]:
    """How many times the floor `name` took, round by round."""
    return [took / floor for took, floor in zip(found[name], found["floor"], strict=True)]


def table(results: dict[int, dict[str, list[float]]]) -> str:
    lines = [
        f"{'us a call':<20}" + "".join(f"{f'{ranks} ranks':>26}" for ranks in results),
        f"{'':<20}" + f"{'median (least-most)   x':>26}" * len(results),
    ]
    for name in next(iter(results.values())):
        cells = []
        for found in results.values():
            us = sorted(value * 1e6 for value in found[name])
            ratio = statistics.median(ratios(found, name))
            spread = f"{statistics.median(us):.1f} ({us[0]:.0f}-{us[-1]:.0f})"
            cells.append(f"{spread:>20}{ratio:>6.2f}")
        lines.append(f"{name:<20}" + "".join(cells))
    return "\n".join(lines)
