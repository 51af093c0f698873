"""Fault plans, the rank's half. Imported by a rank that has a fault, and by no other.

    arm > spawn        Channel.receive > import, construct (in the boot call's own loading)
                                       > receive > `before` > the method > Channel.reply

It stands between a rank's channel and its loop, and before each method: a group without a plan
has neither.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from _pickle import dumps as plain_dumps
from _pickle import loads as plain_loads
from base64 import b64decode

from rankwise._messages import BOOT, CALL, FAILED
from rankwise._outcome import Failed, encode_failure
from rankwise.wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from rankwise._serve import Channel
    from rankwise.wire.arena import Arena

    Told = tuple[str, int | None, str, int | None, float, int, bytes]

_here = threading.local()


class Armed:
    """The faults of one rank, and how far it has come."""

    def __init__(self, text: str, rank: int, sleep: Callable[[float], None]) -> None:
        told: list[Told] = plain_loads(b64decode(text))
        self._faults = [one for one in told if one[1] in (None, rank)]
        self._rank = rank
        self._sleep = sleep
        self.calls = 0  # that it was sent; the one that makes the worker does not count

    def act(self, stage: str) -> bool:
        """Have happen what is to happen now; whether the message at hand is to be lost.

        Raises what the rank is to raise.
        """
        lost = False
        for what, _, at, call, seconds, number, error in self._faults:
            if at != stage or call not in (None, self.calls):
                continue
            match what:
                case "kill":
                    os.kill(os.getpid(), number)
                case "delay":
                    self._sleep(seconds)
                case "hold_gil":
                    _hold_gil(seconds)
                case "drop":
                    lost = True
                case "refuse":
                    raise self._error(stage, error)
        return lost

    def _error(self, stage: str, pickled: bytes) -> Exception:
        if pickled:
            error: Exception = codec.loads(pickled)
            return error
        from rankwise.testing._faults import Refused

        return Refused(f"rank {self._rank} refuses at {stage!r}, as planned")


class FaultyChannel:
    """What the worker's loop sees instead of its channel."""

    def __init__(self, channel: Channel, armed: Armed) -> None:
        self._channel = channel
        self._armed = armed
        self.refused: Exception | None = None  # raised when the call is to be run

    @property
    def arena(self) -> Arena | None:
        return self._channel.arena

    def hang_up(self) -> None:
        self._channel.hang_up()

    def receive(self) -> tuple[int, int, int, bytes | bytearray | memoryview] | None:
        while True:
            frame = self._channel.receive()
            if frame is None:
                return None
            kind, flags, call_id, body = frame
            if kind == BOOT:
                fields, settings, blob = plain_loads(body)
                body = plain_dumps((fields, settings, plain_dumps(_Boot(blob), 5)), 5)
            elif kind == CALL:
                self._armed.calls += 1
                try:
                    if self._armed.act("receive"):
                        continue
                except Exception as error:
                    self.refused = error
            return kind, flags, call_id, body

    def reply(self, kind: int, call_id: int, body: bytes) -> None:
        if self._armed.calls:  # else it is the answer to the boot call
            try:
                if self._armed.act("reply"):
                    return
            except Exception as error:
                kind, body = FAILED, encode_failure(Failed(error))
        self._channel.reply(kind, call_id, body)

    def before(self) -> None:
        """What is to happen before a method."""
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused
        self._armed.act("run")


class _Boot:
    """Stands for the pickled target and its arguments; `_load` is called when it is unpickled."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __reduce__(self) -> tuple[object, ...]:
        return _load, (self.blob,)


def _load(blob: bytes) -> object:
    armed: Armed = _here.armed
    armed.act("import")
    target, args, kwargs = codec.loads(blob, _here.channel.arena)

    def make(*args: Any, **kwargs: Any) -> object:
        armed.act("construct")
        return target(*args, **kwargs)

    return make, args, kwargs


def arm(
    text: str, rank: int, channel: Channel, sleep: Callable[[float], None] = time.sleep
) -> tuple[FaultyChannel, Callable[[], object]]:
    """The channel of `rank`, and what is called before its methods, with the faults in `text`.

    Called in the rank's own main thread, before it has read anything.
    """
    _here.armed = armed = Armed(text, rank, sleep)
    _here.channel = channel
    try:
        armed.act("spawn")
    except Exception as error:
        sys.exit(f"rankwise: {error}")
    faulty = FaultyChannel(channel, armed)
    return faulty, faulty.before


def _hold_gil(seconds: float) -> None:
    import ctypes

    # By PyDLL, which keeps the lock where CDLL gives it up. Again, because a signal (somebody has
    # asked for stacks) ends it early.
    poll = ctypes.PyDLL(None).poll
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        poll(None, 0, int(left * 1000) + 1)
