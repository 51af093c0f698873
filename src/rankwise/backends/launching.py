"""Starting a launcher: what is made for a group before any rank runs, and how it is undone.

    sockets, status page, port > Popen(launcher), or a warm one > Launch > Boot frames

A launcher that has forked its ranks keeps what it has imported when they are gone, for the ranks of
a restart: then it is `warm`, and goes from the old engine to the new one as `Held`.

Every acquisition goes on the caller's ExitStack before the next is made, so a half start and a full
close run the same steps.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from array import array
from contextlib import ExitStack, suppress

from rankwise import _environment, _planned, _status
from rankwise._messages import Launch
from rankwise.logs.show import use_color
from rankwise.wire.arena import make_room, open_arena
from rankwise.wire.control import ControlChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from rankwise._rankinfo import RankInfo
    from rankwise._spec import GroupSpec
    from rankwise.wire.arena import Arena

# The directory that this very rankwise was imported from: the launcher must not find another.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LAUNCHER = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)];"
    " from rankwise._launcher import main; main()"
)

FDS_A_MESSAGE: Final = 64  # the kernel takes 253


class Held:
    """A running launcher, and the driver's ends of what leads to it: one engine's at a time."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        pidfd: int,
        control: ControlChannel,
        grants: socket.socket | None,
    ) -> None:
        self.process = process
        self.pidfd = pidfd
        self.control = control
        self.grants = grants  # how a launcher that has ranks no more is given descriptors anew
        self.ours = True  # neither handed over nor closed

    def hand_over(self) -> Held:
        """The same, for another owner; this one has nothing left to close."""
        self.ours = False
        return Held(self.process, self.pidfd, self.control, self.grants)

    def grant(self, fds: list[int]) -> None:
        """Give the launcher copies of `fds`, for the Launch that follows. Raises OSError."""
        assert self.grants is not None
        # Not every socket breaks with its process: one that this had forked may hold it open.
        if self.exitcode() is not None:
            raise ProcessLookupError(f"the launcher (pid {self.process.pid}) has ended")
        for begin in range(0, len(fds), FDS_A_MESSAGE):
            batch = array("i", fds[begin : begin + FDS_A_MESSAGE])
            self.grants.sendmsg([b"g"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])

    def exitcode(self, *, wait: bool = False) -> int | None:
        """How the launcher has ended, a signal's number below 0; None: it runs. `wait`: until it
        has ended.

        Not by Popen's own poll and wait: who is struck by a signal handler's exception as they take
        their lock leaves it taken, and the next one waits for it for ever.
        """
        process = self.process
        if process.returncode is None:
            try:
                found = os.waitid(
                    os.P_PIDFD, self.pidfd, os.WEXITED if wait else os.WEXITED | os.WNOHANG
                )
            except OSError as error:
                if error.errno not in (errno.ECHILD, errno.EBADF):
                    raise
                # Reaped by the kernel (SIGCHLD is ignored), by another thread that is just noting
                # it, or by one that was struck before it had. How it ended is not known then.
                if process.returncode is None:
                    process.returncode = 0
            else:
                if found is not None:
                    exited = found.si_code == os.CLD_EXITED
                    process.returncode = found.si_status if exited else -found.si_status
        return process.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # reaped by the kernel already
            # In straight code: after an end by a handler the number may be another launcher's.
            send = signal.pidfd_send_signal
            if self.process.returncode is None:
                send(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """The last resort of a start that failed half way; an orderly end leaves it little."""
        if not self.ours:
            return
        self.ours = False
        if self.exitcode() is None:
            self.kill()
            self.exitcode(wait=True)
        os.close(self.pidfd)
        self.control.close()
        if self.grants is not None:
            self.grants.close()


class Started:
    """What a start hands over: all of it is on the ExitStack already."""

    __slots__ = ("arena", "held", "infos", "news", "sockets", "status")

    def __init__(
        self,
        held: Held,
        infos: list[RankInfo],
        sockets: list[socket.socket],
        status: _status.StatusPage,
        news: _status.News,
        arena: Arena | None,
    ) -> None:
        self.arena = arena
        self.held = held
        self.infos = infos
        self.news = news
        self.sockets = sockets
        self.status = status


def start_launcher(spec: GroupSpec, stack: ExitStack, warm: Held | None) -> Started:
    """Tell a launcher, the `warm` one or one of their own, to start the ranks of `spec`, which
    then wait for their Boot."""
    size = spec.world_size
    _occupy_standard_descriptors(stack)
    reserved = stack.enter_context(_reserve_port())
    infos = _environment.rank_infos(spec, "127.0.0.1", reserved.getsockname()[1])
    cpus = _environment.rank_cpus(spec, os.sched_getaffinity(0))
    environments = _environment.rank_environments(
        spec,
        infos,
        spec.inherited.environ,
        hash_seed=spec.inherited.hash_seed,
        budget=_environment.cpu_budget(),
        cpus=cpus,
    )
    if _planned.faults is not None:
        told = _planned.faults.text_for(size)
        for variables in environments:
            variables[_planned.FAULTS] = told
    flags = _interpreter_flags(environments)
    sockets = []
    theirs = []
    status_fd = -1
    try:
        for _ in range(size):
            ours, other = socket.socketpair()
            sockets.append(stack.enter_context(ours))
            theirs.append(other)
        status_fd = _status.make_status(size)
        status = _status.StatusPage(size, status_fd)
        news = _status.News(size, status_fd)
        arena = open_arena(os.dup(status_fd), size) if make_room(status_fd, size) else None
        if arena is not None:
            stack.callback(arena.close)
        for_them = [*(other.fileno() for other in theirs), status_fd]
        held = None if warm is None else _take_over(warm, for_them)
        granted = held is not None
        if held is None:
            held = _start_process(spec, flags, environments, for_them)
        stack.callback(held.close)
        held.control.send(
            Launch(
                name=spec.name,
                start_method=spec.start_method,
                python=[sys.executable, *flags],
                root=ROOT,
                sys_path=spec.inherited.sys_path,
                environments=environments,
                worker_fds=for_them[:-1],
                status_fd=status_fd,
                granted=granted,
                preload=spec.preload,
                mode=spec.logs,
                color=spec.logs == "prefix" and use_color(),
                cpus=cpus,
            )
        )
        return Started(held, infos, sockets, status, news, arena)
    finally:
        for other in theirs:
            other.close()
        if status_fd >= 0:
            os.close(status_fd)


def _take_over(warm: Held, for_ranks: list[int]) -> Held | None:
    """The launcher of `warm` for a new owner, with copies of what is `for_ranks`; None where it is
    of no use: it ended with a start before this one, which failed, or it was killed meanwhile."""
    if not warm.ours:
        return None
    try:
        warm.grant(for_ranks)
    except (OSError, MemoryError):
        warm.close()  # also because it may have some of them
        return None
    return warm.hand_over()


def _start_process(
    spec: GroupSpec, flags: list[str], environments: list[dict[str, str]], for_ranks: list[int]
) -> Held:
    """Start the launcher of `spec`. It inherits what is `for_ranks`, under the same numbers."""
    forks = spec.start_method == "forkserver"
    with ExitStack() as lent, ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.enter_context(ours)
        lent.enter_context(theirs)
        driver_pidfd = os.pidfd_open(os.getpid())
        lent.callback(os.close, driver_pidfd)
        own = [theirs.fileno(), driver_pidfd]
        grants = None
        if forks:
            grants, granted = socket.socketpair()
            undo.enter_context(grants)
            own.append(lent.enter_context(granted).fileno())
        process = subprocess.Popen(
            [
                sys.executable,
                # A launcher that only spawns needs neither site-packages nor the user's variables.
                *(flags if forks else ["-I", "-S"]),
                "-c",
                LAUNCHER,
                ROOT,
                spec.name,
                *map(str, own if forks else [*own, -1]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=spec.inherited.directory_to_enter(),
            env=_launcher_environment(environments) if forks else None,
            pass_fds=[*own, *for_ranks],
            # Out of the terminal's foreground group, so that ^C is the driver's alone; but in the
            # driver's session. Linux shares CPU time out between sessions first (autogroups), and
            # then within each: ranks of another session were all put on one CPU, as they had no
            # more together than the driver alone, and sched_yield does not reach across.
            process_group=0,
        )
        undo.callback(process.wait)
        undo.callback(process.kill)
        held = Held(process, os.pidfd_open(process.pid), ControlChannel(ours), grants)
        undo.pop_all()
        return held


def _launcher_environment(environments: list[dict[str, str]]) -> dict[str, str]:
    """What preloaded modules see: what is equal for all ranks, and one thread each.

    numpy's OpenBLAS starts its threads at import; a launcher that has any may not fork.
    """
    common = _environment.common_environment(environments)
    return common | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _occupy_standard_descriptors(stack: ExitStack) -> None:
    """In a daemon that has closed 0, 1 and 2 none of ours must get such a number: a child's own
    standard descriptors would take its place, and lines for 1 and 2 would go into it."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        stack.callback(os.close, fd)
    os.close(fd)


def _interpreter_flags(environments: list[dict[str, str]]) -> list[str]:
    """The driver's own flags. -E and -I, which would shut out PYTHONHASHSEED too, are put into
    effect by taking every other PYTHON variable out of `environments`."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if sys.flags.ignore_environment:
        flags = ["-s" if flag == "-I" else flag for flag in flags if flag != "-E"]
        for variables in environments:
            for name in [name for name in variables if name.startswith("PYTHON")]:
                if name != "PYTHONHASHSEED":
                    del variables[name]
    return flags


def _reserve_port() -> socket.socket:
    """A port for the rendezvous, bound and not listening, kept for as long as the group lives.

    The kernel gives it to nobody else who asks for a port, and refuses it to who names it, unless
    SO_REUSEADDR is set on both sides, as torch's TCPStore does.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock
