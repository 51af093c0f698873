"""A task as a call of a one-rank group, and what comes of it.

    method, args, kwargs > make_call ==> worker ==> answered > (value, exception)
                                           `--dead--> worker_died > "worker died: rank 3 ..."

The group calls its only rank 0; its owner has another number for it, which is what errors show.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from rankwise._answers import died
from rankwise._calls import Call, Garbled, Lost
from rankwise._messages import FAILED
from rankwise._methods import method_name
from rankwise._outcome import failure
from rankwise.compat._vllm_worker import given_worker
from rankwise.errors import RemoteError
from rankwise.wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._engine import Engine
    from rankwise.backends.local import LocalEngine
    from rankwise.compat._vllm_worker import Method
    from rankwise.errors import WorkerDied


def make_call(
    method: Method, args: tuple[Any, ...], kwargs: dict[str, Any], arena: codec.Taker | None
) -> Call:
    """The call of a task, what is large in `arena`. Raises SerializationError, MemoryError."""
    if isinstance(method, str):
        return Call(method, codec.encode_call(method, args, kwargs, arena), (0,), shape=0)
    name = "pickled callable" if isinstance(method, bytes) else method_name(method)
    # Also a function of the worker's own class runs as it is given, not as a subclass overrides it.
    sent = partial(given_worker, method)
    return Call(name, codec.encode_call(sent, args, kwargs, arena), (0,), shape=0)


def answered(call: Call, rank: int, engine: LocalEngine) -> tuple[object, BaseException | None]:
    """(value, exception) of `call`, which the worker has answered. Unpickles."""
    kind, body = call.answers[0]
    pid = engine.ranks.pid(0)
    if kind == FAILED:
        return None, failure(body, rank, pid, call.method)
    try:
        return codec.loads(body, engine.arena), None
    except Exception as reason:
        error = RemoteError(
            f"the result of rank {rank} (pid {pid}) in {call.method} could not be rebuilt here: "
            f"{type(reason).__name__}: {reason}",
            rank=rank,
            pid=pid,
            method=call.method,
            type_name=type(reason).__name__,
        )
        error.__cause__ = reason
        return None, error


def worker_died(engine: LocalEngine, rank: int, call: Call | None) -> WorkerDied:
    """A new WorkerDied, "worker died: ...", for the worker of `engine`, which its owner calls
    `rank`; for the open `call`, or None for a call that is refused."""
    report = engine.ranks.reports.get(0)
    cause = engine.pump.ledger.broken
    if isinstance(cause, Lost):
        lost = Lost(rank, report, cause.method, cause.call_id)
    elif call is not None:
        lost = Lost(rank, report, call.method, call.id)
    else:
        lost = Lost(rank, report, None, None)
    error = died(lost, cast("Engine", _Told(engine.ranks.pid(0))))
    if isinstance(cause, Garbled):
        error.args = (f"{error} ({cause.reason})",)
    elif report is None:
        who = f"{_Told.name}: rank {rank} (pid {error.pid})"
        if call is None:
            what = "takes no more tasks: it was asked to end, or its ResultHandler was closed"
        else:
            what = f"was not waited for in {call.method}(): its ResultHandler was closed"
        error.args = (f"{who} {what}",)
    return error


class _Told:
    """What `died` asks of an engine, so that its text begins with the original's words."""

    name = "worker died"

    def __init__(self, pid: int) -> None:
        self.ranks = self
        self._pid = pid

    def pid(self, rank: int) -> int:
        return self._pid
