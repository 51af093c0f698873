"""What can go wrong, as a tree. Every class here survives pickle, with its fields and its cause.

WorkerGroupError(RuntimeError)
  StartupError          a rank did not become ready
    StartupTimeout      (also TimeoutError) the ranks were not ready in time
  GroupBroken           (also concurrent.futures.BrokenExecutor) the group failed; see `.first`
    WorkerDied          (also ChildProcessError) a rank's process ended
  GroupClosed           the caller closed the group
  RemoteError           what a worker raised, as text: the cause of what the caller catches
  CallTimeout           (also TimeoutError) a deadline or a waiter's patience ran out
  SerializationError    (also TypeError) an argument or a result cannot travel
"""

from __future__ import annotations

import signal as _signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import BrokenExecutor
else:
    # The real base costs 10 ms (it imports logging); whoever catches BrokenExecutor has it already
    # or gets it here, when the first of these classes is asked for by the driver.
    from concurrent.futures._base import BrokenExecutor

__all__ = [
    "CallTimeout",
    "GroupBroken",
    "GroupClosed",
    "RemoteError",
    "SerializationError",
    "StartupError",
    "StartupTimeout",
    "WorkerDied",
    "WorkerGroupError",
]


class WorkerGroupError(RuntimeError):
    """The root of everything that rankwise raises on its own account."""

    def __reduce__(self) -> tuple[object, ...]:
        # An exception pickles its args and its __dict__; the cause, which is half of what we have
        # to say, would be left behind.
        return _rebuild, (type(self), self.args, dict(self.__dict__), self.__cause__)


def _rebuild(
    cls: type[WorkerGroupError],
    args: tuple[object, ...],
    fields: dict[str, object],
    cause: BaseException | None,
) -> WorkerGroupError:
    error = cls(*args)
    error.args = args
    error.__dict__.update(fields)
    error.__cause__ = cause
    return error


def first_line(text: str, limit: int = 300) -> str:
    """The first line of `text`, for a line of ours: an exception may carry megabytes."""
    line = text.partition("\n")[0]
    return line if len(line) <= limit else f"{line[:limit]}... ({len(line)} characters)"


