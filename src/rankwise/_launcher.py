"""The launcher: one small process a group, the parent of every rank.

    driver ==Launch, Signal, Ask, Shown, Finish==> ControlChannel > Launcher > fork, kill
           <==Preloaded, Spawned, SpawnFailed, Exited, Gone==      < Reaper < SIGCHLD
           <==Output, Told==                                       < LogPipes < 1 and 2, Dumps
    driver's pidfd readable, or end of file ---------------------> everything is killed, at once

It sleeps in one poll and has one thread, so it can fork, and "the parent's thread has ended"
(which fires PR_SET_PDEATHSIG) means "the launcher has ended". It runs no code of the user's but
the imports that `preload` asks for. When it is killed the kernel kills the ranks; when the driver
is, its pidfd says so, even while a child that the driver has forked still holds the socket.

What comes first: the driver's end, then deaths, then what the driver says, then log pipes, which
are read one at a time with a look at all the others between.
"""

from __future__ import annotations

import gc
import os
import select
import sys
import time
from _socket import AF_UNIX, SOCK_STREAM, socket
from contextlib import suppress

from rankwise import _preload, _procfs, _spawn
from rankwise._deadline import clock
from rankwise._dump import Dumps
from rankwise._log_pipes import LogPipes
from rankwise._messages import (
    Ask,
    Dying,
    Exited,
    Finish,
    Gone,
    Launch,
    Output,
    Preloaded,
    Shown,
    Signal,
    Spawned,
    SpawnFailed,
)
from rankwise._reaper import ChildSignal, Reaper
from rankwise._spawn import BecomeWorker, Child
from rankwise.wire.control import ControlChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

# A driver that waits for the end hears this often that the launcher is alive.
_DYING_EVERY: Final = 0.25
_IN: Final = select.POLLIN


