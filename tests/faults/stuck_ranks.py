"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import signal
import threading

from faulty import RANK


class Clockwork:
    """Rank 1 is killed so many seconds after its construction has begun, by the kernel's clock."""

    def __init__(self, seconds: float) -> None:
        if os.environ["RANK"] == str(RANK):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def wait(self) -> None:
        threading.Event().wait()
