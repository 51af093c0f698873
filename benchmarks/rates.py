"""Calls a second when they are piled up, calls that come slowly, and what idleness costs.

pipelined     submit 20,000 calls to one rank, then wait for them
paced         a call every 3 ms, when everybody sleeps, beside a sleeping `multiprocessing.Pipe`
idle          CPU time of driver, launcher and 4 workers while nothing is called
every 5 ms    CPU time of a worker that is called so
busy thread   a call while another thread of the driver computes in Python
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from multiprocessing.connection import Connection

from calls import Echo

from rankwise import WorkerGroup

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def pipelined(calls: int = 20_000) -> float:
    """Calls a second to one rank."""
    with WorkerGroup(Echo, 1) as group:
        best = 0.0
        for _ in range(3):
            began = time.perf_counter()
            futures = [group.submit(Echo.echo, number) for number in range(calls)]
            futures[-1].result()
            best = max(best, calls / (time.perf_counter() - began))
        return best


def paced(gap: float = 3e-3, calls: int = 200) -> dict[str, float]:
    """Median seconds of a call, one every `gap` seconds."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=answer, args=(theirs,), daemon=True)
    process.start()
    samples: dict[str, list[float]] = {"rankwise": [], "Pipe": []}
    with WorkerGroup(Echo, 1) as group:
        ours.send(0)
        ours.recv()
        for number in range(calls):
            for name in samples:
                time.sleep(gap)
                began = time.perf_counter()
                if name == "Pipe":
                    ours.send(("echo", (number,), {}))
                    ours.recv()
                else:
                    group.call(Echo.echo, number)
                samples[name].append(time.perf_counter() - began)
    ours.send(None)
    process.join()
    return {name: statistics.median(values) for name, values in samples.items()}


def answer(pipe: Connection) -> None:
    while (task := pipe.recv()) is not None:
        pipe.send(task)


def idle(seconds: float = 5.0) -> float:
    """Share of one core that a group of 4 takes while nothing is called."""
    with WorkerGroup(Echo, 4) as group:
        group.call(Echo.echo, 0)
        launcher = group[0].call(lambda worker: os.getppid())
        pids = [os.getpid(), launcher, *group.pids]
        time.sleep(1.5)
        before = cpu_seconds(pids)
        time.sleep(seconds)
        return (cpu_seconds(pids) - before) / seconds


def every_5_ms(seconds: float = 4.0) -> float:
    """Share of one core that a worker takes which is called every 5 ms."""
    with WorkerGroup(Echo, 1) as group:
        group.call(Echo.echo, 0)
        before = cpu_seconds(group.pids)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            group.call(Echo.echo, 0)
            time.sleep(5e-3)
        return (cpu_seconds(group.pids) - before) / seconds


def beside_a_busy_thread(seconds: float = 1.0) -> float:
    """Median seconds of a call while another thread of the driver holds the interpreter."""
    stop = threading.Event()

    def compute() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    with WorkerGroup(Echo, 1) as group:
        group.call(Echo.echo, 0)
        thread = threading.Thread(target=compute)
        thread.start()
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            group.call(Echo.echo, 0)
            samples.append(time.perf_counter() - began)
        stop.set()
        thread.join()
        return statistics.median(samples)


def measure() -> dict[str, float]:
    slow = paced()
    return {
        "pipelined calls a second": pipelined(),
        "paced call, us": slow["rankwise"] * 1e6,
        "paced Pipe, us": slow["Pipe"] * 1e6,
        "idle group of 4, % of a core": idle() * 100,
        "worker called every 5 ms, % of a core": every_5_ms() * 100,
        "call beside a busy thread, us": beside_a_busy_thread() * 1e6,
    }


def table(found: dict[str, float]) -> str:
    return "\n".join(f"{name:<40}{value:>12.1f}" for name, value in found.items())
