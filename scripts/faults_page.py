"""docs/faults.md, out of the fault tests' own marks and parameters, and of measured bounds.

python scripts/faults_page.py > docs/faults.md
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "faults"
MEASURED = ROOT / "docs" / "benchmarks" / "bounds.json"

# Who waits at a stage at which it is not a call, or not only.
_WAITERS = {
    "start": "the constructor",
    "spawn": "the constructor",
    "import": "the constructor",
    "construct": "the constructor",
    "idle": "`on_failure`",
    "close": "`close`",
    "exit": "`close`",
}

HEAD = """# What happens when something goes wrong

Each row is a test of `tests/faults`, run with every combination of what it lists; this page is
made of the tests' own parameters (`scripts/faults_page.py`). "told" is when the caller hears of it,
by the contract: "at once" is as soon as the kernel has closed the dead process's descriptors (about
1 ms, and some 30 ms for each GB that it must free first), or the rank's own word is there. "test
fails after" is the limit that each of these tests has for itself, start and end of the group
included: it tells a hang from an answer on a machine that stalls, and is no measurement; those are
at the end. `make soak` plays all of it at random.

Waiters: `call`; `result` of a future; a `callback` on one; `await` of one; `each`, the futures of
`submit_each`.

| stage | fault | started by | waiter | the caller gets | told | test fails after |
|---|---|---|---|---|---|---|
"""


def rows() -> list[str]:
    """The table's rows, in the order of the files and of the tests in them."""
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # as pytest has them
    found = []
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        for name, test in vars(module).items():
            marks = list(getattr(test, "pytestmark", ())) if name.startswith("test_") else []
            cell = next((mark for mark in marks if mark.name == "cell"), None)
            if cell is not None:
                found.append(_row(cell.kwargs, marks))
    return found


def _row(cell: dict[str, Any], marks: list[Any]) -> str:
    values: dict[str, list[str]] = {}
    for mark in marks:
        if mark.name == "parametrize":
            names, given = mark.args[:2]
            first = (names if isinstance(names, str) else names[0]).split(",")[0].strip()
            ids = mark.kwargs.get("ids")
            values[first] = [_text(value, ids, at) for at, value in enumerate(given)]
    stages = values.get("stage", [cell["stage"]])
    waiter = cell.get("waiter", _WAITERS.get(cell["stage"], "call"))
    columns = [
        ", ".join("receive" if stage == "load" else stage for stage in stages),
        ", ".join(values.get("fault", [cell.get("fault", "it cannot be had")])),
        ", ".join(values.get("method", values.get("options", [cell.get("method", "spawn")]))),
        ", ".join(values.get("waiter", [waiter])),
        cell["gets"],
        cell["told"],
        f"{cell['within']} s",
    ]
    return "| " + " | ".join(columns) + " |"


def _text(value: Any, ids: Any, at: int) -> str:
    if callable(ids):
        return str(ids(value)).removeprefix("by_")
    if ids is not None:
        return str(ids[at])
    return str(value[0] if isinstance(value, tuple) else value)


