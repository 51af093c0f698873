"""Between fork and exec: how the process of one rank is made.

    start > pipes for 1 and 2, a memfd for its crash report > fork > the launcher's side: Child
              |                                                                  ^
              `> the rank's side, one step at a time:                            | what failed, as
                 own process group > dies with its parent > descriptors 1 and 2  | text, on a pipe
                 > signals > CPUs, limits                                   ===' that exec closes
                   > exec of BOOT    spawned: a fresh interpreter
                   > BecomeWorker    forked: leaves the launcher's loop, keeps what it imported

The launcher has one thread when it forks, so the child may run Python until it execs. Whatever the
launcher opens is close-on-exec; the child lets through what BOOT names, and nothing else.
"""

from __future__ import annotations

import os
import sys
from _ctypes import call_function, dlopen, dlsym  # `ctypes` itself takes 2 ms
from fcntl import F_SETPIPE_SZ, fcntl, ioctl
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

from rankwise.logs.lines import Raw, Splitter, Tail

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Final

    from rankwise._messages import Launch
else:
    import _signal  # `signal` makes an enum of every number, which takes 4 ms


def start_code(module: str) -> str:
    """What `python -c` runs to be `module` of the rankwise whose directory is its first argument.

    Not from the driver's working directory, which -c would search first: it may hold a socket.py.
    """
    return (
        "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)];"
        f" from rankwise.{module} import main; main()"
    )


BOOT: Final = start_code("_worker")

SIGKILL: Final = int(_signal.SIGKILL)
_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_SET_NAME: Final = 15
_SET_CHILD_SUBREAPER: Final = 36
_TIOCNOTTY: Final = 0x5422  # asm-generic/ioctls.h

# A pipe of 1 MB lets a rank print while the launcher is busy with another. The kernel allows a user
# 64 MB of pipes in all and then gives his other programs pipes of 8 KB: a large group takes less.
_PIPE: Final = 1 << 20
_ALL_PIPES: Final = 16 << 20

_prctl = dlsym(dlopen(None, 0), "prctl")  # type: ignore[arg-type]


class BecomeWorker(BaseException):
    """Raised in a forked child: out of the launcher's loop, up to `main`, which serves `place`."""

    def __init__(self, place: tuple[int, int, int, int, str]) -> None:
        super().__init__(place)
        self.place = place


class Child:
    """What the launcher holds of one rank: its process, and the launcher's ends of what it has."""

    __slots__ = (
        "crash", "dumped", "failure", "killed", "name", "pid", "pipes", "rank", "splitters", "tail",
    )  # fmt: skip

    def __init__(self, name: str, rank: int, raw: bool) -> None:
        self.name = name
        self.rank = rank
        self.pid = 0
        self.pipes: dict[int, int] = {}  # read end -> 1 or 2
        self.crash = -1
        self.dumped = 0  # bytes of it that are stacks somebody asked for, and has
        self.failure = -1  # readable: the text of what failed before exec, or end of file at exec
        self.killed = False  # SIGKILL was sent by us
        self.splitters = {stream: Raw() if raw else Splitter() for stream in (1, 2)}
        self.tail = Tail()

    def failed_before_exec(self) -> str:
        """What failed between fork and exec, once `failure` is readable; "" if nothing did."""
        fd, self.failure = self.failure, -1
        reason = os.read(fd, 1 << 16)
        os.close(fd)
        return reason.decode("utf-8", "replace")

    def close(self) -> None:
        """Close what is still open, in the launcher or in a forked sibling."""
        for fd in (*self.pipes, self.crash, self.failure):
            if fd >= 0:
                os.close(fd)
        self.pipes.clear()
        self.crash = self.failure = -1


def start(
    launch: Launch, child: Child, nofile: tuple[int, int], become: Callable[[int], None] | None
) -> None:
    """Fork the rank of `child`, which then holds its pid and the launcher's ends of its pipes.

    become: None to exec a fresh interpreter; else called in the child, which then stays what it is
        and raises BecomeWorker.
    Raises OSError, naming what failed, if there is no child.
    """
    call = launch.worker_fds[child.rank]
    theirs: list[int] = []
    launcher = os.getpid()
    step = "pipe"
    try:
        for stream in (1, 2):
            ours, other = os.pipe()
            theirs.append(other)
            child.pipes[ours] = stream
            os.set_blocking(ours, False)
            _enlarge(ours, len(launch.worker_fds))
        child.failure, failure = os.pipe()
        theirs.append(failure)
        os.set_blocking(child.failure, False)
        step = "memfd_create"
        child.crash = os.memfd_create(f"rankwise-crash-{child.rank}", os.MFD_CLOEXEC)
        step = "fork"
        pid = os.fork()
    except OSError as error:
        child.close()
        _close(*theirs, call)
        raise OSError(error.errno, f"{step}: {error.strerror}") from error
    if not pid:
        _be_the_rank(launch, child, launcher, theirs, nofile, become)
    child.pid = pid
    # Before the next fork: a forked sibling that held the far end of a call channel would hide
    # this rank's end of file from the driver.
    _close(*theirs, call)
    # Also done by the child. Whoever comes first: the group must exist before it is killed.
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # it has done it and has exec'ed since, or is dead


