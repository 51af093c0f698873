"""A value, or Failed: a user's exception as a value, as bytes, and as an exception again.

worker:  your code > value | Failed(exception) > frame          caught in `_serve.serve` for calls,
                                                                 in `capture` for what runs once
driver:  frame > failure(...) > the exception that the caller catches, with RemoteError as its cause
"""

from __future__ import annotations

import sys
from _pickle import PickleBuffer
from _pickle import dumps as plain_dumps
from _pickle import loads as plain_loads

from rankwise._deadline import clock
from rankwise._interrupts import is_interrupt
from rankwise.wire import codec
from rankwise.wire.borrowing import Received
from rankwise.wire.lending import Lent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any

    from rankwise.wire.arena import Arena


class Failed:
    """The method raised `error` at `when` (CLOCK_MONOTONIC, seconds)."""

    __slots__ = ("error", "when")
    __match_args__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.when = clock()


def capture(function: Callable[..., object], *args: object) -> Any:
    """Run the user's code: its value, or Failed, which is nobody else's. A worker's exit is not
    the driver's."""
    try:
        return function(*args)
    except BaseException as error:
        return Failed(error)


def encode_failure(failed: Failed, where: str = "", arena: Arena | None = None) -> bytes:
    """The body of a FAILED frame; `where`: the method, with its class.

    What is large goes into `arena`, where there is one: it is `Lent` then, and the frame
    FAILED_LENT. Never raises: what cannot travel, or has no room, goes as text.
    """
    error = failed.error
    text = format_traceback(error)
    name = _type_name(type(error))
    try:
        message = str.__str__(str(error))  # an enum's member, say, would not be told from junk
    except BaseException:
        message = "(its message could not be made)"
    told = (failed.when, name, message, text, where)
    if _may_travel(error):
        try:
            body = codec.dumps((*told, *_apart(error)), arena)
            # Tried here, where a failure harms nobody: an exception whose __init__ wants more than
            # its args dies in `loads`.
            seen = arena.peek(body) if arena and type(body) is Lent else opened(body)
            *_, pickled, buffers = seen
            if type(plain_loads(pickled, buffers=buffers)) is type(error):
                return body
        except BaseException:
            pass
    return plain_dumps((*told, None, ()), 5)


def _may_travel(error: BaseException) -> bool:
    """Whether the driver may raise it as it is."""
    if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):
        return False
    # Not imported for its own sake (it costs 10 ms): who raised the class has imported it.
    futures = sys.modules.get("concurrent.futures._base")
    return futures is None or not isinstance(error, futures.CancelledError)


def _apart(error: BaseException) -> tuple[object, Sequence[object]]:
    """`error`, pickled, and the buffers that it was pickled without: what is told beside it can be
    read where it cannot be rebuilt."""
    parcel = codec.Parcel()
    data = codec.dumps(error, parcel, ())  # tried here first, where a GPU's memory cannot be shown
    if not parcel.stream:
        return data, ()
    return PickleBuffer(b"".join(parcel.stream)), [*map(PickleBuffer, parcel.buffers)]


def opened(body: bytes) -> Any:
    """What a FAILED frame tells: when, type's name, message, traceback, where; and `_apart`."""
    if type(body) is not Received:
        return plain_loads(body)
    try:
        return body.load()
    except MemoryError as error:
        return clock(), "Exception", f"(it is too large to be read here: {error})", "", "", None, ()


def format_traceback(error: BaseException) -> str:
    """The traceback of `error`, from the user's own code on. Never raises."""
    try:
        import traceback  # 8 ms, and only a failure needs it; it wants a descriptor

        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame):
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:
        return _bare_traceback(error)


def _bare_traceback(error: BaseException) -> str:
    """As `format_traceback`, but without what has to be imported or opened for it."""
    lines = ["Traceback (most recent call last):\n"]
    trace = error.__traceback__
    while trace is not None:
        if not _is_ours(trace.tb_frame):
            code = trace.tb_frame.f_code
            place = f'"{code.co_filename}", line {trace.tb_lineno}, in {code.co_name}'
            lines.append(f"  File {place}\n")
        trace = trace.tb_next
    lines.append(f"{type(error).__name__} (its traceback could not be written in full)\n")
    return "".join(lines)


def _is_ours(frame: FrameType) -> bool:
    """Whether it is what calls the user's code: the reader of a traceback did not write it."""
    return frame.f_globals.get("__name__") in (
        __name__,
        "rankwise._serve",
        "rankwise.testing._inject",
    )


def _type_name(cls: type[BaseException]) -> str:
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


def failed_at(body: bytes) -> float:
    """When the failure in `body` happened, by the worker's CLOCK_MONOTONIC."""
    when: float = _parts(body)[0]
    return when


def _parts(body: bytes) -> tuple[float, str, str, str, str, Any, Any]:
    """What `encode_failure` has put into `body`; where it is none of its own, words about that."""
    try:
        when, name, message, text, label, pickled, buffers = opened(body)
        if type(when) is float and {type(name), type(message), type(text), type(label)} == {str}:
            return when, name, message, text, label, pickled, buffers
        reason: object = "it is something else"
    except Exception as error:
        if is_interrupt(error):
            raise
        reason = repr(error)
    message = f"it failed, and what it says of that cannot be read: {reason}"
    return clock(), "BadFrame", message, "", "", None, ()


def failure(body: bytes, rank: int, pid: int, method: str) -> Exception:
    """The exception for the body of a FAILED frame, ready to be raised."""
    from rankwise.errors import RemoteError  # the driver's alone, and heavy

    _, name, message, text, label, pickled, buffers = _parts(body)
    where = f"rank {rank} (pid {pid}) in {label or method}"
    remote = RemoteError(
        f"{where}: {name}: {message}" if message else f"{where}: {name}",
        rank=rank,
        pid=pid,
        method=method,
        type_name=name,
        remote_traceback=text,
    )
    if pickled is None:
        return remote
    try:
        error = plain_loads(pickled, buffers=buffers)
    except Exception as reason:
        if is_interrupt(reason):
            raise
        remote.add_note(f"its own exception object could not be rebuilt here: {reason!r}")
        return remote
    if not isinstance(error, Exception):
        return remote
    BaseException.__setattr__(error, "__cause__", remote)  # a frozen dataclass refuses its own
    add_note(error, where)
    return error


def add_note(error: BaseException, note: str) -> None:
    """As `error.add_note(note)`, whatever its class says to being changed."""
    try:
        error.add_note(note)
    except Exception as reason:
        if is_interrupt(reason):
            raise
        notes = [*getattr(error, "__notes__", ()), note]
        BaseException.__setattr__(error, "__notes__", notes)
