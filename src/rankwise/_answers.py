"""From a settled call to what its caller gets: a value, or an exception that says why not.

It runs in the waiter's thread, never under a lock: it unpickles, which runs the user's code.
"""

from __future__ import annotations

import signal
from _pickle import loads as plain_loads

from rankwise._calls import Broken, Call, Cancelled, Closed, Error, Expired, Garbled, Lost, Stuck
from rankwise._interrupts import is_interrupt
from rankwise._messages import FAILED, OK
from rankwise._outcome import add_note, failed_at, failure
from rankwise._report import look
from rankwise._stacks import ranks_text
from rankwise.errors import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    RemoteError,
    WorkerDied,
    WorkerGroupError,
    describe_exit,
    first_line,
)
from rankwise.wire import codec
from rankwise.wire.lending import LENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rankwise._engine import Engine
    from rankwise._report import RankReport


def take(call: Call, engine: Engine) -> Any:
    """The value of the settled `call`, in the shape that its caller asked for; or raises."""
    answers = call.answers
    if call.error is not None or call.reply_from is not None:
        return _take_some(call, engine)
    for kind, _ in list(answers.values()):  # late ones may still come in
        if kind == FAILED:
            return _take_some(call, engine)
    arena = engine.arena
    values: list[object] = []
    for rank in call.ranks:
        kind, body = answers[rank]
        if kind != OK or (arena is not None and body[0] == LENT):
            values.append(_value(rank, answers[rank], call, engine))
            continue
        try:
            values.append(plain_loads(body))
        except Exception as reason:
            values.append(_not_rebuilt(rank, reason, call, engine))
    return values if call.shape is None else values[0]


def _take_some(call: Call, engine: Engine) -> Any:
    """As `take`, where a rank has failed, or not every rank has answered."""
    error = call.error
    answers = dict(call.answers)  # a copy: late answers still come in
    if error is not None and not (call.return_exceptions and isinstance(error, (Lost, Broken))):
        raise explain(error, call, engine)
    failures = {rank: body for rank, (kind, body) in answers.items() if kind == FAILED}
    if failures and not call.return_exceptions:
        raise _earliest(failures, call, engine)
    if call.reply_from is not None and call.shape is not None and call.reply_from in answers:
        return _value(call.reply_from, answers[call.reply_from], call, engine)
    values = [_value(rank, answers.get(rank), call, engine) for rank in call.ranks]
    return values[0] if call.shape is not None else values


def _value(rank: int, answer: tuple[int, bytes] | None, call: Call, engine: Engine) -> object:
    if answer is None:  # only with return_exceptions, and the group broke
        assert call.error is not None
        return explain(call.error, call, engine, rank=rank)
    kind, body = answer
    if kind == FAILED:
        return failure(body, rank, engine.ranks.pid(rank), call.method)
    if kind != OK:
        return None
    try:
        return codec.loads(body, engine.arena)
    except Exception as reason:
        return _not_rebuilt(rank, reason, call, engine)


def _not_rebuilt(rank: int, reason: Exception, call: Call, engine: Engine) -> RemoteError:
    """What stands for a result that unpickling has failed on; raised, unless asked for."""
    if is_interrupt(reason):
        raise reason
    error = RemoteError(
        f"the result of rank {rank} (pid {engine.ranks.pid(rank)}) in {call.method} could not "
        f"be rebuilt in the driver: {type(reason).__name__}: {reason}",
        rank=rank,
        pid=engine.ranks.pid(rank),
        method=call.method,
        type_name=type(reason).__name__,
    )
    if call.return_exceptions:
        return error
    raise error from reason


def _earliest(failures: Mapping[int, bytes], call: Call, engine: Engine) -> Exception:
    """The failure that came first by the workers' clock; `failures` on it has all of them."""
    when = {rank: failed_at(body) for rank, body in failures.items()}
    order = sorted(when, key=lambda rank: (when[rank], rank))
    errors = {
        rank: failure(failures[rank], rank, engine.ranks.pid(rank), call.method) for rank in order
    }
    first = errors[order[0]]
    for line in _consequences(order, errors, when):
        add_note(first, line)
    try:
        first.failures = errors  # type: ignore[attr-defined]
    except AttributeError:
        pass  # an exception class with __slots__
    return first


def _consequences(
    order: list[int], errors: Mapping[int, Exception], when: Mapping[int, float]
) -> list[str]:
    """A line for each failure that came after the first of `order`; one for all that are alike.

    They are its consequences as a rule (a peer that has gone from a collective), and their full
    tracebacks would bury it. `failures` has them.
    """
    alike: dict[str, list[int]] = {}
    for rank in order[1:]:
        error = errors[rank]
        cause = error.__cause__ if isinstance(error.__cause__, RemoteError) else error
        text = first_line(str(cause).partition(": ")[2])
        alike.setdefault(text, []).append(rank)
    began = when[order[0]]
    return [
        f"after it, {(when[ranks[0]] - began) * 1e3:.1f} ms later, {ranks_text(sorted(ranks))}: "
        f"{text}"
        for text, ranks in alike.items()
    ]


def explain(
    error: Error, call: Call | None, engine: Engine, *, rank: int | None = None
) -> WorkerGroupError:
    """A new exception for `error`, as `call` sees it (None: a call that was refused)."""
    match error:
        case Expired(missing=missing, reports=reports):
            assert call is not None
            return timeout_error(call, engine, None, missing, reports)
        case Closed(exiting=exiting):
            if call is not None:
                why = "the interpreter is exiting" if exiting else "the group was closed"
                text = f"{call.method}() of {engine.name} was not answered: {why}"
            elif exiting:
                text = f"{engine.name} takes no more calls: the interpreter is exiting"
            else:
                # What is to follow on a break is known beforehand; the user's own close is none.
                outlook = engine.outlook if engine.retired else None
                outlook = outlook or "is closed and takes no more calls: make a new group"
                text = f"{engine.name} {outlook}"
            return GroupClosed(text)
        case Cancelled():  # of a call that waits: by a shutdown, not by its own caller
            method = "the call" if call is None else f"{call.method}()"
            return GroupClosed(f"{method} of {engine.name} was not sent: the group was shut down")
        case Lost() if call is not None and (rank is None or rank == error.rank):
            death = died(error, engine)
            death.add_note(f"{engine.name} {_outlook(engine)}")  # its message is one sentence
            return death
        case Lost() | Broken() | Stuck() | Garbled():
            cause = error.cause if isinstance(error, Broken) else error
            return broken(cause, engine)
    raise AssertionError(f"no words for {error!r}")


def broken(cause: Error, engine: Engine) -> GroupBroken:
    """What a call meets in a group that broke for `cause`: a new GroupBroken, with its `first`."""
    stacks: dict[int, str | None] = {}
    end = ". "
    match cause:
        case Lost():
            first: BaseException = died(cause, engine)
            text = str(first)
        case Stuck(call=call, failed=rank, body=body, missing=missing, reports=reports):
            first = failure(body, rank, engine.ranks.pid(rank), call.method)
            said = f"{type(first).__name__}: {first_line(str(first))}"
            text = (
                f"{engine.name}: rank {rank} (pid {engine.ranks.pid(rank)}) failed in "
                f"{call.method}() ({said}), and {ranks_text(missing)} had not returned from it "
                f"{call.grace:g} s later (option grace)"
            )
            if reports is not None:
                text += "".join(f"\n  {reports[rank].line(call)}" for rank in missing)
                stacks = {rank: reports[rank].stack for rank in missing}
                end = "\n"
        case Garbled(rank=at, reason=reason):
            where = "" if at < 0 else f"rank {at} (pid {engine.ranks.pid(at)}): "
            text = f"{engine.name}: {where}{reason}"
            first = WorkerGroupError(text)
        case _:
            raise AssertionError(f"no words for {cause!r}")
    return GroupBroken(f"{text}{end}{engine.name} {_outlook(engine)}", first=first, stacks=stacks)


def _outlook(engine: Engine) -> str:
    """What is to be done about `engine`, which has broken."""
    return engine.outlook or "is broken and takes no more calls: make a new group"


def nobody_hears(cause: Error) -> bool:
    """Whether a group that breaks for `cause` may do so with nobody waiting who is told."""
    return isinstance(cause, Stuck) or (isinstance(cause, Lost) and cause.method is None)


def died(lost: Lost, engine: Engine) -> WorkerDied:
    """The WorkerDied for a rank that ended, with its exit report."""
    report = lost.report
    where = " while idle" if lost.method is None else f" in {lost.method}() (call {lost.call_id})"
    return WorkerDied(
        describe_death(lost, engine, where),
        rank=lost.rank,
        pid=engine.ranks.pid(lost.rank),
        exitcode=None if report is None else report.exitcode,
        oom_killed=None if report is None else report.oom_killed,
        method=lost.method,
        call_id=lost.call_id,
        log_tail="" if report is None else report.log_tail,
        stack=None if report is None else report.stack,
        peak_rss=None if report is None else report.peak_rss,
    )


