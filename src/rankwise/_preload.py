"""Forked ranks: what the launcher imports for them, when it may not fork, what a child must redo.

    Launch > watched by a sentry: import each of `preload` > is the process clean?
               yes: fork each rank > become: its own environment, random seeds and thread counts
               no:  exec the launcher anew; it then spawns

A process with a second thread must not be forked: a lock that the thread holds stays locked in the
child for ever. One with a CUDA context must not either: the driver does not survive it.
"""

from __future__ import annotations

import os
import select
import sys
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_CTRUNC, SOCK_STREAM, socket
from errno import EMFILE
from struct import Struct

from rankwise import _procfs
from rankwise._deadline import clock
from rankwise._spawn import SIGKILL, name_process, start_code
from rankwise.wire.control import frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Mapping, Sequence
    from typing import Any, Final, NoReturn

    from rankwise._messages import Launch
    from rankwise.wire.control import ControlChannel
else:
    import _signal

INT: Final = Struct("i")

LAUNCHER: Final = start_code("_launcher")

# A thread that was joined is still listed for some microseconds, until the kernel is done with it.
_THREADS_END: Final = 0.2


class PreloadFailed(Exception):
    """A module of `preload` could not be imported; the text has its traceback."""


class Shared:
    """What was imported for all ranks, in `seconds`. `refused`: why this process must not be
    forked after it, or None. `before`, `after`: its environment before and after the imports."""

    __slots__ = ("after", "before", "refused", "seconds")

    def __init__(
        self, seconds: float, refused: str | None, before: dict[str, str], after: dict[str, str]
    ) -> None:
        self.seconds = seconds
        self.refused = refused
        self.before = before
        self.after = after

    def adapt(self, launch: Launch) -> None:
        """Make the environments of `launch` such as if each rank had imported by itself."""
        launch.environments = [
            own_environment(variables, self.before, self.after) for variables in launch.environments
        ]


def share(launch: Launch, control: int, driver: int) -> Shared:
    """Import what the ranks of `launch` are to share. Raises PreloadFailed."""
    before = dict(os.environ)
    began = clock()
    sentry = _post_sentry(control, driver)
    try:
        _import(launch.preload, launch.sys_path)
    finally:
        _dismiss(sentry)
    _spare_torchs_libraries()
    shared = Shared(clock() - began, why_not_fork(), before, dict(os.environ))
    if shared.refused is None:
        shared.adapt(launch)
    return shared


def _import(names: Sequence[str], sys_path: Sequence[str]) -> None:
    """Import each of `names`. Raises PreloadFailed at the first that does not let itself."""
    sys.path[:] = sys_path
    for name in names:
        try:
            __import__(name)
        except BaseException:  # SystemExit too: it is the module that failed, not the launcher
            import traceback

            text = traceback.format_exc().rstrip()
            raise PreloadFailed(f"preload: importing {name!r} failed\n{text}") from None


def _spare_torchs_libraries() -> None:
    """Have ranks not undo, one by one at their end, the operators that `import torch` has defined.

    Each torch.library.Library has a `weakref.finalize` that takes its entries out of tables which
    end with the process. In a forked rank that copies 7,000 pages first, in about 25 ms. What the
    ranks define themselves, and all other finalizers, are left as they are.
    """
    undo = getattr(sys.modules.get("torch.library"), "_del_library", None)
    if undo is None:
        return
    from weakref import finalize

    for finalizer in list(getattr(finalize, "_registry", ())):
        alive = finalizer.peek()
        if alive is not None and alive[1] is undo:
            finalizer.atexit = False


def why_not_fork() -> str | None:
    """What makes it unsafe to fork this process now; None if nothing does."""
    until = clock() + _THREADS_END
    while (threads := len(os.listdir("/proc/self/task"))) > 1 and clock() < until:
        select.select((), (), (), 0.001)
    if threads > 1:
        runs = "thread runs" if threads == 2 else "threads run"
        return f"{threads - 1} more {runs} in the launcher"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "torch has a CUDA context in the launcher"
    # What a process that has opened one holds cannot be shared with a forked child.
    device = _procfs.open_device()
    return None if device is None else f"{device} is open in the launcher"


def _post_sentry(control: int, driver: int) -> int:
    """Fork a process that kills the launcher if the driver ends, or says anything, meanwhile.

    While it imports, the launcher does not look; an import may take minutes, hold the GIL in C
    code or never return. All that the driver can have to say then is that it is over. Returns the
    sentry's pid, for `_dismiss`.
    """
    launcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        poll = select.poll()
        # The launcher's own end too, so that nothing is left if somebody else has killed it.
        poll.register(os.pidfd_open(launcher), select.POLLIN)
        poll.register(control, select.POLLIN)
        poll.register(driver, select.POLLIN)
        if os.getppid() == launcher:
            poll.poll()
            _kill_all_of(launcher)
    finally:
        os._exit(0)


