"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import sys

from rankwise._messages import HEADER, MAGIC


def frame(kind, sequence, call_id, body=b""):
    return HEADER.pack(MAGIC, kind, 0, sequence, call_id, len(body)) + body


class Worker:
    def echo(self, value):
        return value

    def write(self, data):
        """Write `data` into the call's own socket, before its true answer."""
        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["channel"]._sock.sendall(data)
        return "the true answer"
