"""The first call of a group: every rank loads the target and its arguments, and makes its object.

encode (in the driver, before any process) > Boot ==frame==> import > construct > ready
"""

from __future__ import annotations

import sys
from _pickle import dumps

from rankwise._answers import describe_death, died
from rankwise._calls import Broken, Call, Closed, Expired, Garbled, Lost
from rankwise._messages import BOOT, FAILED
from rankwise._outcome import failed_at, failure
from rankwise.errors import RemoteError, StartupError, StartupTimeout
from rankwise.wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._engine import Engine
    from rankwise._rankinfo import RankInfo
    from rankwise._spec import GroupSpec
    from rankwise._spin import Spin

ASK_PATIENCE = 0.3  # seconds for the stacks of ranks that are not ready; the limit has passed


def encode_targets(spec: GroupSpec) -> list[bytes]:
    """`(target, args, kwargs)` of each rank, pickled. Raises SerializationError."""
    if spec.shared_args:
        blob = codec.encode_call(spec.target, spec.args[0], spec.kwargs[0])
        return [blob] * spec.world_size
    return [
        codec.encode_call(spec.target, args, kwargs)
        for args, kwargs in zip(spec.args, spec.kwargs, strict=True)
    ]


def boot_call(infos: list[RankInfo], blobs: list[bytes], spin: Spin) -> Call:
    """The call that makes the worker objects."""
    settings = {
        "sys_path": list(sys.path),
        "argv": list(sys.argv),
        "spin": (spin.most, spin.learns),
    }
    bodies = {
        info.rank: dumps((tuple(info), settings, blob), 5)
        for info, blob in zip(infos, blobs, strict=True)
    }
    ranks = tuple(range(len(infos)))
    return Call("construct", b"", ranks, bodies=bodies, kind=BOOT)


def startup_error(
    call: Call, engine: Engine, timed_out: bool, waited: float
) -> StartupError | None:
    """What the constructor raises for the settled (or overdue) boot `call`; None: all are ready."""
    name = engine.name
    if timed_out or isinstance(call.error, Expired):
        reports = engine.inquire(tuple(call.missing()), ASK_PATIENCE)
        phases = {rank: report.phase for rank, report in reports.items()}
        where = "".join(f"\n  {report.line(call)}" for report in reports.values())
        return StartupTimeout(
            f"{name}: {len(phases)} of {engine.world_size} ranks were not ready after "
            f"{waited:g} s (start_timeout):{where}",
            phases=phases,
            stacks={rank: report.stack for rank, report in reports.items()},
            last_lines={rank: report.last_line for rank, report in reports.items()},
            rank=next(iter(phases), None),
            phase=next(iter(phases.values()), "spawn"),
        )
    failures = {rank: body for rank, (kind, body) in call.answers.items() if kind == FAILED}
    if failures:
        rank = min(failures, key=lambda rank: (failed_at(failures[rank]), rank))
        phase = engine.ranks.phase(rank)
        cause = failure(failures[rank], rank, engine.ranks.pid(rank), "construct")
        error = StartupError(
            f"{name}: rank {rank} (pid {engine.ranks.pid(rank)}) failed in phase {phase!r}: "
            f"{_in_one_line(cause)}",
            rank=rank,
            phase=phase,
        )
        error.__cause__ = cause
        return error
    error_kind = call.error.cause if isinstance(call.error, Broken) else call.error
    match error_kind:
        case None:
            return None
        case Lost(rank=rank, report=report):
            death = died(error_kind, engine)
            phase = engine.ranks.phase(rank)
            error = StartupError(
                describe_death(
                    error_kind, engine, f" in phase {phase!r}, before the group was ready"
                ),
                rank=rank,
                phase=phase,
                exitcode=None if report is None else report.exitcode,
                log_tail="" if report is None else report.log_tail,
            )
            error.__cause__ = death
            return error
        case Garbled(rank=rank, reason=reason):
            who = "" if rank < 0 else f"rank {rank}: "
            return StartupError(
                f"{name}: {who}{reason}", rank=None if rank < 0 else rank, phase="spawn"
            )
        case Closed():
            return StartupError(f"{name}: the group was closed before it was ready")
    raise AssertionError(f"no words for {error_kind!r}")


def _in_one_line(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    if isinstance(error, RemoteError):  # "rank 0 (pid 7) in construct: SystemExit: 3"
        return line.partition(": ")[2]
    return f"{type(error).__name__}: {line}"
