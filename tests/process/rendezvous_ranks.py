"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from rankwise import worker_info

LIMIT = 120  # seconds, for one round


class Meeting:
    """Two ranks that meet at MASTER_PORT as torch's store does: rank 0 binds it, with SO_REUSEADDR,
    on every interface, and listens; rank 1 connects."""

    def __init__(self, group: int) -> None:
        self.group = group

    def meet(self) -> tuple[int, int]:
        info = worker_info()
        with socket.socket() as end:
            if info.rank == 0:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                end.bind(("", info.master_port))
                end.listen(1)
                end.settimeout(LIMIT)
                with end.accept()[0] as peer:
                    peer.sendall(self.group.to_bytes(2, "big"))
                    theirs = peer.recv(2)
            else:
                until = time.monotonic() + LIMIT
                while end.connect_ex(("127.0.0.1", info.master_port)):
                    if time.monotonic() > until:
                        raise TimeoutError(f"nobody listens on {info.master_port}")
                    time.sleep(0.001)
                end.settimeout(LIMIT)
                end.sendall(self.group.to_bytes(2, "big"))
                theirs = end.recv(2)
        return int.from_bytes(theirs, "big"), info.master_port


class Reduction:
    """Two ranks of torch's process groups: met by torch alone, then by rankwise."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.again = False

    def plain(self) -> tuple[float, int]:
        import torch.distributed

        # Who comes before rank 0 listens is refused, and torch has it sleep for half a second. That
        # is seen once a start; it is not what takes a port away.
        if self.again and worker_info().rank:
            listening(worker_info().master_port)
        self.again = True
        torch.distributed.init_process_group("gloo")
        return self.reduce()

    def ours(self) -> tuple[float, int]:
        import rankwise.torch

        rankwise.torch.init_process_group(timeout=LIMIT)
        return self.reduce()

    def reduce(self) -> tuple[float, int]:
        import torch

        total = torch.tensor([float(self.group)])
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        return total.item() / 2, worker_info().master_port


def listening(port: int) -> None:
    """Wait until somebody listens on `port`, without a connection to it."""
    until = time.monotonic() + LIMIT
    while not any(
        fields[3] == "0A" and fields[1].endswith(f":{port:04X}")
        for table in Path("/proc/net").glob("tcp*")  # tcp6 too, where there is one
        for fields in map(str.split, table.read_text().splitlines())
    ):
        if time.monotonic() > until:
            raise TimeoutError(f"nobody listens on {port}")
        time.sleep(0.001)
