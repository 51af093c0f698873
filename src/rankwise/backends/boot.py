"""The first call of a group: every rank loads the target and its arguments, and makes its object.

Target (pickled before any process) > lend, once there is an arena > Boot ==frame==> import
                                                                       > construct > ready
"""

from __future__ import annotations

from _pickle import dumps

from rankwise._answers import describe_death, died
from rankwise._calls import Broken, Call, Closed, Expired, Garbled, Lost
from rankwise._messages import BOOT, FAILED
from rankwise._outcome import failed_at, failure
from rankwise.errors import RemoteError, StartupError, StartupTimeout, first_line
from rankwise.wire import codec
from rankwise.wire.lending import Lent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._engine import Engine
    from rankwise._spec import GroupSpec
    from rankwise.wire.arena import Arena

ASK_PATIENCE = 0.3  # seconds for the stacks of ranks that are not ready; the limit has passed


class Target:
    """`(target, args, kwargs)` of `ranks`, pickled. Raises SerializationError.

    What is large stays where it is until `body` lends it: there is no arena before there are
    descriptors, and what cannot travel is to be told before there is anything.
    """

    __slots__ = ("_parcel", "_pickled", "_what", "ranks")

    def __init__(self, spec: GroupSpec, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._what = (spec.target, spec.args[ranks[0]], spec.kwargs[ranks[0]])
        self._parcel = codec.Parcel()
        # Threads of this process need no arena, and are shown nothing that is another's.
        parcel = None if spec.backend == "inline" else self._parcel
        self._pickled = codec.encode_call(*self._what, parcel, ranks)

    def body(self, arena: Arena | None) -> bytes:
        """It, to be sent to each of `ranks`. Raises MemoryError."""
        if not self._parcel.stream:
            return self._pickled
        lent = None if arena is None else self._parcel.lend(arena, self.ranks)
        return codec.encode_call(*self._what) if lent is None else lent


def encode_targets(spec: GroupSpec) -> list[Target]:
    """What the ranks make their objects of, pickled. Raises SerializationError."""
    ranks = tuple(range(spec.world_size))
    if spec.shared_args:
        return [Target(spec, ranks)]
    return [Target(spec, (rank,)) for rank in ranks]


def boot_call(engine: Engine, targets: list[Target]) -> Call:
    """The call that makes the worker objects. Raises MemoryError."""
    settings = {
        "sys_path": engine.spec.inherited.sys_path,
        "argv": engine.spec.inherited.argv,
        "spin": (engine.spin.most, engine.spin.learns),
    }
    bodies: dict[int, bytes] = {}
    for target in targets:
        made = target.body(engine.arena)
        pickled = bytes(made) if type(made) is Lent else made
        for rank in target.ranks:
            body = dumps((tuple(engine.infos[rank]), settings, pickled), 5)
            if type(made) is Lent:
                body = Lent(body)
                body.hold = made.hold  # each rank that is sent it lets go of it by itself
            bodies[rank] = body
    ranks = tuple(range(engine.world_size))
    return Call("construct", b"", ranks, bodies=bodies, kind=BOOT)


def check_ready(spec: GroupSpec, engine: Engine, boot: Call, timed_out: bool) -> None:
    """Return if the `boot` call of `engine` has made its ranks ready; else end it and raise why."""
    engine.starting = False
    engine.learn_pids()
    error = startup_error(boot, engine, timed_out, spec.start_timeout or 0.0)
    if error is None:
        return
    engine.kill()
    report = None if error.rank is None else engine.ranks.reports.get(error.rank)
    if report is not None and not error.log_tail:
        error.log_tail = report.log_tail
    raise error


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
    line = first_line(str(error))
    if isinstance(error, RemoteError):  # "rank 0 (pid 7) in construct: SystemExit: 3"
        return line.partition(": ")[2]
    return f"{type(error).__name__}: {line}"
