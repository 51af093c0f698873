"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from rankwise import worker_info


class Rank:
    """One rank of a process group, made by rankwise ("ours"), by torch ("plain") or not yet."""

    def __init__(self, how: str = "ours", **kw: object) -> None:
        if how == "ours":
            self.join(**kw)
        elif how == "plain":
            import torch.distributed

            torch.distributed.init_process_group("gloo")

    def join(self, **kw: object) -> None:
        import rankwise.torch

        rankwise.torch.init_process_group(**{"timeout": 60, **kw})

    def leave(self) -> None:
        import torch.distributed

        torch.distributed.destroy_process_group()

    def again(self, told: str | None = None) -> float:
        """Leave, say so to whoever reads the FIFO `told`, and join the next round."""
        self.leave()
        if told is not None:
            Path(told).write_text("left")
        self.join()
        return self.total(1.0)

    def total(self, mine: float | None = None) -> float:
        """The sum over all ranks of 10 ** rank, or of `mine`."""
        import torch

        value = torch.tensor([10.0 ** worker_info().rank if mine is None else mine])
        torch.distributed.all_reduce(value)
        return value.item()

    def fail_on(self, rank: int) -> float:
        if worker_info().rank == rank:
            raise ValueError("no such token")
        return self.total()

    def run(self, expression: str) -> object:
        import torch

        import rankwise.torch

        return eval(expression, {"torch": torch, "rt": rankwise.torch})

    def listeners(self) -> set[str]:
        """The addresses that this process listens on, as /proc/net spells them."""
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the descriptor that lists the directory
                links.add(os.readlink(f"/proc/self/fd/{fd}"))
        sockets = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        ]
        return {
            fields[1].partition(":")[0]
            for fields in sockets
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links
        }
