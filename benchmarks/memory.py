"""What a large argument takes in memory, in all processes together, beyond the caller's own array.

`call(array)` to all ranks; each reads a byte of every page, says so, and stays in the call until a
thread of the driver has counted. Counted are the pages of driver, launcher and ranks, each divided
by who shares it (Pss of /proc/PID/smaps_rollup), and the shared memory that is allotted, mapped or
not: so a copy a rank would show as four copies, and one for all as one. What shows only in passing
(a copy made and dropped before that) is in the kernel's high-water marks: the row "one process"
has the largest rise of any.

All is beyond what there was before the first call. The first round is that call.
"""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
from figures import field, spread

from rankwise import WorkerGroup

PAGE = 4096
MB = 1 << 20


class Stayer:
    def stay(self, array: np.ndarray, told: str, let_go: str) -> int:
        """Read it, say so through one FIFO, and wait for the other."""
        total = int(array[::PAGE].sum())
        with open(told, "wb", buffering=0) as file:
            file.write(b"x")
        with open(let_go, "rb", buffering=0) as file:
            file.read(1)
        return total


def taken(pids: list[int]) -> int:
    """Bytes that these processes take together, with all that is allotted of shared memory."""
    own = 0
    shared: dict[int, int] = {}  # inode -> bytes: each file once, whoever has it open
    for pid in pids:
        own += field(f"/proc/{pid}/smaps_rollup", "Pss_Anon")
        own += field(f"/proc/{pid}/smaps_rollup", "Pss_File")
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # the listing's own
                if os.readlink(link).startswith("/memfd:"):
                    about = link.stat()
                    shared[about.st_ino] = about.st_blocks * 512
    return own + sum(shared.values())


def measure(ranks: int, rounds: int, size: int = 256 * MB) -> dict[str, list[float]]:
    """Times `size`, one number a round."""
    source = np.ones(size, np.uint8)
    found: dict[str, list[float]] = {"all processes": [], "one process": []}
    with tempfile.TemporaryDirectory() as folder, WorkerGroup(Stayer, ranks) as group:
        told, let_go = (os.path.join(folder, name) for name in ("told", "let_go"))
        os.mkfifo(told)
        os.mkfifo(let_go)
        # Open for both, so that no open waits for another.
        told_fd, let_go_fd = (os.open(path, os.O_RDWR) for path in (told, let_go))
        group.call(Stayer.stay, source[:0], told, os.devnull)  # all is imported that is needed
        os.read(told_fd, ranks)
        launcher = group[0].call(lambda worker: os.getppid())
        pids = [os.getpid(), launcher, *group.pids]
        counted: list[int] = []

        def count() -> None:
            seen = 0
            while seen < ranks:
                seen += len(os.read(told_fd, ranks))
            counted.append(taken(pids))
            os.write(let_go_fd, b"x" * ranks)

        had = taken(pids)
        peaks = {}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            peaks[pid] = field(f"/proc/{pid}/status", "VmRSS")
        for _ in range(rounds):
            counter = threading.Thread(target=count, daemon=True)
            counter.start()
            group.call(Stayer.stay, source, told, let_go)
            counter.join()
            found["all processes"].append((counted[-1] - had) / size)
            rises = [field(f"/proc/{pid}/status", "VmHWM") - peaks[pid] for pid in pids]
            found["one process"].append(max(rises) / size)
        os.close(told_fd)
        os.close(let_go_fd)
    return found


def table(found: dict[str, list[float]], ranks: int) -> str:
    lines = [f"{f'memory, times 256 MB, {ranks} ranks':<34}{'median (least-most)':>24}"]
    lines += [f"{name:<34}{spread(values, 2):>24}" for name, values in found.items()]
    lines.append("beyond the caller's own array: 1.00 is one copy in all")
    return "\n".join(lines)