def describe_death(lost: Lost, engine: Engine, where: str) -> str:
    """One sentence: who died, how, where, and what it said last."""
    report = lost.report
    exitcode = None if report is None else report.exitcode
    parts = [f"{engine.name}: rank {lost.rank} (pid {engine.ranks.pid(lost.rank)}) "]
    parts.append(describe_exit(exitcode))
    if report is not None and report.oom_killed:
        parts.append(" by the kernel, which ran out of memory")
        if report.peak_rss:
            parts.append(f" (it had {report.peak_rss / 2**30:.1f} GiB resident)")
    parts.append(where)
    tail = "" if report is None else report.log_tail
    last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
    if last:
        parts.append(f"; its last line: {last[:200]!r}")
    if exitcode == -signal.SIGBUS:
        parts.append("; SIGBUS often means that /dev/shm or another mapped file is full")
    return "".join(parts)


def timeout_error(
    call: Call,
    engine: Engine,
    why: str | None,
    missing: tuple[int, ...] | None = None,
    reports: Mapping[int, RankReport] | None = None,
) -> CallTimeout:
    """The CallTimeout of `call`: who has answered, and what each of the others is doing.

    why: what ran out, if not the call's deadline. reports: of those in `missing`; looked at now,
    without stacks, where it was not done at the deadline.
    """
    owing = tuple(call.missing()) if missing is None else missing
    found = look(engine, owing) if reports is None else reports
    answered = tuple(rank for rank in call.ranks if rank not in owing)
    after = f" after {seconds_text(call.timeout or 0.0)}" if why is None else f": {why}"
    return CallTimeout(
        f"{call.method}() has {progress(call, answered)}{after}"
        f"{waiting_text(call, engine, owing, found)}",
        method=call.method,
        answered=answered,
        missing=owing,
        **_fields(dict.fromkeys(owing, call), found),
    )


def flush_timeout(
    engine: Engine,
    timeout: float,
    owed: Mapping[int, Call],
    reports: Mapping[int, RankReport] | None,
) -> CallTimeout:
    """What `flush(timeout)` raises. owed: by rank, the call that is waited for. reports: as in
    `timeout_error`."""
    reports = look(engine, owed) if reports is None else reports
    waited = f"waited its {timeout:g} s" if timeout > 0 else "waited no longer"
    lines = "".join(f"\n  {reports[rank].line(call)}" for rank, call in owed.items())
    waiting = f"; waiting for {ranks_text(owed)}{lines}" if owed else ""
    return CallTimeout(
        f"flush({timeout:g}) of {engine.name} has {waited}, and the calls go on{waiting}",
        method="flush",
        answered=tuple(rank for rank in range(engine.world_size) if rank not in owed),
        missing=tuple(owed),
        **_fields(owed, reports),
    )


def _fields(owed: Mapping[int, Call], reports: Mapping[int, RankReport]) -> dict[str, Any]:
    """What a CallTimeout keeps of each rank that owes a call."""
    found = {rank: (reports[rank], call) for rank, call in owed.items()}
    return {
        "states": {rank: report.state_in(call) for rank, (report, call) in found.items()},
        "seconds": {rank: report.seconds_in(call) for rank, (report, call) in found.items()},
        "cpu": {rank: report.cpu for rank, (report, _) in found.items()},
        "stacks": {rank: report.stack for rank, (report, _) in found.items()},
        "reasons": {rank: r.reason for rank, (r, _) in found.items() if r.reason is not None},
        "last_lines": {rank: report.last_line for rank, (report, _) in found.items()},
    }


def slow_text(call: Call, engine: Engine, limit: float, reports: Mapping[int, RankReport]) -> str:
    """What is logged of a call that takes longer than `limit` seconds."""
    owing = tuple(reports)
    answered = tuple(rank for rank in call.ranks if rank not in owing)
    return (
        f"{call.method}() takes longer than {seconds_text(limit)}: it has "
        f"{progress(call, answered)}{waiting_text(call, engine, owing, reports)}"
    )


def progress(call: Call, answered: tuple[int, ...]) -> str:
    return f"{len(answered)} of {len(call.ranks)} answers"


def waiting_text(
    call: Call, engine: Engine, owing: tuple[int, ...], reports: Mapping[int, RankReport]
) -> str:
    """`; waiting for ranks 1, 2 of NAME`, and a line for each of them."""
    if not owing:
        return ""
    lines = "".join(f"\n  {reports[rank].line(call)}" for rank in owing)
    return f"; waiting for {ranks_text(owing)} of {engine.name}{lines}"


def seconds_text(seconds: float) -> str:
    """`30.0 s`, `0.05 s`, `600 s`."""
    return f"{seconds:.1f} s" if 1.0 <= seconds < 100.0 else f"{seconds:g} s"