def describe_exit(exitcode: int | None) -> str:
    """`exitcode` in words: `was killed by SIGKILL`, `exited with status 3`, `ended`."""
    if exitcode is None:
        return "ended (its exit status is not known)"
    if exitcode < 0:
        return f"was killed by {signal_name(-exitcode)}"
    return f"exited with status {exitcode}"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 40` for what has no name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class StartupError(WorkerGroupError):
    """A rank did not become ready, so the group was not made and nothing of it is left.

    rank: which one (None where no single rank is to blame).
    phase: how far it had come: "spawn", "import" (its class and arguments), "construct"
        (`target(...)` ran) or "ready".
    exitcode: its exit status, negative for a signal; None where its process still lived.
    log_tail: the last of what it wrote to its descriptors 1 and 2 (at most 64 KB).
    `__cause__` is the rank's own exception, where it raised one.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        phase: str = "spawn",
        exitcode: int | None = None,
        log_tail: str = "",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.exitcode = exitcode
        self.log_tail = log_tail

    @property
    def exit_status(self) -> int | None:
        """The same as `exitcode`."""
        return self.exitcode


class StartupTimeout(StartupError, TimeoutError):
    """`start_timeout` ran out. Each of these maps the ranks that are not ready:

    phases: to where each stands. stacks: to its Python stacks, None where there are none.
    last_lines: to the last line that it wrote to its descriptors 1 and 2; "" if none.
    """

    def __init__(
        self,
        message: str,
        *,
        phases: Mapping[int, str] | None = None,
        stacks: Mapping[int, str | None] | None = None,
        last_lines: Mapping[int, str] | None = None,
        rank: int | None = None,
        phase: str = "spawn",
        exitcode: int | None = None,
        log_tail: str = "",
    ) -> None:
        super().__init__(message, rank=rank, phase=phase, exitcode=exitcode, log_tail=log_tail)
        self.phases = dict(phases or {})
        self.stacks = dict(stacks or {})
        self.last_lines = dict(last_lines or {})


class GroupBroken(WorkerGroupError, BrokenExecutor):
    """The group has failed and takes no more calls.

    first: what broke it: a WorkerDied, or the exception of the rank that failed first.
        It is also the `__cause__`.
    stacks: where the ranks were that had not returned from the call in which `first` was raised
        when its `grace` was over: their Python stacks by rank, None where there are none. Empty
        where something else broke it.
    """

    def __init__(
        self,
        message: str,
        *,
        first: BaseException | None = None,
        stacks: Mapping[int, str | None] | None = None,
    ) -> None:
        super().__init__(message)
        self.first: BaseException | None = first
        self.stacks = dict(stacks or {})
        self.__cause__ = first


class WorkerDied(GroupBroken, ChildProcessError):
    """A rank's process ended: what every open call of it raises, and what `first` is afterwards.

    rank, pid: whose process it was.
    exitcode: as in `subprocess`: the exit status, or minus the signal's number; None: not known.
    signal: the signal's number, or None.
    oom_killed: True, False, or None where it cannot be told.
    method, call_id: the oldest call that it owed, None where it was idle.
    log_tail: the last 64 KB that it wrote to descriptors 1 and 2, as text.
    stack: the Python stacks that faulthandler wrote when it crashed, or None.
    peak_rss: the most memory it had resident, in bytes, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int = -1,
        pid: int | None = None,
        exitcode: int | None = None,
        oom_killed: bool | None = None,
        method: str | None = None,
        call_id: int | None = None,
        log_tail: str = "",
        stack: str | None = None,
        peak_rss: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.pid = pid
        self.exitcode = exitcode
        self.signal = -exitcode if exitcode is not None and exitcode < 0 else None
        self.oom_killed = oom_killed
        self.method = method
        self.call_id = call_id
        self.log_tail = log_tail
        self.stack = stack
        self.peak_rss = peak_rss
        self.first = self

    def __reduce__(self) -> tuple[object, ...]:
        fields = {key: value for key, value in self.__dict__.items() if key != "first"}
        return _rebuild_died, (type(self), self.args, fields, self.__cause__)


def _rebuild_died(
    cls: type[WorkerDied],
    args: tuple[object, ...],
    fields: dict[str, object],
    cause: BaseException | None,
) -> WorkerGroupError:
    error = _rebuild(cls, args, fields, cause)
    error.__dict__["first"] = error  # its own first cause: pickled as itself it would never end
    return error


class GroupClosed(WorkerGroupError):
    """The caller closed the group: the call was not run, or its answer is not to come."""


class RemoteError(WorkerGroupError):
    """What a worker raised, as text; the `__cause__` of the exception that the caller catches.

    It is raised itself where the original is no `Exception`, or cannot be pickled or rebuilt.
    rank, pid, method: where it happened; type_name: the original's class, with its module;
    remote_traceback: the worker's own traceback.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int = -1,
        pid: int = 0,
        method: str = "",
        type_name: str = "",
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.pid = pid
        self.method = method
        self.type_name = type_name
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else text


class CallTimeout(WorkerGroupError, TimeoutError):
    """A call's deadline passed, or a waiter's patience ran out.

    answered: the ranks whose answers had come. missing: the others. The rest has each of these:
    states: what it was doing: "running" (this call), "queued" (it had not begun it), "stopped"
        (SIGSTOP), "starting", "closing" or "dead".
    seconds: how long it had been running it (0.0 where it had not begun).
    cpu: how many cores its process kept busy in the last half second (1.0: one); None: not known.
    stacks: its Python stacks at the deadline, as faulthandler writes them (see RankStack); None
        where there are none. Always None where it was only patience that ran out.
    reasons: why there is no stack, where one was asked for.
    last_lines: the last line that it wrote to its descriptors 1 and 2; "" if none is known.
    """

    def __init__(
        self,
        message: str,
        *,
        method: str = "",
        answered: Sequence[int] = (),
        missing: Sequence[int] = (),
        states: Mapping[int, str] | None = None,
        seconds: Mapping[int, float] | None = None,
        cpu: Mapping[int, float | None] | None = None,
        stacks: Mapping[int, str | None] | None = None,
        reasons: Mapping[int, str] | None = None,
        last_lines: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.method = method
        self.answered = tuple(answered)
        self.missing = tuple(missing)
        self.states = dict(states or {})
        self.seconds = dict(seconds or {})
        self.cpu = dict(cpu or {})
        self.stacks = dict(stacks or {})
        self.reasons = dict(reasons or {})
        self.last_lines = dict(last_lines or {})


class SerializationError(WorkerGroupError, TypeError):
    """An argument cannot be pickled: raised by the submitting call, before anything is sent. Or a
    result cannot: then it is that call's failure.

    path: the way to the culprit, as one would write it: `args[0]['cfg'].lock`, `result[3]`.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path
