"""How soon one is told, and how soon all is gone: each bound beside what is measured.

    python benchmarks/bounds.py [--only death ...] [--count 200] [--out docs/benchmarks]

    death        SIGKILL of one of 8 ranks > WorkerDied in the thread that waits in `call`
    collective   one of 4 ranks raises, the others wait for it > its exception in the caller
    owner        SIGKILL of the driver > the last of its 8 ranks has ended
    close        `close()` of 8 ranks; of 8 ranks one of which is stuck in C code
    stack        `stacks()`, while one of 2 ranks is in C code and keeps the interpreter's lock
    bare         for comparison: SIGKILL of processes as large, and nothing of ours in them > the
                 end of the last, by the kernel's word

Each repetition has a group of its own, whose ranks are forked, but for `collective` and `stack`,
which leave theirs as they find it (moments.py). With --out the numbers go to bounds.json in that
folder, of which docs/faults.md is made (scripts/faults_page.py); rows that were not measured stay.
Run it when nothing else runs: all of it takes some twenty minutes, half of them for the memory of
ranks of 100 MB. Rows with 2 GB have fewer repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import moments
from mortal import MB

from rankwise import WorkerGroup

LARGE = 100 * MB
HUGE = 2048 * MB
FEW = 20  # repetitions of a row with 2 GB
BARE = "for comparison, a bare process of 100 MB: SIGKILL to its end"
BARE_8 = "for comparison, 8 bare processes of 100 MB: SIGKILL to the last one's end"
BARE_HUGE = "for comparison, a bare process of 2 GB"


class Row(NamedTuple):
    """What is measured, once, in seconds, and the bounds: of the median and the worst, if any."""

    what: str
    part: str
    once: Callable[[], float]
    typical: float | None = None
    worst: float | None = None
    beside: str | None = None  # the row that has the kernel's own part of it
    few: int | None = None  # repetitions, where `--count` would take too long


def rows(four: WorkerGroup, fifo: str, two: WorkerGroup) -> list[Row]:
    timeout = moments.TIMEOUT
    return [
        Row("a rank with nothing of its own dies: the waiting caller's exception", "death",
            lambda: moments.death(0), 0.010, 0.100),
        Row("a rank of 100 MB dies: the waiting caller's exception", "death",
            lambda: moments.death(LARGE), 0.010, 0.100, BARE),
        Row("a rank of 2 GB dies: the waiting caller's exception", "death",
            lambda: moments.death(HUGE), beside=BARE_HUGE, few=FEW),
        Row(BARE, "bare", lambda: moments.bare(LARGE)),
        Row(BARE_8, "bare", lambda: moments.bare(LARGE, moments.RANKS)),
        Row(BARE_HUGE, "bare", lambda: moments.bare(HUGE), few=FEW),
        Row("a rank fails, its peers wait for it: the caller's exception", "collective",
            lambda: moments.collective(four, fifo), worst=0.100),
        Row("the driver is killed, the ranks idle: the last one's end", "owner",
            lambda: moments.owner("idle"), worst=0.500),
        Row("the driver is killed, the ranks idle and of 100 MB each: the last one's end", "owner",
            lambda: moments.owner("idle", LARGE), None, 0.500, BARE_8),
        Row("the driver is killed, the ranks hold the GIL in C: the last one's end", "owner",
            lambda: moments.owner("hold"), worst=0.500),
        Row("the driver is killed, the ranks hold the GIL in C, of 100 MB each", "owner",
            lambda: moments.owner("hold", LARGE), None, 0.500, BARE_8),
        Row("close() of an idle group", "close", moments.close_idle, worst=0.050),
        Row("close() of an idle group, the ranks of 100 MB each", "close",
            lambda: moments.close_idle(LARGE), None, 0.050, BARE_8),
        Row(f"close({timeout:g}), a rank stuck in C: beyond its {timeout:g} s", "close",
            moments.close_stuck, worst=1.0),
        Row("stacks(), a rank holds the GIL in C", "stack",
            lambda: moments.stack(two), worst=0.100),
    ]  # fmt: skip


def measure(only: list[str], count: int) -> tuple[list[dict[str, object]], list[str]]:
    """The rows that belong to `only`, each with its milliseconds; the names of all, in order."""
    found: list[dict[str, object]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        moments.group(4) as four,
        moments.group(2) as two,
    ):
        fifo = os.path.join(folder, "fifo")
        os.mkfifo(fifo)
        # Somebody has it open for writing, so that the ranks' own open does not wait.
        held = os.open(fifo, os.O_RDWR)
        every = rows(four, fifo, two)
        for row in every:
            if row.part not in only:
                continue
            times = [row.once() for _ in range(min(count, row.few or count))]
            found.append({
                "what": row.what,
                "typical": row.typical and row.typical * 1e3,
                "worst": row.worst and row.worst * 1e3,
                "beside": row.beside,
                "ms": [round(seconds * 1e3, 3) for seconds in times],
            })  # fmt: skip
            print(line(found[-1], len(times) < count), flush=True)
        os.close(held)
    return found, [row.what for row in every]


def line(row: dict[str, object], fewer: bool) -> str:
    ms = sorted(row["ms"])  # type: ignore[call-overload]
    said = (
        f"{row['what']:<76} median {statistics.median(ms):8.2f}  worst {ms[-1]:8.2f}  "
        f"of {len(ms):>3}"
    )
    if fewer:
        said += " (fewer than the others: each takes seconds)"
    if row["worst"] is not None:
        said += f"  bounds {row['typical']}, {row['worst']} ms"
    return said


PARTS = ("death", "collective", "owner", "close", "stack", "bare")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=200, help="repetitions of each row")
    parser.add_argument("--out", type=Path, help="the folder of bounds.json")
    options = parser.parse_args()
    from run import machine

    found, order = measure(options.only, options.count)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "bounds.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        write(path, machine(), kept + found, order)


def write(
    path: Path, machine: dict[str, object], found: list[dict[str, object]], order: list[str]
) -> None:
    """One row a line. Of two of one name the later; none that is not measured any more."""
    named = {str(row["what"]): row for row in found}
    lines = ",\n".join("  " + json.dumps(named[what]) for what in order if what in named)
    path.write_text(f'{{\n "machine": {json.dumps(machine)},\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
