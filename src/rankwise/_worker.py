"""The worker's process: what a rank is set up with, and how it ends.

    launcher > main > serve_process > serve > end_process

Its main thread runs the loop (`_serve.py`); nothing of ours runs beside that.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from rankwise import _context
from rankwise._exit import end_process
from rankwise._messages import DUMPED, STACK_SIGNAL, STACKS_SIGNAL
from rankwise._planned import FAULTS
from rankwise._serve import serve
from rankwise._spin import Spin
from rankwise._status import LINE
from rankwise.wire.arena import open_arena
from rankwise.wire.frames import BadFrame
from rankwise.wire.worker_channel import WorkerChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from _socket import socket
    from typing import NoReturn

    from rankwise._serve import Channel
else:
    import _signal  # `signal` makes an enum of every number, which takes 4 ms


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
    except BaseException as error:
        channel.hang_up()  # a thread of the user's may keep the process alive
        if isinstance(error, BadFrame):
            sys.exit(f"rankwise: rank {rank} cannot go on: the driver has sent {error}")
        raise
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
