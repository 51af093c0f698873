"""The stamps of `call_path.py`: wrappers around the pieces of a call, put in from outside.

    driver   [A encode E]  (s0 send s1) a rank        (r0 recv r1) a rank   [T take U]  Z
    worker                              (w0 recv w1) (loads) (method) (encode) (x0 send x1)

Nothing in src knows of them. `Driver` puts Python functions in the place of names that the call
path looks up in its modules, and takes them out again; `Stamped`, the class of the ranks, does the
same in its own process for good, and finds its channel in the frames that called its constructor.
Every stamp is CLOCK_MONOTONIC, which all processes of a machine share, in nanoseconds. A wrapper
takes about 0.3 us for its two stamps; a rank has five, the driver two and two for each rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic_ns as now
from typing import Any

from rankwise import _serve, _views
from rankwise.wire import joint

A_CALL = 10  # stamps of a rank a call: before and after recv, loads, the method, encode, send
RECV, READ, LOADS, LOADED, RUN, RAN, ENCODE, ENCODED, SEND, SENT = range(A_CALL)


def stamped(inner: Callable[..., Any], stamps: list[int]) -> Callable[..., Any]:
    """`inner`, with a stamp before and after; none where it raises (a look at an empty socket)."""

    def wrapper(*args: Any) -> Any:
        before = now()
        value = inner(*args)
        stamps.append(before)
        stamps.append(now())
        return value

    return wrapper


class Stamped:
    """A rank's object: what `calls.Echo` is, and the stamps of its process."""

    def __init__(self) -> None:
        self.stamps: list[int] = []
        frame: Any = sys._getframe()
        while frame.f_code is not _serve.serve.__code__:
            frame = frame.f_back
        channel = frame.f_locals["channel"]
        channel._recv = stamped(channel._recv, self.stamps)
        channel._send = stamped(channel._send, self.stamps)
        _serve.plain_loads = stamped(_serve.plain_loads, self.stamps)
        _serve.encode_result = stamped(_serve.encode_result, self.stamps)

    def echo(self, value: object) -> object:
        stamps = self.stamps
        stamps.append(now())
        stamps.append(now())
        return value

    def clear(self) -> None:
        self.stamps.clear()

    def fetch(self, calls: int) -> list[int]:
        """Those of the `calls` since `clear`, whose own answer was stamped first."""
        return self.stamps[4 : 4 + calls * A_CALL]


class Driver:
    """The driver's stamps, while it is entered: lists that a call appends to."""

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.sent: list[int] = []
        self.taken: list[int] = []
        self.received: list[Any] = []  # socket, before, after; and so on
        self._kept: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Driver:
        self._put(_views, "encode_call", stamped(_views.encode_call, self.encoded))
        self._put(_views, "take", stamped(_views.take, self.taken))
        self._put(joint, "SEND", stamped(joint.SEND, self.sent))
        receive, received = joint.RECEIVE, self.received

        def wrapper(sock: Any, size: int) -> bytes:
            before = now()
            data: bytes = receive(sock, size)
            received.append(sock)
            received.append(before)
            received.append(now())
            return data

        self._put(joint, "RECEIVE", wrapper)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, value in self._kept:
            setattr(module, name, value)
        self._kept.clear()

    def _put(self, module: Any, name: str, value: Any) -> None:
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def clear(self) -> None:
        for stamps in (self.encoded, self.sent, self.taken, self.received):
            stamps.clear()