ABSENT = """
## What has no row, and why

- **One waiter** where others could wait: every waiter is handed the same settled call, and the
  rows with all of them show that. `await WorkerGroup.start(...)` gets what the constructor raises
  (tests/process/test_asyncio.py). `await` in a driver without descriptors: a loop that is not
  there yet cannot be made then, and one that is there gets what a callback gets.
- **spawn** with a fault of the user's code: none of it runs yet. An interpreter that ends by itself
  there is the row with SystemExit; whether by that or by `os._exit`, its parent sees one status.
- **ready** is a moment, between the constructor's return and the first call: the rows that go
  wrong after so many microseconds fall before it, into it and after it. What is raised there is
  raised in `__enter__`, or in a thread of the user's; the launcher's death there is that of
  construct or idle.
- **idle** with something raised: nothing runs. What a thread of the user's raises ends that
  thread, as in any Python process, and not the rank.
- **unpicklable, unrebuildable** at any other stage: only arguments and results travel. The
  constructor's arguments are pickled before there is a process
  (tests/contract/test_construction.py); one that cannot be rebuilt in the rank is import x raise.
- **out of memory** by the kernel's hand is SIGKILL; `WorkerDied.oom_killed` tells it
  (tests/unit/test_reaper.py plays the kernel). A message that there is no room for is a
  MemoryError of that call (tests/process/test_g10_large_payloads.py). At spawn there is nobody to
  raise it: an interpreter that has no memory ends, as in the rows of spawn.
- **disk full** and files of rankwise's own: it has none.
- **log pipe full** at spawn, import, receive or reply: a pipe does not know what the rank is at;
  the rows of start, run, large transfer and close fill it before, in and after a call.
- **descriptor limit reached** at import, receive or reply: reached in the constructor, it is there
  for every call that follows, and what the user's own code opens raises that code's OSError.
- **large transfer** with something raised: it is loaded and pickled as anything else is, in the row
  of receive, run and reply. Memory that ends in it is a MemoryError of that call, as above.
- **close** with memory, a disk or descriptors that the worker's own `__exit__` has none of: that is
  something raised in it. A rank that sticks in a call at close is "run, then close".
- **stream**: there are no streams yet.
"""

BOUNDS = """
## How soon

Measured by `make bench-bounds` ({machine}).
Groups of 8 ranks; of 4 where one fails, of 2 for `stacks()`. A bound is for the worst, unless it
says median. Nothing else ran while these were taken, on a virtual machine whose neighbours are not
quiet. The kernel frees a process's memory before it says that the process has ended: what a bare
process as large (or as many of them) needs for that stands beside, and is no part of what rankwise
adds. Rows with 2 GB have fewer repetitions: each takes seconds.

{over}

| | bound | median | worst | bare, median | of |
|---|---|---|---|---|---|
"""
COMPARED = "for comparison"  # so begins a row of bare processes
NONE_OVER = "No row is over its bound."
SOME_OVER = (
    "**A row that begins with OVER has missed its bound**, by the number in bold; beside it, what\n"
    "the kernel alone takes, where there is such a row."
)


def bounds() -> list[str]:
    """The rows of what `make bench-bounds` has measured last; the table's head is the first."""
    found = json.loads(MEASURED.read_text())
    machine = ", ".join(f"{value} {key}" if key == "cpus" else f"{key} {value}"
                        for key, value in found["machine"].items())  # fmt: skip
    table = []
    some_over = False
    for row in found["rows"]:
        bound = "" if row["worst"] is None else f"{row['worst']:g} ms"
        if row["typical"] is not None:
            bound = f"median {row['typical']:g} ms, {bound}"
        ms = row["ms"]
        middle, worst = statistics.median(ms), max(ms)
        late = row["typical"] is not None and middle > row["typical"]
        late = late or (row["worst"] is not None and middle > row["worst"])
        latest = row["worst"] is not None and worst > row["worst"]
        some_over = some_over or late or latest
        cells = (
            f"OVER: {row['what']}" if late or latest else row["what"],
            bound,
            f"**{middle:.1f} ms**" if late else f"{middle:.1f} ms",
            f"**{worst:.1f} ms**" if latest else f"{worst:.1f} ms",
            _bare(row, found["rows"]),
            len(ms),
        )
        table.append("| " + " | ".join(map(str, cells)) + " |")
    over = SOME_OVER if some_over else NONE_OVER
    return [BOUNDS.format(machine=machine, over=over).rstrip("\n"), *table]


def _bare(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The median of the comparison that belongs to `row`, if one does. Rows name theirs; those that
    were measured before they did have the one that is as large."""
    size = re.search(r"of \d+ [MG]B", row["what"])
    if row["what"].startswith(COMPARED):
        return ""
    for other in rows:
        if "beside" in row:
            belongs = other["what"] == row["beside"]
        else:
            belongs = size is not None and size[0] in other["what"]
        if belongs and other["what"].startswith(COMPARED):
            return f"{statistics.median(other['ms']):.1f} ms"
    return ""


def page() -> str:
    table = bounds() if MEASURED.exists() else []
    return HEAD + "\n".join([*rows(), ABSENT.rstrip(), *table]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
