"""The worker's main: bootstrap, loop, capture, reply.

    launcher > main > serve_process > serve
    channel ==frame==> receive > load > your method > Ok | Failed > encode > reply ==frame==> driver

One thread, the process's main one, receives, runs and answers; calls are run in the order in which
they come. What your method raises is a value (`_outcome.capture`), SystemExit too. `serve` itself
knows no process: the inline backend runs it in a thread.
"""

from __future__ import annotations

import os
import sys
import time
from _pickle import loads as plain_loads
from functools import partial

from rankwise import _context
from rankwise._messages import (
    ACK,
    BOOT,
    DEADLINE,
    DUMPED,
    EXIT,
    FAILED,
    HAS_DEADLINE,
    OK,
    OK_LENT,
    STACK_SIGNAL,
    STACKS_SIGNAL,
    WANT_VALUE,
)
from rankwise._methods import method_name
from rankwise._outcome import Failed, Ok, capture, encode_failure, format_traceback
from rankwise._rankinfo import RankInfo
from rankwise._spin import Spin
from rankwise._status import CONSTRUCT, DONE, IMPORT, PHASE, READY, RUNNING, SINCE
from rankwise._status import EXIT as EXITING
from rankwise.wire import codec
from rankwise.wire.arena import open_arena
from rankwise.wire.channel import TooLarge, WorkerChannel
from rankwise.wire.lending import Lent

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from socket import socket
    from typing import Protocol

    from rankwise.wire.arena import Arena

    class Channel(Protocol):
        """What `serve` needs of a channel."""

        arena: Arena | None

        def receive(self) -> tuple[int, int, int, bytes | bytearray] | None: ...
        def reply(self, kind: int, call_id: int, body: bytes) -> None: ...
else:
    import _signal  # `signal` makes an enum of every number, which takes 4 ms


# -- the loop ---------------------------------------------------------------------------------


def serve(
    channel: Channel,
    words: memoryview,
    prepare: Callable[[_context.Place, dict[str, object]], None],
) -> None:
    """Make the worker object, run the calls that come, and end it in order.

    `prepare` is given the rank's place and the driver's settings before any user code is loaded.
    """
    made = _construct(channel, words, prepare)
    if made is None:
        return
    worker, place = made
    arena = channel.arena
    while True:
        try:
            frame = channel.receive()
        except TooLarge as error:
            channel.reply(FAILED, error.call_id, encode_failure(Failed(error)))
            continue
        if frame is None or frame[0] == EXIT:
            break
        _, flags, call_id, body = frame
        words[SINCE] = time.monotonic_ns()
        words[RUNNING] = call_id
        outcome = capture(_run, (worker, place, words, arena, flags, call_id, body), {})
        kind, answer = _answer(outcome, place, arena, flags)
        del outcome
        del frame, body  # a worker that waits keeps nothing of the last call alive
        if place.forked:
            return  # a child that the method forked has come out of it: the parent answers
        if type(answer) is Lent:
            kind = OK_LENT
            answer.hold.pending.clear()  # from here on it is the driver's to let go
        channel.reply(kind, call_id, answer)
        del answer
        words[DONE] = call_id
        words[RUNNING] = 0
    words[PHASE] = EXITING
    _leave(worker)


def _construct(
    channel: Channel,
    words: memoryview,
    prepare: Callable[[_context.Place, dict[str, object]], None],
) -> tuple[object, _context.Place] | None:
    frame = channel.receive()
    if frame is None or frame[0] != BOOT:
        return None
    _, _, call_id, body = frame
    words[SINCE] = time.monotonic_ns()
    words[PHASE] = IMPORT
    fields, settings, blob = plain_loads(body)
    place = _context.Place(RankInfo(*fields))
    prepare(place, settings)

    def make() -> object:
        target, args, kwargs = codec.loads(blob)
        words[SINCE] = time.monotonic_ns()
        words[PHASE] = CONSTRUCT
        worker = target(*args, **kwargs)
        enter = getattr(type(worker), "__enter__", None)
        if enter is not None and hasattr(type(worker), "__exit__"):
            entered = enter(worker)
            worker = worker if entered is None else entered
        return worker

    match capture(make, (), {}):
        case Ok(worker):
            words[SINCE] = time.monotonic_ns()
            words[RUNNING] = call_id  # not idle before the answer has left
            words[PHASE] = READY
            words[DONE] = call_id
            channel.reply(ACK, call_id, b"")
            words[RUNNING] = 0
            return worker, place
        case failed:
            assert isinstance(failed, Failed)
            channel.reply(FAILED, call_id, encode_failure(failed))
            return None


def _answer(
    outcome: Ok | Failed, place: _context.Place, arena: Arena | None, flags: int
) -> tuple[int, bytes]:
    """The kind and the body of the answer to the call that `place` was in."""
    call, place.call = place.call, None
    if isinstance(outcome, Ok):
        if not flags & WANT_VALUE:
            return ACK, b""
        try:
            return OK, codec.encode_result(outcome.value, arena)
        except BaseException as error:  # its own __reduce__ may even call sys.exit
            outcome = Failed(error)
    return FAILED, encode_failure(outcome, "" if call is None else call.where)


