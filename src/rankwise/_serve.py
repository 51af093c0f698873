"""The worker's loop: a call comes, a method runs, an answer leaves.

    serve > _construct > READY > receive > load > method > value | Failed > encode > reply > _leave

One thread receives, runs and answers; calls are run in the order in which they come. What your
method raises is a value, SystemExit too. Nothing here knows a process: `_worker.py` runs it on a
process's main thread, and the inline backend in a thread.
"""

from __future__ import annotations

import sys
import time
from _pickle import loads as plain_loads
from types import CoroutineType as coroutine

from rankwise import _context
from rankwise._late import Late, LateAnswers
from rankwise._messages import (
    ACK,
    BOOT,
    CALL,
    DEADLINE,
    EXIT,
    FAILED,
    FAILED_LENT,
    HAS_DEADLINE,
    OK,
    OK_LENT,
    WANT_VALUE,
)
from rankwise._methods import method_name
from rankwise._outcome import Failed, add_note, capture, encode_failure, format_traceback
from rankwise._rankinfo import RankInfo
from rankwise._status import CONSTRUCT, DONE, IMPORT, PHASE, READY, RUNNING, SINCE
from rankwise._status import EXIT as EXITING
from rankwise.wire import codec
from rankwise.wire.codec import encode_result
from rankwise.wire.frames import BadFrame
from rankwise.wire.lending import LENT, Lent
from rankwise.wire.worker_channel import TooLarge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from rankwise._late import Replies
    from rankwise.wire.arena import Arena

    Body = bytes | bytearray | memoryview

    class Channel(Replies, Protocol):
        """What `serve` needs of a channel."""

        def receive(self) -> tuple[int, int, int, Body] | None: ...


def serve(
    channel: Channel,
    words: memoryview,
    prepare: Callable[[_context.Place, dict[str, object]], None],
    before: Callable[[], object] | None = None,
) -> None:
    """Make the worker object, run the calls that come, and end it in order.

    `prepare` is given the rank's place and the driver's settings before any user code is loaded.
    before: called before each method, where a test has planned faults.
    """
    made = _construct(channel, words, prepare)
    if made is None:
        return
    worker, place = made
    arena = channel.arena
    receive = channel.receive
    answers: Channel | LateAnswers = channel
    late: LateAnswers | None = None
    later: Late | None = None
    now = time.monotonic_ns
    method: Any  # a name, or a callable that travelled by value
    while True:
        # The whole of a call stands here, and not in functions of its own: every function, global
        # and object that it touches is a cache line or two that ranks which share a core fetch
        # anew for each call. (Eight ranks on two CPUs: 25 us of 140.)
        try:
            frame = receive()
        except TooLarge as error:
            answers.reply(FAILED, error.call_id, encode_failure(Failed(error)))
            continue
        if frame is None or frame[0] != CALL:
            break
        _, flags, call_id, body = frame
        words[SINCE] = now()
        words[RUNNING] = call_id
        place.method = ""
        try:
            if flags & HAS_DEADLINE:
                (place.deadline,) = DEADLINE.unpack_from(body)
                body = memoryview(body)[DEADLINE.size :]
            else:
                place.deadline = None
            if body[0] == LENT and arena is not None:
                method, args, kwargs = arena.load(body)
            else:
                method, args, kwargs = plain_loads(body)
            named = type(method) is str
            if named:
                place.method = method
                place.owner = worker
            else:
                place.method = method_name(method)
                place.owner = None
            place.call_id = call_id
            if before is not None:
                before()
            if named:
                value = getattr(worker, method)(*args, **kwargs)
            else:
                value = method(worker, *args, **kwargs)
            kind_of = type(value)
            if kind_of is coroutine:
                value.close()
                raise TypeError(
                    f"{place.method} is an async method: rankwise runs ordinary methods only"
                )
            place.call_id = 0
            kind, answer = ACK, b""
            if kind_of is Late:
                if late is None:
                    late = LateAnswers(channel, place)
                later = value
            elif flags & WANT_VALUE:
                kind, answer = OK, encode_result(value, arena)
        except BaseException as error:  # a worker's exit is not the driver's
            kind, answer = FAILED, _failed(error, place, arena)
        # A worker that waits keeps nothing of the last call alive.
        del frame, body
        method = args = kwargs = value = None
        if place.forked:
            return  # a child that the method forked has come out of it: the parent answers
        if later is not None:
            assert late is not None
            answers = late
            late.put(later, call_id, flags)
            later = None
            words[RUNNING] = 0
            continue
        if type(answer) is Lent:
            kind = OK_LENT if kind == OK else FAILED_LENT
            answer.hold.pending.clear()  # from here on it is the driver's to let go
        answers.reply(kind, call_id, answer)
        del answer
        words[DONE] = call_id
        words[RUNNING] = 0
    if frame is not None and frame[0] != EXIT:
        raise BadFrame(f"a frame of kind {frame[0]} where a call was due")
    words[PHASE] = EXITING
    if late is not None:
        late.end()
    _leave(worker)


