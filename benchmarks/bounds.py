"""How soon one is told, and how soon all is gone: each bound beside what is measured.

    python benchmarks/bounds.py [--only death ...] [--count 200] [--out docs/benchmarks]

    death        SIGKILL of one of 8 ranks > WorkerDied in the thread that waits in `call`;
                 beside it, SIGKILL of a bare process as large > its end, by the kernel's word
    collective   one of 4 ranks raises, the others wait for it > its exception in the caller
    owner        SIGKILL of the driver > the last of its 8 ranks has ended
    close        `close()` of 8 ranks; of 8 ranks one of which is stuck in C code
    stack        `stacks()`, while one of 2 ranks is in C code and keeps the interpreter's lock

Each repetition has a group of its own, whose ranks are forked, but for `collective` and `stack`,
which leave theirs as they find it. Ends are the kernel's word (pidfd). With --out the numbers go
to bounds.json in that folder, of which docs/faults.md is made (scripts/faults_page.py); rows that
were not measured stay. Run it when nothing else runs: all of it takes some eight minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mortal import MB, Failure, Mortal

from rankwise import WorkerDied, WorkerGroup

RANKS = 8
VICTIM = 3
TIMEOUT = 0.2  # of the close() of a rank that is stuck
FORKED = {"start_method": "forkserver", "preload": ("mortal",), "logs": "off"}

# A driver: says its ranks' pids once they are as they should be, and waits to be killed.
DRIVER = """
import json, sys, time
from mortal import Mortal
from rankwise import WorkerGroup
group = WorkerGroup(Mortal, {ranks}, **{options!r})
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


class Row(NamedTuple):
    """What is measured, once, in seconds, and the bounds: of the median and the worst, if any."""

    what: str
    part: str
    once: Callable[[], float]
    typical: float | None
    worst: float | None
    count: int | None = None  # repetitions, where `--count` would take too long


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


def bare(resident: int) -> float:
    """The kernel's own part of a death: it frees the memory before it says that it has ended."""
    with subprocess.Popen(
        [sys.executable, "-c", BARE, str(resident)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        fd = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        time.sleep(0.02)
        began = time.monotonic()
        process.kill()
        poll.poll()
        took = time.monotonic() - began
        os.close(fd)
    return took


def collective(made: WorkerGroup, path: str) -> float:
    try:
        made.call(Mortal.collective, VICTIM % len(made), path)
    except Failure as error:
        took = time.monotonic() - error.args[0]
    with open(path, "wb", buffering=0) as file:
        file.write(b"x" * (len(made) - 1))
        made.flush()
    return took


def owner(how: str) -> float:
    code = DRIVER.format(ranks=RANKS, options=FORKED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, how], env=environment, stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        watched = [os.pidfd_open(pid) for pid in json.loads(driver.stdout.readline())]
        poll = select.poll()
        for fd in watched:
            poll.register(fd, select.POLLIN)
        began = time.monotonic()
        driver.kill()
        waiting = set(watched)
        while waiting:
            for fd, _ in poll.poll():
                poll.unregister(fd)
                waiting.discard(fd)
        took = time.monotonic() - began
        for fd in watched:
            os.close(fd)
    return took


def close_idle() -> float:
    made = group(RANKS)
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


def rows(four: WorkerGroup, fifo: str, two: WorkerGroup) -> list[Row]:
    return [
        Row("a rank with nothing of its own dies: the waiting caller's exception", "death",
            lambda: death(0), 0.010, 0.100),
        Row("a rank of 100 MB dies: the waiting caller's exception", "death",
            lambda: death(100 * MB), 0.010, 0.100),
        Row("a rank of 2 GB dies: the waiting caller's exception", "death",
            lambda: death(2048 * MB), None, None, 20),
        Row("for comparison, a bare process of 100 MB: SIGKILL to its end", "death",
            lambda: bare(100 * MB), None, None),
        Row("for comparison, a bare process of 2 GB", "death",
            lambda: bare(2048 * MB), None, None, 20),
        Row("a rank fails, its peers wait for it: the caller's exception", "collective",
            lambda: collective(four, fifo), None, 0.100),
        Row("the driver is killed, the ranks idle: the last one's end", "owner",
            lambda: owner("idle"), None, 0.500),
        Row("the driver is killed, the ranks hold the GIL in C: the last one's end", "owner",
            lambda: owner("hold"), None, 0.500),
        Row("close() of an idle group", "close", close_idle, None, 0.050),
        Row(f"close({TIMEOUT:g}), a rank stuck in C: beyond its {TIMEOUT:g} s", "close",
            close_stuck, None, 1.0),
        Row("stacks(), a rank holds the GIL in C", "stack", lambda: stack(two), None, 0.100),
    ]  # fmt: skip


def measure(only: list[str], count: int) -> list[dict[str, object]]:
    """The rows that belong to `only`, each with its milliseconds."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        group(4) as four,
        group(2) as two,
    ):
        fifo = os.path.join(folder, "fifo")
        os.mkfifo(fifo)
        # Somebody has it open for writing, so that the ranks' own open does not wait.
        held = os.open(fifo, os.O_RDWR)
        for row in rows(four, fifo, two):
            if row.part not in only:
                continue
            times = [row.once() for _ in range(min(count, row.count or count))]
            found.append({
                "what": row.what,
                "typical": row.typical and row.typical * 1e3,
                "worst": row.worst and row.worst * 1e3,
                "ms": [round(seconds * 1e3, 3) for seconds in times],
            })  # fmt: skip
            print(line(found[-1]), flush=True)
        os.close(held)
    return found


def line(row: dict[str, object]) -> str:
    ms = sorted(row["ms"])  # type: ignore[call-overload]
    return (
        f"{row['what']:<72} median {statistics.median(ms):8.2f}  worst {ms[-1]:8.2f}  "
        f"of {len(ms):>3}  bounds {row['typical']}, {row['worst']} ms"
    )


PARTS = ("death", "collective", "owner", "close", "stack")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=200, help="repetitions of each row")
    parser.add_argument("--out", type=Path, help="the folder of bounds.json")
    options = parser.parse_args()
    from run import machine

    found = measure(options.only, options.count)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "bounds.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        write(path, machine(), kept, found)


def write(
    path: Path,
    machine: dict[str, object],
    kept: list[dict[str, object]],
    found: list[dict[str, object]],
) -> None:
    """One row a line, those of `found` in the place of the `kept` ones of the same name."""
    measured = {row["what"]: row for row in found}
    rows = [measured.pop(row["what"], row) for row in kept] + list(measured.values())
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{\n "machine": {json.dumps(machine)},\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
