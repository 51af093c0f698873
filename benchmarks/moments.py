"""What the bounds' benchmark does once for each number: something ends, and who is told it when.

Each gives seconds. Ends are the kernel's word (pidfd). `resident`: bytes that a rank, or each of
them, has for its own; 0: as it is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from mortal import ALL, Failure, Mortal

from rankwise import WorkerDied, WorkerGroup

RANKS = 8
VICTIM = 3
TIMEOUT = 0.2  # of the close() of a rank that is stuck
FORKED = {"start_method": "forkserver", "preload": ("mortal",), "logs": "off"}

# A driver: says its ranks' pids once they are as they should be, and waits to be killed.
DRIVER = """
import json, sys, time
from mortal import ALL, Mortal
from rankwise import WorkerGroup
group = WorkerGroup(Mortal, {ranks}, args=(ALL, int(sys.argv[2])), **{options!r})
if sys.argv[1] == "hold":
    group.submit("hold")
    while any(each.state != "running" for each in group.health()):
        time.sleep(0.005)
    time.sleep(0.05)
print(json.dumps(group.pids), flush=True)
time.sleep(600)
"""


# A process of so many bytes, and nothing of ours in it.
BARE = """
import os, sys, time
with open("/proc/self/statm") as file:
    has = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
own = b"x" * (int(sys.argv[1]) - has)
print(len(own), flush=True)
time.sleep(600)
"""


def group(ranks: int, *args: object) -> WorkerGroup:
    return WorkerGroup(Mortal, ranks, args=args, **FORKED)


def all_running(made: WorkerGroup) -> None:
    """Wait until every rank is in its call, and a moment longer: asleep there, as its waiter is."""
    while any(each.state != "running" for each in made.health()):
        time.sleep(0.001)
    time.sleep(0.02)


def death(resident: int) -> float:
    moments = []
    with group(RANKS, VICTIM, resident) as made:

        def kill() -> None:
            all_running(made)
            moments.append(time.monotonic())
            os.kill(made.pids[VICTIM], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            made.call(Mortal.wait)
        except WorkerDied:
            moments.append(time.monotonic())
        killer.join()
    return moments[1] - moments[0]


def bare(resident: int, count: int = 1) -> float:
    """The kernel's own part of a death: it frees the memory before it says that it has ended.
    Of `count` processes, killed one after the other: until the last has."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", BARE, str(resident)], stdout=subprocess.PIPE
            )
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        watched = [os.pidfd_open(process.pid) for process in processes]
        time.sleep(0.02)
        began = time.monotonic()
        for process in processes:
            process.kill()
        await_ends(watched)
        return time.monotonic() - began


def await_ends(watched: list[int]) -> None:
    """Wait until all of these pidfds are readable, and close them."""
    poll = select.poll()
    for fd in watched:
        poll.register(fd, select.POLLIN)
    waiting = set(watched)
    while waiting:
        for fd, _ in poll.poll():
            poll.unregister(fd)
            waiting.discard(fd)
            os.close(fd)


def collective(made: WorkerGroup, path: str) -> float:
    try:
        made.call(Mortal.collective, VICTIM % len(made), path)
    except Failure as error:
        took = time.monotonic() - error.args[0]
    with open(path, "wb", buffering=0) as file:
        file.write(b"x" * (len(made) - 1))
        made.flush()
    return took


def owner(how: str, resident: int = 0) -> float:
    code = DRIVER.format(ranks=RANKS, options=FORKED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, how, str(resident)],
        env=environment,
        stdout=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        watched = [os.pidfd_open(pid) for pid in json.loads(driver.stdout.readline())]
        began = time.monotonic()
        driver.kill()
        await_ends(watched)
        return time.monotonic() - began


def close_idle(resident: int = 0) -> float:
    made = group(RANKS, ALL, resident)
    made.call(Mortal.hello)
    time.sleep(0.02)
    began = time.monotonic()
    made.close()
    return time.monotonic() - began


def close_stuck() -> float:
    made = group(RANKS)
    made[VICTIM].submit(Mortal.hold)
    while made.health()[VICTIM].state != "running":
        time.sleep(0.001)
    time.sleep(0.02)
    began = time.monotonic()
    made.close(timeout=TIMEOUT)
    return time.monotonic() - began - TIMEOUT


def stack(made: WorkerGroup) -> float:
    future = made[1].submit(Mortal.count, 15_000_000)
    while made.health()[1].method != "count":
        time.sleep(0.001)
    began = time.monotonic()
    told = made.stacks()[1]
    took = time.monotonic() - began
    assert not future.done() and " in count" in (told.stack or ""), "it was in C code all the while"
    future.result()
    return took
