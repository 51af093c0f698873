"""Calls a second when they are piled up, calls that come slowly, and what idleness costs.

    pipelined     submit 20,000 calls to one rank, then wait for them
    paced         a call every 3 ms, when all sleep, beside a sleeping `multiprocessing.Pipe`; and
                  the last rung of the ladder (rungs.py), half of what a call does, whose rank is
                  forked from the driver, beside a Pipe to a process forked so
    idle          CPU time of driver, launcher and 4 workers while nothing is called
    every 5 ms    CPU time of a worker that is called so
    busy thread   a call while another thread of the driver computes in Python
    piled up      100,000 calls submitted before one is fetched (piled.py)
    lags          of callbacks and of a loop, under 20,000 calls a second (lags.py)

Every row has several short rounds, one number each; where a round has many calls, their median.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import lags
import piled
from calls import Echo
from figures import spread
from rungs import RUNGS

from rankwise import WorkerGroup

Rows = dict[str, list[float]]  # row -> one number a round


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far, to the nanosecond: /proc counts in ticks."""
    # The clock of another process, as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def pipelined(rounds: int, calls: int = 20_000) -> list[float]:
    """Calls a second to one rank."""
    found = []
    with WorkerGroup(Echo, 1) as group:
        for turn in range(rounds + 1):
            began = time.perf_counter()
            futures = [group.submit(Echo.echo, number) for number in range(calls)]
            for future in futures:
                future.result()
            if turn:  # the first warms up
                found.append(calls / (time.perf_counter() - began))
    return found


def through(pipe: Connection, value: object = 0) -> None:
    pipe.send(("echo", (value,), {}))
    pipe.recv()


def paced(rounds: int, gap: float = 3e-3, calls: int = 60) -> Rows:
    """Seconds of a call, one every `gap` seconds."""
    pipes: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        rung = stack.enter_context(closing(RUNGS["struck"](1)))  # forked: before there are threads
        for method, name in (("fork", "Pipe, forked"), ("spawn", "Pipe")):
            ours, theirs = multiprocessing.Pipe()
            context: Any = multiprocessing.get_context(method)
            process = context.Process(target=answer, args=(theirs,), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            pipes[name] = partial(through, ours)
        group = stack.enter_context(WorkerGroup(Echo, 1))
        subjects = {
            "call": lambda: group.call(Echo.echo, 0), "rung": lambda: rung.call(0), **pipes,
        }  # fmt: skip
        found: Rows = {name: [] for name in subjects}
        for pipe in pipes.values():
            pipe()
        for _ in range(rounds):
            samples: Rows = {name: [] for name in subjects}
            for _ in range(calls):
                for name, subject in subjects.items():
                    time.sleep(gap)
                    samples[name].append(seconds(subject))
            for name, values in samples.items():
                found[name].append(statistics.median(values))
    return found


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def answer(pipe: Connection) -> None:
    while (task := pipe.recv()) is not None:
        pipe.send(task)


def idle(rounds: int, length: float = 2.0) -> list[float]:
    """Share of one core that a group of 4 takes while nothing is called."""
    with WorkerGroup(Echo, 4) as group:
        group.call(Echo.echo, 0)
        launcher = group[0].call(lambda worker: os.getppid())
        pids = [os.getpid(), launcher, *group.pids]
        time.sleep(1.5)
        found = []
        for _ in range(rounds):
            before = cpu_seconds(pids)
            time.sleep(length)
            found.append((cpu_seconds(pids) - before) / length)
        return found


def every_5_ms(rounds: int, length: float = 1.0) -> list[float]:
    """Share of one core that a worker takes which is called every 5 ms."""
    with WorkerGroup(Echo, 1) as group:
        group.call(Echo.echo, 0)
        found = []
        for _ in range(rounds):
            before = cpu_seconds(group.pids)
            began = time.monotonic()
            while time.monotonic() < began + length:
                group.call(Echo.echo, 0)
                time.sleep(5e-3)
            found.append((cpu_seconds(group.pids) - before) / (time.monotonic() - began))
        return found


def beside_a_busy_thread(rounds: int, length: float = 0.6) -> list[float]:
    """Seconds of a call while another thread of the driver holds the interpreter."""
    stop = threading.Event()

    def compute() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    found = []
    with WorkerGroup(Echo, 1) as group:
        group.call(Echo.echo, 0)
        thread = threading.Thread(target=compute)
        thread.start()
        for _ in range(rounds):
            samples = []
            end = time.monotonic() + length
            while time.monotonic() < end:
                samples.append(seconds(lambda: group.call(Echo.echo, 0)))
            found.append(statistics.median(samples))
        stop.set()
        thread.join()
    return found


def measure(rounds: int) -> Rows:
    slow = paced(rounds)
    return {
        "pipelined calls a second": pipelined(rounds),
        "paced call, us": scaled(slow["call"], 1e6),
        "paced last rung of the ladder, us": scaled(slow["rung"], 1e6),
        "paced Pipe, forked, us": scaled(slow["Pipe, forked"], 1e6),
        "paced Pipe, us": scaled(slow["Pipe"], 1e6),
        "idle group of 4, % of a core": scaled(idle(rounds), 100),
        "worker called every 5 ms, % of a core": scaled(every_5_ms(rounds), 100),
        "call beside a busy thread, us": scaled(beside_a_busy_thread(rounds), 1e6),
        **piled.measure(min(rounds, 3)),
        **lags.measure(rounds),
    }


def scaled(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def table(found: Rows) -> str:
    lines = [f"{'':<50}{'median (least-most)':>30}"]
    lines += [f"{name:<50}{spread(values, digits(values)):>30}" for name, values in found.items()]
    return "\n".join(lines)


def digits(values: list[float]) -> int:
    """As many as a reader can use: none where the number has four before the point."""
    middle = statistics.median(values)
    return 0 if middle >= 1000 else 1 if middle >= 10 else 2
