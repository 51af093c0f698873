"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os


class Worker:
    def echo(self, value):
        return value

    def pids(self):
        return [os.getpid(), os.getppid()]

    def hold(self, path):
        with open(path, "rb") as file:
            return file.read()

    def leave_a_daemon(self):
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            if pid == 0:
                os.execvp("sleep", ["sleep", "600"])
            os.write(write, str(pid).encode())
            os._exit(0)
        os.close(write)
        pid = int(os.read(read, 20))
        os.close(read)
        os.wait()
        return pid


def fails(worker):
    raise RuntimeError("no")
