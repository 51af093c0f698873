"""What is said between the processes of a group.

    driver   ==frame==>  worker      Boot once, then Call ...; Exit closes the channel in order
    worker   ==frame==>  driver      Ready or Failed once, then one Ok or Failed for each Call
    driver   ==message=> launcher    Launch, then Signal, Ask, Shown, Finish
    launcher ==message=> driver    Preloaded, Spawned, SpawnFailed, Exited, Output, Told, Dying,
                                   Gone last

A frame is a header of 24 bytes and a body (`wire.channel`). A message is one of the slotted classes
below, pickled (`wire.control`). Nobody changes one after it is made.
"""

from __future__ import annotations

from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

VERSION: Final = 1

# magic and version, kind, flags, sequence number on this channel and direction, call, body length
HEADER: Final = Struct("<HBBIQQ")
MAGIC: Final = 0x5700 | VERSION

# Kinds of frame, driver to worker. A stream will be OPEN and ADVANCE beside CALL: each is one entry
# in the order of calls, so nothing here has to change for it.
BOOT: Final = 1
CALL: Final = 2
EXIT: Final = 3

# Kinds of frame, worker to driver.
OK: Final = 16  # the body is the pickled value
FAILED: Final = 17  # the body is a pickled `_outcome.Failed`
ACK: Final = 18  # the call ran; nobody asked for its value
OK_LENT: Final = 19  # as OK; the value lies in the arena, and the body says where
FAILED_LENT: Final = 20  # as FAILED, likewise

ANSWERS: Final = frozenset((OK, FAILED, ACK))

# Flags of a CALL.
WANT_VALUE: Final = 1
HAS_DEADLINE: Final = 2  # the body begins with the deadline: CLOCK_MONOTONIC, a double
DEADLINE: Final = Struct("<d")


# The signals at which a rank writes its Python stacks (`_dump.py`): SIGRTMAX - 3, and - 2.
STACKS_SIGNAL: Final = 61  # Python's handler: all threads, and DUMPED behind them
STACK_SIGNAL: Final = 62  # faulthandler's: the main thread
DUMPED: Final = b"-- all threads --\n"


class Launch:
    """Start these ranks. The descriptors were inherited under the numbers given here, or are
    `granted`: they wait on the socket for that, the workers' in rank order, then the status page's.
    """

    __slots__ = (
        "color", "cpus", "environments", "granted", "mode", "name", "preload", "python", "root",
        "start_method", "status_fd", "sys_path", "worker_fds",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: str,
        start_method: str,
        python: list[str],
        root: str,
        sys_path: list[str],
        environments: list[dict[str, str]],
        worker_fds: list[int],
        status_fd: int,
        granted: bool = False,
        preload: tuple[str, ...],
        mode: str,
        color: bool,
        cpus: list[tuple[int, ...]] | None = None,
    ) -> None:
        self.name = name
        self.start_method = start_method  # "spawn" or "forkserver"
        self.python = python  # the interpreter and its flags
        self.root = root  # the directory that rankwise is imported from
        self.sys_path = sys_path
        self.environments = environments  # one a rank, whole
        self.worker_fds = worker_fds  # the workers' ends of the call channels, one a rank
        self.status_fd = status_fd
        self.granted = granted
        self.preload = preload
        self.mode = mode  # "prefix", "inherit" or "off"
        self.color = color
        self.cpus = cpus  # where each rank may run; None: where the driver may


class Signal:
    """Send `number` to the process groups of these ranks."""

    __slots__ = ("number", "ranks")
    __match_args__ = ("ranks", "number")

    def __init__(self, ranks: tuple[int, ...], number: int) -> None:
        self.ranks = ranks
        self.number = number


class Ask:
    """Tell of each of `ranks` its last line, and with `stacks` its Python stacks: a Told each."""

    __slots__ = ("number", "ranks", "stacks")
    __match_args__ = ("number", "ranks", "stacks")

    def __init__(self, number: int, ranks: tuple[int, ...], stacks: bool) -> None:
        self.number = number  # which question this is: the answers repeat it
        self.ranks = ranks
        self.stacks = stacks