def _run(
    worker: object,
    place: _context.Place,
    words: memoryview,
    arena: Arena | None,
    flags: int,
    call_id: int,
    body: bytes | bytearray,
) -> object:
    """Run one call. Returns and raises what the user's method does."""
    deadline = None
    data: bytes | bytearray | memoryview = body
    if flags & HAS_DEADLINE:
        (deadline,) = DEADLINE.unpack_from(body)
        data = memoryview(body)[DEADLINE.size :]
    try:
        method, args, kwargs = codec.loads(data, arena)
    except Exception as error:
        error.add_note("raised while the arguments were rebuilt in the worker")
        raise
    if type(method) is str:
        place.call = _context.CurrentCall(call_id, method, deadline, words, worker)
        value = getattr(worker, method)(*args, **kwargs)
    else:
        name = method_name(method)
        place.call = _context.CurrentCall(call_id, name, deadline, words)
        value = method(worker, *args, **kwargs)
    if type(value).__name__ == "coroutine" and hasattr(value, "cr_frame"):
        value.close()
        name = place.call.method
        raise TypeError(f"{name} is an async method: rankwise runs ordinary methods only")
    return value


def _leave(worker: object) -> None:
    """The orderly end: the object's own exit, then what torch wants written."""
    leave = getattr(type(worker), "__exit__", None)
    if leave is not None and hasattr(type(worker), "__enter__"):
        outcome = capture(leave, (worker, None, None, None), {})
        if isinstance(outcome, Failed):
            _print_error("rankwise: the worker's __exit__ failed", outcome.error)
    tunable = getattr(getattr(sys.modules.get("torch"), "cuda", None), "tunable", None)
    if tunable is not None:
        try:
            if tunable.is_enabled() and tunable.tuning_is_enabled():
                tunable.write_file()
        except AttributeError:
            pass  # a build of torch without CUDA has the module, but nothing behind it
        except Exception as error:
            _print_error("rankwise: TunableOp's results could not be written", error)


def _print_error(what: str, error: BaseException) -> None:
    print(what, format_traceback(error), sep="\n", end="", file=sys.stderr)


# -- the process ------------------------------------------------------------------------------


def main() -> None:
    """A spawned rank: argv is ROOT RANK CALL_FD STATUS_FD CRASH_FD NAME."""
    rank, call_fd, status_fd, crash_fd = map(int, sys.argv[2:6])
    serve_process(rank, call_fd, status_fd, crash_fd, sys.argv[6])


def serve_process(rank: int, call_fd: int, status_fd: int, crash_fd: int, name: str) -> None:
    """Be rank `rank`: returns when the driver says so or has gone."""
    import faulthandler
    from socket import socket

    from rankwise._status import StatusPage

    for fd in (call_fd, status_fd, crash_fd):
        os.set_inheritable(fd, False)
    # Before any user code: the stacks of a crash go to the launcher, which reads them after it.
    faulthandler.enable(crash_fd, all_threads=True)
    _arm_stacks(crash_fd)
    _name_process(f"{name}:{rank}")
    _line_buffer()
    sock = socket(fileno=call_fd)
    channel = WorkerChannel(sock, Spin(0.0, learns=False))
    page = StatusPage(rank + 1, status_fd)

    def prepare(place: _context.Place, settings: dict[str, object]) -> None:
        # A child that the worker forks must not keep the call channel open after its death.
        channel.arena = open_arena(status_fd, place.info.world_size, rank)
        os.register_at_fork(after_in_child=partial(_leave_child, sock, channel, place))
        place.rank0 = page.words(0)
        _context.enter_process(place)
        sys.path[:] = settings["sys_path"]  # type: ignore[call-overload]
        sys.argv[:] = settings["argv"]  # type: ignore[call-overload]
        channel.spin = Spin(*settings["spin"])  # type: ignore[misc]

    serve(channel, page.words(rank), prepare)


def _arm_stacks(fd: int) -> None:
    """Have the stacks that are asked for written to `fd`. `_dump.py` says which, when and why."""
    import faulthandler

    def _write_stacks(number: int, frame: object) -> None:
        try:
            faulthandler.dump_traceback(fd, all_threads=True)
            if len(sys._current_frames()) > 100:  # it shows so many, and the main one last
                faulthandler.dump_traceback(fd, all_threads=False)
            os.write(fd, DUMPED)
        except OSError:
            pass  # the user's code has closed it

    _signal.signal(STACKS_SIGNAL, _write_stacks)
    _signal.siginterrupt(STACKS_SIGNAL, False)  # C code that waits need not know of EINTR
    # Ignored first: `faulthandler.unregister` brings back what was there before, and that must not
    # be the default action, which kills.
    _signal.signal(STACK_SIGNAL, _signal.SIG_IGN)
    faulthandler.register(STACK_SIGNAL, fd, all_threads=False)


def _leave_child(sock: socket, channel: WorkerChannel, place: _context.Place) -> None:
    sock.close()
    if channel.arena is not None:
        channel.arena.close()
    place.forked = True


def _name_process(name: str) -> None:
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])
    except OSError:
        pass


def _line_buffer() -> None:
    """A line shows when it is complete, not when 8 KB have gathered: Python's and C's stdout."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)
    import ctypes

    libc = ctypes.CDLL(None)
    try:
        stdout = ctypes.c_void_p.in_dll(libc, "stdout")
        libc.setvbuf(stdout, None, 1, 0)  # 1 is _IOLBF, in glibc and in musl
    except (AttributeError, ValueError):
        pass  # a C library that keeps it elsewhere: its lines come late, that is all
