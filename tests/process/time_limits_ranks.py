"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import ctypes
import os
import signal
import time

from rankwise import worker_info


class Worker:
    def __init__(self):
        self.rank = worker_info().rank

    def pid(self):
        return os.getpid()

    def load(self, path, slow=(1,)):
        """All but the ranks `slow` return; these wait at the gate."""
        print("compiling kernels", flush=True)
        if self.rank in slow:
            return self.wait_at(path)
        return self.rank

    def wait_at(self, path):
        with open(path) as gate:
            return gate.read()

    def spin(self, path):
        while not os.path.exists(path):
            pass

    def sleep_in_c(self, seconds):
        """Holds the GIL, asleep in C code that a signal would wake. Returns how long it slept."""
        began = time.monotonic()
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return time.monotonic() - began

    def block(self, seconds, path=None):
        """Lets no signal through for so long, or so long again and again until `path` is there."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        while path is not None and not os.path.exists(path):
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return "done"
