"""What it costs to start: imports, a small group, and many ranks beside bare interpreters.

    import rankwise          beside `python -c pass`
    a worker's own imports   `python -c "import rankwise._worker, ..."`, beside the same
    open, call, close        four ranks whose class is in a module, or in `__main__`, as in a script
    8 ranks, spawn           beside 8 times `python -c "import rankwise"`, two at a time
    8 ranks, forkserver      that need torch, preloaded, beside one `python -c "import torch"`; then
                             restarted, with the launcher warm, and closed

Each row is taken in turn with what it is measured against, in every round; differences and ratios
are taken within a round. What is imported has been compiled before. A group is opened by a driver
that has made one before, in a process of its own; "first" is the one before, imports included.
"""

from __future__ import annotations

import compileall
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rankwise

Rows = dict[str, dict[str, list[float]]]  # row -> what was measured -> one number a round

ROOT = Path(rankwise.__file__).parent.parent
RANKS = 8

# What a worker has imported when it waits for its boot call.
WORKER = "import rankwise._worker, rankwise._status, faulthandler, _socket, _ctypes"

# A driver: it says when it began, and of each group five moments, by CLOCK_MONOTONIC.
DRIVER = """
import sys, time
{given}
print(time.monotonic())
from rankwise import WorkerGroup
for _ in range(int(sys.argv[1])):
    began = time.monotonic()
    group = WorkerGroup(Hello, {ranks}{options})
    opened = time.monotonic()
    group.call("hello")
    called = restarted = time.monotonic()
    if {restarts}:
        group.restart()
        restarted = time.monotonic()
    group.close()
    print(began, opened, called, restarted, time.monotonic(), flush=True)
"""

IMPORTED = "from hello import Hello"

DEFINED = """
class Hello:
    def hello(self): return 1
"""

WITH_TORCH = """
class Hello:
    def __init__(self):
        import torch
        self.one = torch.ones(1)
    def hello(self): return float(self.one)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}


def python(code: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], env=environment(), stdout=subprocess.PIPE, text=True
    )


def seconds(code: str) -> float:
    """How long `python -c code` takes, its end included."""
    began = time.monotonic()
    process = python(code)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"python -c {code!r} failed: {output}")
    return time.monotonic() - began


def two_at_a_time(code: str, count: int) -> float:
    """How long `count` times `python -c code` take, when two of them run at any time."""
    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(seconds, [code] * count):
            pass
    return time.monotonic() - began


def driver(
    given: str, ranks: int, *, options: str = "", groups: int = 2, restarts: bool = False
) -> list[list[float]]:
    """Run a driver that opens, calls and closes `groups` groups: of each when it was begun, opened,
    called, restarted and closed. The first is begun when the driver imports rankwise."""
    process = python(
        DRIVER.format(given=given, ranks=ranks, options=options, restarts=restarts), str(groups)
    )
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("a driver of the benchmark failed")
    imports, *lines = output.splitlines()
    moments = [[float(number) for number in line.split()] for line in lines]
    moments[0][0] = float(imports)
    return moments


def measure(rounds: int) -> Rows:
    """Seconds of every row, one number a round."""
    rows: Rows = {}

    def note(row: str, **took: float) -> None:
        for what, value in took.items():
            rows.setdefault(row, {}).setdefault(what, []).append(value)

    has_torch = importlib.util.find_spec("torch") is not None
    compileall.compile_dir(ROOT / "rankwise", quiet=1)
    for _ in range(20):
        note("import rankwise", took=seconds("import rankwise"), beside=seconds("pass"))
        note("a worker's own imports", took=seconds(WORKER), beside=seconds("pass"))
    for _ in range(rounds):
        for name, given in (
            ("4 ranks, class in a module", IMPORTED),
            ("4 ranks, class in __main__", DEFINED),
        ):
            first, *again = driver(given, 4, groups=4)
            note(f"{name}, first", took=first[-1] - first[0])
            for moments in again:
                note(name, took=moments[-1] - moments[0])
                note(f"{name}: open", took=moments[1] - moments[0])
                note(f"{name}: close", took=moments[-1] - moments[2])
        _, again_8 = driver(IMPORTED, RANKS)
        bare = two_at_a_time("import rankwise", RANKS)
        note("8 ranks, spawn: open", took=again_8[1] - again_8[0], beside=bare)
        if has_torch:
            forked = ', start_method="forkserver", preload=["torch"]'
            _, again_8 = driver(WITH_TORCH, RANKS, options=forked, restarts=True)
            alone = seconds("import torch")
            note("8 ranks, forkserver and torch: open", took=again_8[1] - again_8[0], beside=alone)
            note("8 ranks, forkserver and torch: restart", took=again_8[3] - again_8[2])
            note("8 ranks, forkserver and torch: close", took=again_8[4] - again_8[3])
    return rows


def table(rows: Rows) -> str:
    lines = [f"{'ms':<38}{'median (least-most)':>26}{'beside':>10}{'more':>9}{'x':>7}"]
    for name, found in rows.items():
        ms = sorted(value * 1e3 for value in found["took"])
        line = f"{name:<38}{f'{statistics.median(ms):.1f} ({ms[0]:.0f}-{ms[-1]:.0f})':>26}"
        if "beside" in found:
            pairs = list(zip(found["took"], found["beside"], strict=True))
            more = statistics.median(took - beside for took, beside in pairs)
            times = statistics.median(took / beside for took, beside in pairs)
            beside = statistics.median(found["beside"])
            line += f"{beside * 1e3:>10.1f}{more * 1e3:>9.1f}{times:>7.2f}"
        lines.append(line)
    lines.append("beside: the bare interpreters; more, x: medians of what each round gave")
    return "\n".join(lines)
