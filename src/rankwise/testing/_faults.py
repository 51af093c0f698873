"""Fault plans, the driver's half: what is to go wrong in which rank, and when.

kill, delay, drop, refuse, hold_gil > Fault      faults(Fault, ...) > the groups made in its block
Plan.text_for ==an environment variable, or a string to a thread==> `_inject.arm` in the rank
"""

from __future__ import annotations

import signal as signals
from base64 import b64encode
from math import isfinite

from rankwise import _planned
from rankwise._checks import at_least, choice, wrong_type, wrong_value
from rankwise.wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Final, Self

# In the order in which a rank comes to them. The last three come once a call.
STAGES: Final = ("spawn", "import", "construct", "receive", "run", "reply")
_OF_A_CALL: Final = STAGES[3:]


class Refused(RuntimeError):
    """What `refuse` has a rank raise, where it is given nothing else."""


class Fault:
    """One thing that goes wrong. Made by `kill`, `delay`, `drop`, `refuse` and `hold_gil`."""

    __slots__ = ("at", "call", "error", "rank", "seconds", "signal", "what")

    def __init__(
        self,
        what: str,
        rank: int | None,
        at: str,
        call: int | None,
        *,
        stages: tuple[str, ...] = STAGES,
        seconds: float = 0.0,
        signal: int = 0,
        error: bytes = b"",
    ) -> None:
        one_of = " or ".join((", ".join(map(repr, stages[:-1])), repr(stages[-1])))
        self.what = what
        self.rank = None if rank is None else at_least(0, "rank", "a rank, or None for all", rank)
        self.at = choice("at", stages, at, one_of)
        self.call = None if call is None else at_least(1, "call", "1 for the first call, ...", call)
        if call is not None and at not in _OF_A_CALL:
            raise ValueError(f"call={call} says nothing at {at!r}, where no call has come yet")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise wrong_type("seconds", "a number of seconds", seconds)
        if not isfinite(seconds) or seconds < 0:
            raise wrong_value("seconds", "a finite number of seconds, 0 or more", seconds)
        self.seconds = float(seconds)
        self.signal = signal
        self.error = error  # pickled: a rank loads it when it can import what it needs

    def __repr__(self) -> str:
        rank = "all ranks" if self.rank is None else f"rank {self.rank}"
        call = "" if self.call is None else f" of call {self.call}"
        return f"<Fault: {self.what} {rank} at {self.at!r}{call}>"


def kill(
    rank: int | None,
    at: str = "run",
    call: int | None = None,
    *,
    signal: int = signals.SIGKILL,
) -> Fault:
    """The process of `rank` gets `signal`, from itself, at stage `at`.

    rank: None for every rank. at: one of `STAGES`. call: which of the rank's calls, the first is 1;
    None: each. Raises TypeError or ValueError for what is none of these.
    """
    return Fault("kill", rank, at, call, signal=int(signals.Signals(signal)))


def delay(rank: int | None, seconds: float, at: str = "run", call: int | None = None) -> Fault:
    """`rank` sleeps for `seconds` at stage `at`. In a thread under a ManualClock: by that clock."""
    return Fault("delay", rank, at, call, seconds=seconds)


def drop(rank: int | None, at: str = "reply", call: int | None = None) -> Fault:
    """A message is lost: at "reply" the answer is never sent, at "receive" the call is never run.

    The group hears of it within a second. Where the ranks are threads nobody looks for it, so that
    only a timeout ends the call.
    """
    return Fault("drop", rank, at, call, stages=("receive", "reply"))


def refuse(
    rank: int | None,
    at: str = "run",
    call: int | None = None,
    *,
    error: Exception | None = None,
) -> Fault:
    """`rank` raises `error` (a `Refused`, if none is given) at stage `at`, and lives on.

    At "receive" that is before the arguments are loaded, at "reply" in place of the answer; at
    "spawn" the process ends with status 1.
    """
    if error is not None and not isinstance(error, Exception):
        raise wrong_type("error", "an exception", error)
    pickled = b"" if error is None else codec.dumps(error)
    return Fault("refuse", rank, at, call, error=pickled)


def hold_gil(rank: int | None, seconds: float, at: str = "run", call: int | None = None) -> Fault:
    """`rank` stays in C code for `seconds`, without giving up the interpreter's lock."""
    return Fault("hold_gil", rank, at, call, seconds=seconds)


class faults:
    """Every group that is started in the block has these faults, for as long as it lives.

    `with faults(kill(1, at="run", call=7)): group = WorkerGroup(...)`. A block inside another adds
    to it. What such a group starts anew after the block has none.
    """

    def __init__(self, *plan: Fault) -> None:
        for fault in plan:
            if not isinstance(fault, Fault):
                raise wrong_type(
                    "a fault", "what kill, delay, drop, refuse or hold_gil make", fault
                )
        self._plan = plan
        self._outer: list[_planned.Plan | None] = []

    def text_for(self, world_size: int, *, threads: bool = False) -> str:
        """What the ranks of a group are told. ValueError where they cannot have these faults."""
        for fault in self._plan:
            if fault.rank is not None and fault.rank >= world_size:
                raise ValueError(f"{fault!r}: the group has ranks 0 to {world_size - 1}")
            if threads and (fault.what in ("kill", "hold_gil") or fault.at == "spawn"):
                raise ValueError(
                    f"{fault!r} cannot be had with backend='inline', whose ranks are threads of "
                    "the driver"
                )
        told = [
            (one.what, one.rank, one.at, one.call, one.seconds, one.signal, one.error)
            for one in self._plan
        ]
        return b64encode(codec.dumps(told)).decode()

    def __enter__(self) -> Self:
        outer = _planned.faults
        self._outer.append(outer)
        if isinstance(outer, faults):
            _planned.faults = faults(*outer._plan, *self._plan)
        else:
            _planned.faults = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _planned.faults = self._outer.pop()
