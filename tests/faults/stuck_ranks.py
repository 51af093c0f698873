"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import signal
import threading
import time

from faulty import RANK, go_wrong


class Clockwork:
    """Rank 1 goes wrong so many seconds after its construction has begun: by the kernel's clock
    where it is SIGALRM that ends it, else by that of a thread."""

    def __init__(self, fault: str, seconds: float) -> None:
        if os.environ["RANK"] != str(RANK):
            return
        if fault == "SIGALRM":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        else:
            go_wrong_after(seconds, fault)

    def wait(self) -> None:
        threading.Event().wait()

    def nothing(self) -> None:
        pass


def go_wrong_after(seconds: float, fault: str) -> None:
    def run() -> None:
        time.sleep(seconds)
        go_wrong(fault)

    threading.Thread(target=run, daemon=True).start()
