"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import threading
import time

from rankwise import Late


class Worker:
    def echo(self, value):
        return value

    def large(self, size):
        return bytes(size)

    def nap(self, seconds):
        time.sleep(seconds)
        return "slept"

    def pid(self):
        return os.getpid()

    def keep_a_thread(self):
        """One that outlives the loop: an interpreter that ends waits for it."""
        threading.Thread(target=threading.Event().wait).start()
        return os.getpid()

    def late_without_threads(self):
        """As at a limit of threads: none can be started."""

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = refuse
        return Late(int)

    def late_that_forks(self):
        def get():
            if os.fork() == 0:
                return "the child"
            return "the parent"

        return Late(get)


class ForksToo(Worker):
    """A child of its constructor comes out of it."""

    def __init__(self):
        os.fork()