def _dismiss(sentry: int) -> None:
    # A preloaded module may ignore SIGCHLD, or have waited for any child.
    try:
        os.kill(sentry, SIGKILL)
        os.waitpid(sentry, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def start_anew(
    control: ControlChannel, driver: int, launch: Launch, unheard: list[object]
) -> NoReturn:
    """Exec the launcher again, without what was imported, to spawn the ranks of `launch`.

    Foreign threads would not only make a fork unsafe: one of them may hold the GIL when the driver
    dies. Parent, children, session and the role of subreaper outlive exec.
    """
    launch.start_method = "spawn"
    rest = os.memfd_create("rankwise-launch")
    os.write(rest, b"".join(map(frame, (launch, *unheard))) + control.unheard())
    kept = {control.fileno(), driver, launch.status_fd, *launch.worker_fds, rest, 0, 1, 2}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            os.set_inheritable(fd, fd in kept)
        except OSError:
            pass  # the directory that was listed
    python = launch.python[0]
    numbers = map(str, (control.fileno(), driver, -1, rest))
    os.execv(python, [python, "-I", "-S", "-c", LAUNCHER, launch.root, launch.name, *numbers])


def receive_granted(grants: int, count: int) -> list[int]:
    """`count` descriptors that the driver has sent on the socket `grants` before its Launch.

    Raises OSError where this process may not have so many.
    """
    fds: list[int] = []
    sock = socket(AF_UNIX, SOCK_STREAM, 0, grants)
    try:
        while len(fds) < count:
            room = CMSG_SPACE(INT.size * (count - len(fds)))
            _, sent, flags, _ = sock.recvmsg(1, room, MSG_CMSG_CLOEXEC)
            for _, _, data in sent:
                fds.extend(fd for (fd,) in INT.iter_unpack(data))
            if flags & MSG_CTRUNC or not sent:
                for fd in fds:
                    os.close(fd)
                raise OSError(EMFILE, "the descriptors of the ranks did not all arrive")
    finally:
        sock.detach()
    return fds


def become(name: str, rank: int, environment: Mapping[str, str]) -> None:
    """Make this forked process a rank of its own, after the imports and before any other code."""
    for key in set(os.environ) - set(environment):
        del os.environ[key]
    os.environ.update(environment)
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:  # the launcher's, not a module's
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    name_process(f"{name}:{rank}")
    _reseed()
    _set_threads(thread_count(environment))


def own_environment(
    rank: Mapping[str, str], before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a rank as if it had imported by itself: what the imports changed from
    `before` to `after` is changed, unless the rank was given a value of its own."""
    environment = dict(rank)
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key) and rank.get(key) == before.get(key):
            environment.pop(key, None)
            if key in after:
                environment[key] = after[key]
    return environment


def _reseed() -> None:
    """The generators of forked ranks would all give the same numbers."""
    modules: dict[str, Any] = sys.modules
    if "random" in modules:
        modules["random"].seed()
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "torch" in modules:
        modules["torch"].seed()


def thread_count(environment: Mapping[str, str]) -> int | None:
    """How many threads a rank with this environment computes with; None where it does not say.

    For a rank that is forked after its libraries were imported, when the variables come too late
    and the number has to be set by calls. MKL_NUM_THREADS is asked before OMP_NUM_THREADS, as
    torch does, so that a forked rank computes with as many threads as a spawned one.
    """
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        outermost = environment.get(name, "").split(",")[0].strip()  # OMP's may be one a level
        if outermost.isascii() and outermost.isdigit() and int(outermost) > 0:
            return int(outermost)
    return None


def _set_threads(wanted: int | None) -> None:
    """The libraries were imported with one thread, so that the launcher could fork."""
    count = wanted or len(os.sched_getaffinity(0))
    modules: dict[str, Any] = sys.modules
    if "torch" in modules:
        modules["torch"].set_num_threads(count)
    if "threadpoolctl" in modules:
        modules["threadpoolctl"].threadpool_limits(count)


def _kill_all_of(launcher: int) -> None:
    me = os.getpid()
    for pid in (*_procfs.descendants(launcher), launcher):
        if pid != me:
            try:
                os.kill(pid, SIGKILL)
            except OSError:
                pass