class Shown:
    """So many bytes of Output have been written out (or thrown away) by the driver."""

    __slots__ = ("nbytes",)
    __match_args__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Finish:
    """SIGKILL what is left, with all descendants; report each end; say Gone; exit.

    stay: if it can fork other ranks from what it has imported, the launcher does not exit, but
    waits for the next Launch.
    """

    __slots__ = ("stay",)

    def __init__(self, stay: bool = False) -> None:
        self.stay = stay


class Preloaded:
    """The launcher imported `preload` in `seconds`; `refused`: why it will not fork, or None."""

    __slots__ = ("refused", "seconds")
    __match_args__ = ("seconds", "refused")

    def __init__(self, seconds: float, refused: str | None) -> None:
        self.seconds = seconds
        self.refused = refused


class Spawned:
    """Rank `rank` is process `pid`, which started at `starttime` (clock ticks since boot)."""

    __slots__ = ("pid", "rank", "starttime")
    __match_args__ = ("rank", "pid", "starttime")

    def __init__(self, rank: int, pid: int, starttime: int) -> None:
        self.rank = rank
        self.pid = pid
        self.starttime = starttime


class SpawnFailed:
    """Rank `rank` could not be started at all."""

    __slots__ = ("rank", "reason")
    __match_args__ = ("rank", "reason")

    def __init__(self, rank: int, reason: str) -> None:
        self.rank = rank
        self.reason = reason


class Exited:
    """The exit report of a rank: what the kernel and its descriptors tell of its end."""

    __slots__ = ("exitcode", "log_tail", "oom_killed", "peak_rss", "pid", "rank", "stack")

    def __init__(
        self,
        *,
        rank: int,
        pid: int,
        exitcode: int | None,
        peak_rss: int | None,
        oom_killed: bool | None,
        log_tail: str,
        stack: str | None,
    ) -> None:
        self.rank = rank
        self.pid = pid
        self.exitcode = exitcode  # as in subprocess: negative for a signal
        self.peak_rss = peak_rss  # bytes
        self.oom_killed = oom_killed
        self.log_tail = log_tail
        self.stack = stack


class Output:
    """Bytes to show on stream 1 or 2: whole lines, in mode "prefix" with their prefixes."""

    __slots__ = ("data", "stream")
    __match_args__ = ("stream", "data")

    def __init__(self, stream: int, data: bytes) -> None:
        self.stream = stream
        self.data = data


class Told:
    """The answer to question `number` for one rank."""

    __slots__ = ("last_line", "number", "rank", "reason", "stack")

    def __init__(
        self, number: int, rank: int, stack: str | None, reason: str | None, last_line: str
    ) -> None:
        self.number = number
        self.rank = rank
        self.stack = stack  # as faulthandler wrote it, all threads
        self.reason = reason  # why there is none, or not all of it
        self.last_line = last_line  # that it wrote to 1 or 2; "" if none


class Dying:
    """SIGKILL has been sent to all; these ranks still end (a GB takes the kernel some 30 ms).

    Said a few times a second after Finish, so that a launcher which waits is not taken for one that
    has stopped. `ranks` is empty while only descendants of ranks are left.
    """

    __slots__ = ("ranks",)
    __match_args__ = ("ranks",)

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks


class Gone:
    """Every worker and descendant has ended and been reaped: the launcher's last word, unless it
    stays, `warm`, for the next Launch.

    left: the pids, if any, that did not end though SIGKILL was sent to them and ten seconds passed:
    the kernel holds them (a device driver or a network file system hangs).
    """

    __slots__ = ("left", "warm")
    __match_args__ = ("left", "warm")

    def __init__(self, left: tuple[int, ...] = (), warm: bool = False) -> None:
        self.left = left
        self.warm = warm