def _failed(error: BaseException, place: _context.Place, arena: Arena | None) -> bytes:
    """The body of the answer to the call that `place` was in, and that has raised `error`."""
    place.call_id = 0
    if not place.method:
        if isinstance(error, Exception):
            add_note(error, "raised while the arguments were rebuilt in the worker")
        return encode_failure(Failed(error), "", arena)
    return encode_failure(Failed(error), place.where(), arena)


def _construct(
    channel: Channel,
    words: memoryview,
    prepare: Callable[[_context.Place, dict[str, object]], None],
) -> tuple[object, _context.Place] | None:
    frame = channel.receive()
    if frame is None or frame[0] == EXIT:
        return None
    kind, _, call_id, body = frame
    if kind != BOOT:
        raise BadFrame(f"a frame of kind {kind} where the first call was due")
    words[SINCE] = time.monotonic_ns()
    words[PHASE] = IMPORT
    try:
        fields, settings, blob = plain_loads(body)
        place = _context.Place(RankInfo(*fields), words)
    except Exception as error:
        raise BadFrame(f"a first call that is none ({type(error).__name__}: {error})") from None
    prepare(place, settings)

    def make() -> object:
        target, args, kwargs = codec.loads(blob, channel.arena)
        words[SINCE] = time.monotonic_ns()
        words[PHASE] = CONSTRUCT
        worker = target(*args, **kwargs)
        enter = getattr(type(worker), "__enter__", None)
        if enter is not None and hasattr(type(worker), "__exit__"):
            entered = enter(worker)
            worker = worker if entered is None else entered
        return worker

    worker = capture(make)
    if place.forked:
        return None  # a child that the constructor forked has come out of it
    if type(worker) is Failed:
        answer = encode_failure(worker, "", channel.arena)
        if type(answer) is Lent:
            answer.hold.pending.clear()
        channel.reply(FAILED_LENT if type(answer) is Lent else FAILED, call_id, answer)
        return None
    words[SINCE] = time.monotonic_ns()
    words[RUNNING] = call_id  # not idle before the answer has left
    words[PHASE] = READY
    channel.reply(ACK, call_id, b"")
    words[DONE] = call_id
    words[RUNNING] = 0
    return worker, place


def _leave(worker: object) -> None:
    """The orderly end: the object's own exit, then what torch wants written."""
    leave = getattr(type(worker), "__exit__", None)
    if leave is not None and hasattr(type(worker), "__enter__"):
        outcome = capture(leave, worker, None, None, None)
        if isinstance(outcome, Failed):
            _print_error("rankwise: the worker's __exit__ failed", outcome.error)
    write_tunable_results()


def write_tunable_results() -> None:
    """Write what torch's TunableOp has found out, where tuning is on. torch is not imported for it.

    From 2.10 on torch writes each result as it finds it, and has no `write_file`.
    """
    torch: Any = sys.modules.get("torch")
    tunable = getattr(getattr(torch, "cuda", None), "tunable", None)
    write = getattr(tunable, "write_file", None)
    if tunable is None or write is None:
        return
    try:
        # The device last: to look for one may take longer than the rest of a rank's end.
        if tunable.is_enabled() and tunable.tuning_is_enabled() and torch.cuda.is_available():
            write()
    except AttributeError:
        pass  # a build of torch without CUDA has the module, but nothing behind it
    except Exception as error:
        _print_error("rankwise: TunableOp's results could not be written", error)


def _print_error(what: str, error: BaseException) -> None:
    print(what, format_traceback(error), sep="\n", end="", file=sys.stderr)
