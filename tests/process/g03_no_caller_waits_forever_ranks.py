"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import ctypes
import os
import signal
import threading


class Worker:
    def echo(self, value):
        return value

    def hold(self, fd_path):
        """Say that it runs, then run until the end of the other side."""
        fd = os.open(fd_path, os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        threading.Event().wait()

    def die(self, how):
        if how == "exit":
            os._exit(3)
        elif how == "abort":
            os.abort()
        elif how == "segfault":
            ctypes.string_at(0)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


# -- these lay hands on the rank's end of the call channel, out of the frames below them ----------


def lose_the_reply(worker, counted):
    """Have this call's answer go nowhere. `counted`: the next one shows a gap."""
    from rankwise.wire.worker_channel import WorkerChannel

    real = WorkerChannel.reply

    def reply(self, kind, call_id, body):
        WorkerChannel.reply = real
        if counted:
            self._sent += 1

    WorkerChannel.reply = reply


def write_raw(worker, data):
    import sys

    frame = sys._getframe()
    while "channel" not in frame.f_locals:
        frame = frame.f_back
    frame.f_locals["channel"]._sock.send(data)


GARBAGE = {
    "noise": b"\xff" * 64,
    "zeros": b"\0" * 24,
    "half_a_header": b"\x01W\x10",
    "text": b"import this\n" * 10,
    "big": os.urandom(100_000),
}