def _be_the_rank(
    launch: Launch,
    child: Child,
    launcher: int,
    theirs: list[int],
    nofile: tuple[int, int],
    become: Callable[[int], None] | None,
) -> None:
    out, err, failure = theirs
    place = (child.rank, launch.worker_fds[child.rank], launch.status_fd, child.crash, launch.name)
    step = "setpgid"
    try:
        os.setpgid(0, 0)
        step = "prctl"
        die_with(launcher)
        step = "dup2"
        os.dup2(out, 1)
        os.dup2(err, 2)
        step = "signal"
        _signal.set_wakeup_fd(-1)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        if launch.cpus is not None:
            step = f"sched_setaffinity to CPUs {launch.cpus[child.rank]}"
            os.sched_setaffinity(0, launch.cpus[child.rank])
        step = "setrlimit"
        limit_descriptors(nofile)
        if become is not None:
            step = "fork"
            child.crash = -1  # the rest of what `child` holds is the launcher's
            child.close()
            become(child.rank)
            _close(*theirs)
        else:
            step = f"execve of {launch.python[0]!r}"
            for fd in place[1:4]:
                os.set_inheritable(fd, True)
            argv = [*launch.python, "-c", BOOT, launch.root, *map(str, place)]
            os.execve(launch.python[0], argv, launch.environments[child.rank])
    except BaseException as error:
        try:
            os.write(failure, f"{step}: {type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(127)
    raise BecomeWorker(place)


def prepare_parent() -> tuple[int, int]:
    """Make this process fit to be the launcher. Returns the limit of descriptors for the ranks."""
    # The mask, and what is ignored, came from whichever thread of the driver started us.
    # The ranks have them from here. Two are ignored in every Python process; None is not Python's.
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    for number in _signal.valid_signals() - {_signal.SIGPIPE, _signal.SIGXFSZ}:
        if _signal.getsignal(number) not in (_signal.SIG_DFL, None):
            _signal.signal(number, _signal.SIG_DFL)
    _leave_terminal()
    # Every descendant whose own parent ends becomes a child of ours.
    prctl(_SET_CHILD_SUBREAPER, 1)
    name_process("rankwise")
    nofile = getrlimit(RLIMIT_NOFILE)
    limit_descriptors((nofile[1], nofile[1]))
    return nofile


def _leave_terminal() -> None:
    """Have no controlling terminal, and so none of our descendants. We are in a background group of
    the driver's session: who read from its terminal there would be stopped, and hang its caller."""
    try:
        tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return  # there is none
    try:
        ioctl(tty, _TIOCNOTTY)
    except OSError:
        pass
    finally:
        os.close(tty)


def limit_descriptors(nofile: tuple[int, int]) -> None:
    # The launcher needs four a rank; where more are refused, the usual 1024 do for most groups.
    try:
        setrlimit(RLIMIT_NOFILE, nofile)
    except (OSError, ValueError):
        pass


def die_with(parent: int) -> None:
    """SIGKILL for this process when `parent`, whose child it is, ends; now, if it has ended.

    The signal comes when the *thread* that forked us ends. The launcher's forks are all made by
    its one thread, so here that is the process.
    """
    prctl(_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), SIGKILL)


def name_process(name: str) -> None:
    """What ps and top show: 15 bytes."""
    prctl(_SET_NAME, name.encode("utf-8", "replace")[:15])


def prctl(option: int, argument: int | bytes) -> None:
    if call_function(_prctl, (option, argument, 0, 0, 0)):
        raise OSError(f"prctl({option}) is refused by the kernel")


def open_standard_descriptors() -> None:
    """A daemon may have closed 0, 1 and 2: the next pipe would get the number, and be clobbered."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def flush_standard_streams() -> None:
    """What is buffered now would be written by every forked child again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _enlarge(pipe: int, world_size: int) -> None:
    try:
        fcntl(pipe, F_SETPIPE_SZ, min(_PIPE, _ALL_PIPES // (2 * world_size)))
    except OSError:
        pass  # over the user's limit: it stays as it is
