"""How the launcher starts ranks: each spawned by itself, or forked from what was imported for all.

Launch > its descriptors > preload, once > a Child for each rank ==> Spawned | SpawnFailed
                              |              `> forked: lets go of all that is the launcher's,
                              |                 BecomeWorker
                              `> not clean: the launcher starts anew, and spawns
"""

from __future__ import annotations

import gc
import os

from rankwise import _preload, _procfs, _spawn
from rankwise._line import IN
from rankwise._messages import Finish, Preloaded, Spawned, SpawnFailed
from rankwise._spawn import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select

    from rankwise._line import Line
    from rankwise._log_pipes import LogPipes
    from rankwise._messages import Launch
    from rankwise._reaper import ChildSignal, Reaper


class Starter:
    """Starts the ranks of a Launch, and of the next where the launcher stays for others.

    grants: the socket on which later ranks' descriptors come; -1 where none will be forked.
    """

    def __init__(
        self,
        line: Line,
        poll: select.poll,
        reaper: Reaper,
        pipes: LogPipes,
        wake: ChildSignal,
        grants: int,
    ) -> None:
        self._line = line
        self._poll = poll
        self._reaper = reaper
        self._pipes = pipes
        self._wake = wake
        self._grants = grants
        self._nofile = _spawn.prepare_parent()
        self._children: list[Child] = []
        self._shared: _preload.Shared | None = None  # what was imported to be forked
        self.starting: dict[int, Child] = {}  # by the descriptor that tells of exec

    def launch(self, launch: Launch, unheard: list[object]) -> None:
        """Start the ranks of `launch`. `unheard`: what the driver has said after it."""
        size = len(launch.worker_fds)
        if launch.granted:
            try:
                fds = _preload.receive_granted(self._grants, size + 1)
            except OSError as error:
                for rank in range(size):
                    self._line.say(SpawnFailed(rank, str(error)))
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
                self._line.say(SpawnFailed(rank, str(error)))
                continue
            self._children.append(child)
            self._reaper.alive[child.pid] = child
            process = _procfs.stat(child.pid)
            self._line.say(Spawned(rank, child.pid, process.starttime if process else 0))
            self._pipes.add(child)
            self.starting[child.failure] = child
            self._poll.register(child.failure, IN)
            self._line.flush()
            self._line.look()
        # With it goes what the ranks have as payloads, when they and the driver are done with that;
        # a launcher that stays would keep it, and hand it on to the ranks that it forks later.
        os.close(launch.status_fd)

    def started(self, fd: int) -> None:
        """A rank has exec'ed, or tells why it has not."""
        child = self.starting.pop(fd)
        self._poll.unregister(fd)
        if reason := child.failed_before_exec():
            self._line.say(SpawnFailed(child.rank, reason))

    def may_stay(self) -> bool:
        """Whether others can be forked, now that no rank is left: the launcher must be as it was
        when it was found fit. A module's own child is gone now."""
        self._children.clear()
        return (
            self._shared is not None
            and self._reaper.spared_none()
            and _preload.why_not_fork() is None
        )

    def _preload(self, launch: Launch, unheard: list[object]) -> bool:
        """Import what is to be shared. False if no rank is to be started from here."""
        line = self._line
        if self._shared is not None:
            self._shared.adapt(launch)
            return True
        if any(isinstance(message, Finish) for message in unheard):
            return False  # the sentry would wait for it on the socket: it is no more there
        try:
            self._shared = _preload.share(launch, line.control.fileno(), line.driver)
        except _preload.PreloadFailed as error:
            os.close(launch.status_fd)
            for rank, fd in enumerate(launch.worker_fds):
                os.close(fd)
                line.say(SpawnFailed(rank, str(error)))
            return False
        finally:
            self._wake.arm()  # an imported module may have had other ideas
        line.say(Preloaded(self._shared.seconds, self._shared.refused))
        if self._shared.refused is not None:
            line.flush_all()
            _spawn.limit_descriptors(self._nofile)
            _preload.start_anew(line.control, line.driver, launch, unheard)
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
        self._line.control.close()
        self._wake.close()
        for child in self._children:
            child.close()
        for fd in (self._line.driver, self._grants, *launch.worker_fds[rank + 1 :]):
            if fd >= 0:
                os.close(fd)
        _preload.become(launch.name, rank, launch.environments[rank])
