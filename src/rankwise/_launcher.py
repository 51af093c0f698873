"""The launcher: one small process a group, the parent of every rank.

    driver ==Launch==> Line > Launcher > Starter > fork ==Preloaded, Spawned, SpawnFailed==> driver
           ==Signal, Finish==>         > Reaper > kill  ==Exited, Gone==>
           ==Ask==>                    > Dumps          ==Told==>
           ==Shown==>                  > LogPipes       ==Output==>
    driver's pidfd readable, or end of file > everything is killed, at once

It sleeps in one poll and has one thread, so it can fork, and "the parent's thread has ended"
(which fires PR_SET_PDEATHSIG) means "the launcher has ended". It runs no code of the user's but
the imports that `preload` asks for. When it is killed the kernel kills the ranks; when the driver
is, its pidfd says so, even while a child that the driver has forked still holds the socket.

What comes first: the driver's end, then deaths, then what the driver says, then log pipes, which
are read one at a time with a look at all the others between.
"""

from __future__ import annotations

import os
import sys
import time
from _socket import AF_UNIX, SOCK_STREAM, socket

from rankwise import _spawn
from rankwise._deadline import clock
from rankwise._dump import Dumps
from rankwise._line import DriverGone, Line, poll_of
from rankwise._log_pipes import LogPipes
from rankwise._messages import Ask, Dying, Exited, Finish, Gone, Launch, Output, Shown, Signal
from rankwise._reaper import ChildSignal, Reaper
from rankwise._spawn import BecomeWorker, Child
from rankwise._starting import Starter
from rankwise.wire.control import ControlChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NoReturn

# A driver that waits for the end hears this often that the launcher is alive.
_DYING_EVERY: Final = 0.25


def main() -> None:
    """argv is ROOT NAME CONTROL_FD DRIVER_PIDFD GRANTS_FD, and LAUNCH_FD where it was started anew.

    GRANTS_FD is -1 where it will not fork.
    """
    control_fd, driver, grants, *anew = map(int, sys.argv[3:])
    _spawn.open_standard_descriptors()
    channel = ControlChannel(socket(AF_UNIX, SOCK_STREAM, 0, control_fd))
    for fd in anew:
        channel.unread(os.pread(fd, os.fstat(fd).st_size, 0))
        os.close(fd)
    for fd in (control_fd, driver, grants):
        if fd >= 0:
            os.set_inheritable(fd, False)
    launcher = Launcher(channel, driver, grants)
    try:
        launcher.run()
    except BecomeWorker as worker:
        place = worker.place
    del launcher, channel
    # A forked rank: from here on it is an ordinary interpreter.
    from rankwise._worker import serve_process

    serve_process(*place, forked=True)


class Launcher:
    """The loop. `run` ends in os._exit, or in BecomeWorker in a forked rank."""

    def __init__(self, control: ControlChannel, driver: int, grants: int) -> None:
        self._reaper = Reaper(self._last_words, self._ended)
        self._pipes = LogPipes(self._output)
        self._wake = ChildSignal()
        self._poll = poll_of(self._wake, self._pipes)
        self._line = Line(control, driver, self._poll)
        self._dumps = Dumps(self._line.say)
        self._starter = Starter(
            self._line, self._poll, self._reaper, self._pipes, self._wake, grants
        )
        self._finishing = False
        self._stay = False  # when the ranks are gone, for others
        self._told_dying = 0.0

    def run(self) -> NoReturn:
        error = None
        try:
            self._wake.arm()
            self._hear()  # what a launcher that has started anew was given
            while self._serve():
                pass
        except BecomeWorker:
            raise
        except BaseException as reason:
            error = reason
        try:
            # After _finish nothing is left. After anything else, whatever it was, this is how it
            # ends: no error of ours may leave a rank behind.
            self._reaper.end(lambda: time.sleep(0.01), silent=True)
            if error is not None and not isinstance(error, DriverGone):
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            # Not by way of atexit: what a preloaded module has registered is for the ranks.
            os._exit(error is not None)

    def _serve(self) -> bool:
        """Start ranks, and serve until they are gone. False: so shall we."""
        while not self._finishing:
            self._turn(self._dumps.timeout())
            self._read_logs()
        self._finishing = False
        return self._finish()

    # -- one turn -----------------------------------------------------------------------------

    def _turn(self, timeout: float | None) -> None:
        """Wait for news, `timeout` milliseconds at most, and deal with all but the log pipes."""
        events = dict(self._poll.poll(timeout))
        if self._line.driver in events:
            raise DriverGone
        if self._wake.fileno() in events:
            self._reap()
        for fd in events.keys() & self._starter.starting.keys():
            self._starter.started(fd)
        if self._line.readable(events):
            self._hear()
        self._dumps.look()
        self._line.flush()

    def _read_logs(self) -> None:
        for fd in self._pipes.ready():
            self._pipes.read(fd)
            self._turn(0)
            if self._finishing:
                break

    def _hear(self) -> None:
        messages = self._line.receive()
        while messages:
            message = messages.pop(0)
            if isinstance(message, Launch):
                self._starter.launch(message, messages)
            elif isinstance(message, Signal):
                self._reaper.signal(message.ranks, message.number)
            elif isinstance(message, Ask):
                self._dumps.ask(message, self._reaper.alive.values())
            elif isinstance(message, Shown):
                self._pipes.acknowledged(message.nbytes)
            elif isinstance(message, Finish):
                self._finishing = True
                self._stay = message.stay

    # -- ends ---------------------------------------------------------------------------------

    def _reap(self) -> None:
        self._wake.clear()
        try:
            while self._reaper.reap():
                self._line.look()
        except ChildProcessError:
            pass  # no child is left: it is still the driver who says that this is the end

    def _last_words(self, child: Child) -> None:
        if child.failure >= 0:
            self._starter.started(child.failure)
        self._pipes.drain(child)

    def _ended(self, child: Child, report: Exited) -> None:
        self._line.say(report)
        self._line.flush()  # before anything else: somebody waits for it
        self._dumps.ended(child)
        os.close(child.crash)
        child.crash = -1

    def _output(self, stream: int, data: bytes) -> None:
        self._line.control.send(Output(stream, data))

    def _finish(self) -> bool:
        """End the ranks. Returns whether the launcher stays, for others."""
        self._told_dying = clock()
        left = self._reaper.end(self._wait_for_ends)
        self._pipes.finish()
        stay = self._stay and not left and self._starter.may_stay()
        self._line.control.send(Gone(left, stay))
        self._line.flush_all()
        return stay

    def _wait_for_ends(self) -> None:
        now = clock()
        if now > self._told_dying + _DYING_EVERY:
            self._told_dying = now
            self._line.say(Dying(tuple(child.rank for child in self._reaper.alive.values())))
        self._line.flush()
        poll_of(self._wake).poll(20)
        self._wake.clear()
