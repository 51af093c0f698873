"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

from rankwise import worker_info


class Worker:
    def __init__(self):
        self.rank = worker_info().rank

    def pid(self):
        return os.getpid()

    def count_in_c(self, steps):
        """Holds the GIL in C code all the while."""
        return sum(range(steps))

    def block(self, path):
        """Holds the GIL in C code, asleep, and lets no signal through, until `path` is there."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        while not os.path.exists(path):
            ctypes.PyDLL(None).usleep(200_000)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return "done"

    def deep(self, depth, path):
        if depth:
            return self.deep(depth - 1, path)
        with open(f"{path}.{self.rank}") as gate:
            return gate.read()

    def start_threads(self, number):
        event = threading.Event()
        for _ in range(number):
            threading.Thread(target=event.wait, daemon=True).start()

    def compute(self, path):
        while not os.path.exists(path):
            pass

    def churn(self, path):
        """Threads that run Python all the time, come, and go, until `path` is there."""
        sys.setswitchinterval(1e-5)
        done = False

        def recurse(depth):
            return recurse(depth - 1) if depth else 0

        def run():
            while not done:
                recurse(20)
                exec("def f(n):\n    return [m for m in range(n)]\nf(10)", {})

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        while not os.path.exists(path):
            short = threading.Thread(target=recurse, args=(5,))
            short.start()
            short.join()
        done = True
        for thread in threads:
            thread.join()
        return "fine"

    def crash(self):
        ctypes.string_at(0)

    def run(self, code):
        space = {"worker": self}
        exec(code, space)
        return space.get("result")
