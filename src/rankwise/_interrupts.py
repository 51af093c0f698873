"""Telling an exception out of a signal handler from one of the code that it struck.

Where we run somebody's code and take what it raises for its own fault (a `__reduce__`, a
`__setstate__`), the main thread may be struck by an alarm or ^C meanwhile. That exception is not
about the object at hand: it has to pass.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Final

# What a handler hears that uses a group while its own thread holds the group's lock.
IN_A_STEP: Final = (
    "a signal handler (or a finalizer) has interrupted this group in the middle of a step and uses "
    "it again: let the handler set a flag or raise instead"
)


def is_interrupt(error: BaseException) -> bool:
    """Whether `error`, or what it was raised over, came out of a Python signal handler."""
    if isinstance(error, KeyboardInterrupt):
        return True
    codes = _handler_codes()
    seen = error
    for _ in range(8):
        trace = seen.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in codes:
                return True
            trace = trace.tb_next
        context = seen.__context__
        if context is None or _is_being_handled(context):
            return False
        seen = context
    return False


def _is_being_handled(error: BaseException) -> bool:
    """Whether it was caught by who is still at it: a caller of ours, in an `except` of its own."""
    caught_in = error.__traceback__.tb_frame if error.__traceback__ is not None else None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame is caught_in:
            return True
        frame = frame.f_back
    return False


def _handler_codes() -> set[object]:
    import signal  # 4 ms, and only a failure needs it

    codes = set()
    for number in signal.valid_signals():
        handler: object = signal.getsignal(number)
        handler = getattr(handler, "func", handler)  # functools.partial
        handler = getattr(handler, "__func__", handler)  # a bound method
        if not hasattr(handler, "__code__"):
            handler = type(handler).__dict__.get("__call__")  # an object that can be called
        code = getattr(handler, "__code__", None)
        if code is not None:
            codes.add(code)
    return codes