class DriverGone(Exception):
    """The driver has ended: nobody is left to serve or to tell."""


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
        self._control = control
        self._driver = driver
        self._grants = grants
        self._ours = [driver] if grants < 0 else [driver, grants]
        self._shared: _preload.Shared | None = None  # what was imported to be forked
        self._stay = False  # when the ranks are gone, for others
        self._reaper = Reaper(self._last_words, self._ended)
        self._pipes = LogPipes(self._output)
        self._dumps = Dumps(self._say)
        self._starting: dict[int, Child] = {}  # by the descriptor that tells of exec
        self._children: list[Child] = []
        self._finishing = False
        self._nofile = _spawn.prepare_parent()
        self._wake = ChildSignal()
        self._poll = _poll_of(self._control, self._driver, self._wake, self._pipes)
        # Not select.select, here or below: it takes no descriptor above 1023, and the driver that
        # has given us these may have many.
        self._driver_poll = _poll_of(self._driver)
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
        self._finishing = False
        while not self._finishing:
            self._turn(self._dumps.timeout())
            self._read_logs()
        return self._finish()

    # -- one turn -----------------------------------------------------------------------------

    def _turn(self, timeout: float | None) -> None:
        """Wait for news, `timeout` milliseconds at most, and deal with all but the log pipes."""
        events = dict(self._poll.poll(timeout))
        if self._driver in events:
            raise DriverGone
        if self._wake.fileno() in events:
            self._reap()
        for fd in events.keys() & self._starting.keys():
            self._started(fd)
        if events.get(self._control.fileno(), 0) & ~select.POLLOUT:
            self._hear()
        self._dumps.look()
        self._flush()

    def _read_logs(self) -> None:
        for fd in self._pipes.ready():
            self._pipes.read(fd)
            self._turn(0)
            if self._finishing:
                break

    def _flush(self) -> None:
        if self._control.backlog:
            sent = self._control.flush()
            self._poll.modify(self._control.fileno(), _IN if sent else _IN | select.POLLOUT)

    def _say(self, message: object) -> None:
        # Urgent: ahead of all log lines, and in order among themselves.
        self._control.send(message, urgent=True)

    def _hear(self) -> None:
        try:
            messages = self._control.receive()
        except EOFError:
            raise DriverGone from None
        while messages:
            message = messages.pop(0)
            if isinstance(message, Launch):
                self._launch(message, messages)
            elif isinstance(message, Signal):
                self._reaper.signal(message.ranks, message.number)
            elif isinstance(message, Ask):
                self._dumps.ask(message, self._reaper.alive.values())
            elif isinstance(message, Shown):
                self._pipes.acknowledged(message.nbytes)
            elif isinstance(message, Finish):
                self._finishing = True
                self._stay = message.stay

    # -- starting -----------------------------------------------------------------------------

    def _launch(self, launch: Launch, unheard: list[object]) -> None:
        size = len(launch.worker_fds)
        if launch.granted:
            try:
                fds = _preload.receive_granted(self._grants, size + 1)
            except OSError as error:
                for rank in range(size):
                    self._say(SpawnFailed(rank, str(error)))
                return
            *launch.worker_fds, launch.status_fd = fds
        for fd in (*launch.worker_fds, launch.status_fd):
            os.set_inheritable(fd, False)
        self._pipes.begin(launch)
        forks = launch.start_method == "forkserver"
        if forks and not self._preload(launch, unheard):
            return
        for rank in range(size):
            child = Child(launch.name, rank, raw=launch.mode != "prefix")
            try:
                become = (lambda rank: self._become(launch, rank)) if forks else None
                _spawn.start(launch, child, self._nofile, become)
            except OSError as error:
                self._say(SpawnFailed(rank, str(error)))
                continue
            self._children.append(child)
            self._reaper.alive[child.pid] = child
            process = _procfs.stat(child.pid)
            self._say(Spawned(rank, child.pid, process.starttime if process else 0))
            self._pipes.add(child)
            self._starting[child.failure] = child
            self._poll.register(child.failure, _IN)
            self._flush()
            self._look_for_driver()

    def _preload(self, launch: Launch, unheard: list[object]) -> bool:
        """Import what is to be shared. False if no rank is to be started from here."""
        if self._shared is not None:
            self._shared.adapt(launch)
            return True
        try:
            self._shared = _preload.share(launch, self._control.fileno(), self._driver)
        except _preload.PreloadFailed as error:
            for rank, fd in enumerate(launch.worker_fds):
                os.close(fd)
                self._say(SpawnFailed(rank, str(error)))
            return False
        finally:
            self._wake.arm()  # an imported module may have had other ideas
        self._say(Preloaded(self._shared.seconds, self._shared.refused))
        if self._shared.refused is not None:
            self._flush_all()
            _spawn.limit_descriptors(self._nofile)
            _preload.start_anew(self._control, self._driver, launch, unheard)
        # Imported once for all; what is frozen is not touched by the ranks' collectors, so its
        # pages stay shared.
        import rankwise._worker  # noqa: F401

        self._reaper.spare_children()
        _spawn.flush_standard_streams()
        gc.freeze()
        return True

    def _become(self, launch: Launch, rank: int) -> None:
        """In a forked rank: let go of everything that is the launcher's, by close alone."""
        self._pipes.close()
        self._control.close()
        self._wake.close()
        for child in self._children:
            child.close()
        for fd in (*self._ours, *launch.worker_fds[rank + 1 :]):
            os.close(fd)
        _preload.become(launch.name, rank, launch.environments[rank])

    def _started(self, fd: int) -> None:
        """A rank has exec'ed, or tells why it has not."""
        child = self._starting.pop(fd)
        self._poll.unregister(fd)
        if reason := child.failed_before_exec():
            self._say(SpawnFailed(child.rank, reason))

    # -- ends ---------------------------------------------------------------------------------

    def _reap(self) -> None:
        self._wake.clear()
        # When no child is left it is still the driver who says that this is the end.
        with suppress(ChildProcessError):
            while self._reaper.reap():
                self._flush()
                self._look_for_driver()

    def _last_words(self, child: Child) -> None:
        if child.failure >= 0:
            self._started(child.failure)
        self._pipes.drain(child)

    def _ended(self, child: Child, report: Exited) -> None:
        self._say(report)
        self._dumps.ended(child)
        os.close(child.crash)
        child.crash = -1

    def _output(self, stream: int, data: bytes) -> None:
        self._control.send(Output(stream, data))

    def _look_for_driver(self) -> None:
        """Between two things that take milliseconds: has the driver ended?"""
        if self._driver_poll.poll(0):
            raise DriverGone

    def _finish(self) -> bool:
        """End the ranks. Returns whether the launcher stays, for others."""
        self._told_dying = clock()
        left = self._reaper.end(self._wait_for_ends)
        self._pipes.finish()
        # It must be as it was when it was found fit to fork; a module's own child is gone now.
        stay = (
            self._stay
            and self._shared is not None
            and not left
            and self._reaper.spared_none()
            and _preload.why_not_fork() is None
        )
        self._children.clear()
        self._control.send(Gone(left, stay))
        self._flush_all()
        return stay

    def _wait_for_ends(self) -> None:
        now = clock()
        if now > self._told_dying + _DYING_EVERY:
            self._told_dying = now
            self._say(Dying(tuple(child.rank for child in self._reaper.alive.values())))
        self._flush()
        _poll_of(self._wake).poll(20)
        self._wake.clear()

    def _flush_all(self) -> None:
        """Send all that is queued, however long the driver takes to read it, unless it ends."""
        poll = _poll_of(self._driver)
        poll.register(self._control.fileno(), select.POLLOUT)
        while not self._control.flush():
            if self._driver in dict(poll.poll()):
                raise DriverGone


def _poll_of(*fds: Any) -> select.poll:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, _IN)
    return poll
