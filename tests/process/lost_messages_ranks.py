"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import threading
import time


class Worker:
    def echo(self, value):
        return value

    def lose(self, count):
        """Have the answers to this call and to the next ones, `count` in all, go nowhere."""
        from rankwise.wire.worker_channel import WorkerChannel

        real = WorkerChannel.reply

        def reply(self, kind, call_id, body):
            nonlocal count
            count -= 1
            if count == 0:
                WorkerChannel.reply = real

        WorkerChannel.reply = reply

    def pause_after_reading(self, seconds, hold):
        """When the next call has been read: get no further for so long."""
        import sys

        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        channel = frame.f_locals["channel"]
        real = channel._recv

        def recv(size):
            data = real(size)
            channel._recv = real
            if hold:
                hold_lock(seconds)
            else:
                time.sleep(seconds)
            return data

        # The sleep that comes after this call is on a `recv` that was looked up before: so the next
        # call is read by the old one, and the one after it by this.
        channel._recv = recv

    def keep_lock(self, seconds):
        """From a second thread, hold the interpreter's lock in C code, over and over."""
        stop = time.monotonic() + seconds

        def run():
            while time.monotonic() < stop:
                hold_lock(min(0.9, seconds))

        threading.Thread(target=run, daemon=True).start()


def hold_lock(seconds):
    import ctypes

    ctypes.PyDLL(None).poll(None, 0, int(seconds * 1000))
