"""100,000 small calls, submitted to one rank before one of them is fetched.

The rank is stopped (SIGSTOP) until all are submitted, so that all of them are open at once; then it
goes on, and every result is fetched. The driver is a process of its own, and its memory a call is
its peak (the kernel's VmHWM, reset before) less what it had before the first: future, frame, place
in the order, and in the end the answer, all included. Afterwards, in the same driver, 100,000 more
to a rank that is not stopped: the rate.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from calls import Echo
from figures import field

from rankwise import WorkerGroup

CALLS = 100_000
LIMIT = 120.0  # seconds: a deadlock is told, and not waited for


def pile(calls: int) -> tuple[float, float, float]:
    """Bytes of the driver's an open call, seconds to queue one, calls a second."""
    with WorkerGroup(Echo, 1) as group:
        for future in [group.submit(Echo.echo, number) for number in range(1000)]:
            future.result()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        had = field("/proc/self/status", "VmRSS")
        os.kill(group.pids[0], signal.SIGSTOP)
        began = time.perf_counter()
        futures = [group.submit(Echo.echo, number) for number in range(calls)]
        submitted = (time.perf_counter() - began) / calls
        os.kill(group.pids[0], signal.SIGCONT)
        right = all(future.result() == [number] for number, future in enumerate(futures))
        assert right, "every call has its own answer"
        memory = (field("/proc/self/status", "VmHWM") - had) / calls
        del futures, future
        began = time.perf_counter()
        for future in [group.submit(Echo.echo, number) for number in range(calls)]:
            future.result()
        return memory, submitted, calls / (time.perf_counter() - began)


def measure(rounds: int) -> dict[str, list[float]]:
    """A driver a round."""
    found = []
    for _ in range(rounds):
        command = [sys.executable, __file__, str(CALLS)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
        found.append([float(number) for number in run.stdout.split()])
    memory, submitted, rate = zip(*found, strict=True)
    return {
        "100,000 open calls: KB a call in the driver": [value / 1024 for value in memory],
        "100,000 open calls: us to queue one": [value * 1e6 for value in submitted],
        "100,000 submitted, then fetched: calls a second": list(rate),
    }


if __name__ == "__main__":
    print(*pile(int(sys.argv[1])))
