"""The worker's main: bootstrap, loop, reply.

    launcher > main > serve_process > serve > end_process
    channel ==frame==> receive > load > method > value | Failed > encode > reply ==frame==> driver

One thread, the process's main one, receives, runs and answers; calls are run in the order in which
they come. What your method raises is a value, SystemExit too. `serve` itself knows no process: the
inline backend runs it in a thread.
"""

from __future__ import annotations

import os
import sys
import time
from _pickle import loads as plain_loads
from functools import partial
from types import CoroutineType as coroutine

from rankwise import _context
from rankwise._exit import end_process
from rankwise._late import Late, LateAnswers
from rankwise._messages import (
    ACK,
    BOOT,
    CALL,
    DEADLINE,
    DUMPED,
    EXIT,
    FAILED,
    FAILED_LENT,
    HAS_DEADLINE,
    OK,
    OK_LENT,
    STACK_SIGNAL,
    STACKS_SIGNAL,
    WANT_VALUE,
)
from rankwise._methods import method_name
from rankwise._outcome import Failed, capture, encode_failure, format_traceback
from rankwise._planned import FAULTS
from rankwise._rankinfo import RankInfo
from rankwise._spin import Spin
from rankwise._status import CONSTRUCT, DONE, IMPORT, LINE, PHASE, READY, RUNNING, SINCE
from rankwise._status import EXIT as EXITING
from rankwise.wire import codec
from rankwise.wire.arena import open_arena
from rankwise.wire.codec import encode_result
from rankwise.wire.frames import BadFrame
from rankwise.wire.lending import LENT, Lent
from rankwise.wire.worker_channel import TooLarge, WorkerChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from _socket import socket
    from collections.abc import Callable
    from typing import Any, NoReturn, Protocol

    from rankwise.wire.arena import Arena

    Body = bytes | bytearray | memoryview

    class Channel(Protocol):
        """What `serve` needs of a channel."""

        @property
        def arena(self) -> Arena | None: ...
        def receive(self) -> tuple[int, int, int, Body] | None: ...
        def reply(self, kind: int, call_id: int, body: bytes) -> None: ...
else:
    import _signal  # `signal` makes an enum of every number, which takes 4 ms


# -- the loop ---------------------------------------------------------------------------------


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
            if late is None:
                late = answers = LateAnswers(channel, place)
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
            error.add_note("raised while the arguments were rebuilt in the worker")
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


def serve_process(
    rank: int, call_fd: int, status_fd: int, crash_fd: int, name: str, *, forked: bool = False
) -> NoReturn:
    """Be rank `rank` until the driver says that it is over, or has gone; then end in order."""
    import faulthandler
    from _socket import socket  # `socket` itself takes 3 ms

    from rankwise._status import News, StatusPage

    faults = os.environ.pop(FAULTS, None)
    for fd in (call_fd, status_fd, crash_fd):
        os.set_inheritable(fd, False)
    # Before any user code: the stacks of a crash go to the launcher, which reads them after it.
    faulthandler.enable(crash_fd, all_threads=True)
    _arm_stacks(crash_fd)
    _name_process(f"{name}:{rank}")
    _line_buffer()
    sock = socket(-1, -1, -1, call_fd)
    channel = WorkerChannel(sock, Spin(0.0, learns=False))
    page = StatusPage(rank + 1, status_fd)
    channel.words = page.words(rank)

    def prepare(place: _context.Place, settings: dict[str, object]) -> None:
        # A child that the worker forks must not keep the call channel open after its death.
        channel.arena = open_arena(status_fd, place.info.world_size, rank)
        os.register_at_fork(after_in_child=partial(_leave_child, sock, channel, place))
        place.rank0 = page.words(0)
        channel.place, channel.news = rank * LINE, News(place.info.world_size, status_fd).words
        _context.enter_process(place)
        sys.path[:] = settings["sys_path"]  # type: ignore[call-overload]
        sys.argv[:] = settings["argv"]  # type: ignore[call-overload]
        channel.spin = Spin(*settings["spin"])  # type: ignore[misc]

    seen: Channel = channel
    before = None
    if faults is not None:
        from rankwise.testing._inject import arm

        seen, before = arm(faults, rank, channel)
    try:
        serve(seen, page.words(rank), prepare, before)
    except BadFrame as error:
        sys.exit(f"rankwise: rank {rank} cannot go on: the driver has sent {error}")
    left = _context.current_place()
    if left is not None:
        left.owner = None  # the worker object may go
    end_process(forked)


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
    # Not `ctypes`, which takes a millisecond and more.
    from _ctypes import _SimpleCData, call_function, dlopen, dlsym

    class Pointer(_SimpleCData):  # type: ignore[type-arg]
        _type_ = "P"

    libc = dlopen(None, 0)  # type: ignore[arg-type]
    try:
        stdout = Pointer.from_address(dlsym(libc, "stdout"))
        call_function(dlsym(libc, "setvbuf"), (stdout, None, 1, 0))  # 1: _IOLBF, in glibc and musl
    except OSError:
        pass  # a C library that keeps it elsewhere: its lines come late, that is all
