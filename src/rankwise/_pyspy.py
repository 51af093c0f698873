"""py-spy's view of processes that did not write their stacks, or on request; where it is installed.

It reads a process from the outside: also one that blocks signals, and with the frames of C code.
The kernel may refuse it (ptrace); what it says then is as good an answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from rankwise._deadline import deadline, left

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

LIMIT = 5.0  # seconds for all of them together


def find() -> str | None:
    """The path of py-spy: beside this Python, or on PATH."""
    beside = os.path.join(os.path.dirname(sys.executable or ""), "py-spy")
    return beside if os.access(beside, os.X_OK) else shutil.which("py-spy")


def native_stacks(pids: Iterable[int]) -> dict[int, str]:
    """What py-spy says of each of `pids`; empty where it is not installed."""
    command = find()
    if command is None:
        return {}
    until = deadline(LIMIT)
    found = _dump(command, ["--native"], pids, until)
    # Not every machine has what the C frames need, and it says so with an error.
    again = [pid for pid, text in found.items() if text.startswith("Error")]
    return found | _dump(command, [], again, until)


def _dump(
    command: str, flags: list[str], pids: Iterable[int], until: float | None
) -> dict[int, str]:
    asked: dict[int, subprocess.Popen[str]] = {}
    found = {}
    try:
        for pid in pids:
            asked[pid] = subprocess.Popen(
                [command, "dump", *flags, "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        for pid, process in asked.items():
            try:
                found[pid] = _threads_in(process.communicate(timeout=left(until))[0])
            except subprocess.TimeoutExpired:
                found[pid] = f"py-spy did not answer within {LIMIT:g} s"
    except OSError as error:
        found.update(dict.fromkeys(pids, f"py-spy could not be started: {error}"))
    finally:
        for process in asked.values():
            if process.poll() is None:
                process.kill()
            process.communicate()
    return found


def _threads_in(text: str) -> str:
    """`text` without what stands before the first thread: the command line, Python's version."""
    _, begin, rest = text.partition("\nThread ")
    return (begin + rest).strip() or text.strip()
