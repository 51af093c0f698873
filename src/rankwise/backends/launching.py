"""Starting a launcher: what is made for a group before any rank runs, and how it is undone.

    sockets, status page, port > Popen(launcher) > Launch > Boot frames

Every acquisition goes on the caller's ExitStack before the next is made, so a half start and a full
close run the same steps.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys

from rankwise import _environment, _planned, _status
from rankwise._messages import Launch
from rankwise.logs.show import use_color
from rankwise.wire.arena import make_room, open_arena
from rankwise.wire.control import ControlChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import ExitStack

    from rankwise._rankinfo import RankInfo
    from rankwise._spec import GroupSpec
    from rankwise.wire.arena import Arena

# The directory that this very rankwise was imported from: the launcher must not find another.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LAUNCHER = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)];"
    " from rankwise._launcher import main; main()"
)


class Started:
    """What a started launcher hands over: all of it is on the ExitStack already."""

    __slots__ = ("arena", "control", "infos", "launcher", "launcher_pidfd", "sockets", "status")

    def __init__(
        self,
        control: ControlChannel,
        infos: list[RankInfo],
        launcher: subprocess.Popen[bytes],
        launcher_pidfd: int,
        sockets: list[socket.socket],
        status: _status.StatusPage,
        arena: Arena | None,
    ) -> None:
        self.arena = arena
        self.control = control
        self.infos = infos
        self.launcher = launcher
        self.launcher_pidfd = launcher_pidfd
        self.sockets = sockets
        self.status = status


def start_launcher(spec: GroupSpec, stack: ExitStack) -> Started:
    """Start the launcher of `spec` and tell it what to start. The ranks wait for their Boot."""
    size = spec.world_size
    _occupy_standard_descriptors(stack)
    reserved = stack.enter_context(_reserve_port())
    infos = _environment.rank_infos(spec, "127.0.0.1", reserved.getsockname()[1])
    environments = _environment.rank_environments(
        spec,
        infos,
        os.environ,
        hash_seed=secrets.randbelow(1 << 32),
        budget=_environment.cpu_budget(),
    )
    if _planned.faults is not None:
        told = _planned.faults.text_for(size)
        for variables in environments:
            variables[_planned.FAULTS] = told
    sockets = []
    theirs = []
    for _ in range(size):
        ours, other = socket.socketpair()
        sockets.append(stack.enter_context(ours))
        theirs.append(other)
    with_them = [other.fileno() for other in theirs]
    ours, launchers = socket.socketpair()
    stack.enter_context(ours)
    lent: list[int] = []  # what the launcher inherits, and we close
    try:
        status_fd = _status.make_status(size)
        lent.append(status_fd)
        driver_pidfd = os.pidfd_open(os.getpid())
        lent.append(driver_pidfd)
        status = _status.StatusPage(size, status_fd)
        arena = open_arena(os.dup(status_fd), size) if make_room(status_fd, size) else None
        if arena is not None:
            stack.callback(arena.close)
        flags = _interpreter_flags(environments)
        forks = spec.start_method == "forkserver"
        launcher = subprocess.Popen(
            [
                sys.executable,
                # A launcher that only spawns needs neither site-packages nor the user's variables.
                *(flags if forks else ["-I", "-S"]),
                "-c",
                LAUNCHER,
                ROOT,
                spec.name,
                str(launchers.fileno()),
                str(driver_pidfd),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_launcher_environment(environments) if forks else None,
            pass_fds=[launchers.fileno(), driver_pidfd, status_fd, *with_them],
            start_new_session=True,
        )
        stack.callback(_end_process, launcher)
        pidfd = os.pidfd_open(launcher.pid)
        stack.callback(os.close, pidfd)
        control = ControlChannel(ours)
        control.send(
            Launch(
                name=spec.name,
                start_method=spec.start_method,
                python=[sys.executable, *flags],
                root=ROOT,
                sys_path=list(sys.path),
                environments=environments,
                worker_fds=with_them,
                status_fd=status_fd,
                preload=spec.preload,
                mode=spec.logs,
                color=spec.logs == "prefix" and use_color(),
            )
        )
        return Started(control, infos, launcher, pidfd, sockets, status, arena)
    finally:
        for other in theirs:
            other.close()
        launchers.close()
        for fd in lent:
            os.close(fd)


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


def _end_process(launcher: subprocess.Popen[bytes]) -> None:
    """The last resort of a start that failed half way; after an orderly end it finds it done."""
    if launcher.returncode is None:
        launcher.kill()
        launcher.wait()


def _reserve_port() -> socket.socket:
    """A port for the rendezvous, bound and not listening, kept for as long as the group lives.

    The kernel gives it to nobody else who asks for a port, and refuses it to who names it, unless
    SO_REUSEADDR is set on both sides, as torch's TCPStore does.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock
