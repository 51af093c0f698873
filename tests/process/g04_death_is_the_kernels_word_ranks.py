"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import time


class Worker:
    def echo(self, value):
        return value

    def parent(self):
        return os.getppid()

    def fork(self, how):
        """A child that holds whatever it inherited, and does nothing."""
        import ctypes

        read, write = os.pipe()
        pid = os.fork() if how == "python" else ctypes.CDLL(None).fork()
        if pid == 0:
            os.close(write)
            os.read(read, 1)  # until its parent has gone and the pipe ends
            time.sleep(600)
        os.close(read)
        self.keep = write
        return pid

    def fork_in_a_thread_that_stays(self, how):
        import threading

        pids = []
        thread = threading.Thread(target=lambda: pids.append(self.fork(how)))
        thread.start()
        thread.join()
        return pids[0]

    def run(self, path):
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        time.sleep(600)
