"""How groups end that nobody closed: interpreter exit, fork, collection; and what is logged then.

exit     threading's own exit hook breaks the open calls (or a thread in `result` would keep the
         interpreter), then `atexit` closes each group
fork     in the child every group is inert: its copies of the descriptors are closed, no more
collected  the engine is abandoned: its keeper ends it, and a ResourceWarning is given
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import threading
import warnings

from rankwise._calls import Broken, Expired, Lost
from rankwise._deadline import clock
from rankwise._outcome import opened
from rankwise.errors import first_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rankwise._calls import Call
    from rankwise._engine import Engine
    from rankwise._future import GroupFuture
    from rankwise._seat import Seat
    from rankwise._spec import GroupSpec

logger = logging.getLogger("rankwise")

# An interpreter that exits waits so long for the workers' own exit: nobody wants an answer now.
EXIT_TIMEOUT = 2.0

_engines: set[Engine] = set()
_owner = 0
_hooked = False


def adopt(engine: Engine) -> None:
    """See to `engine` at exit and at fork."""
    global _hooked, _owner
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_after_fork)
    if _owner != os.getpid():
        _owner = os.getpid()
        atexit.register(_close_all, _owner)
        try:
            threading._register_atexit(_break_all, _owner)  # type: ignore[attr-defined]
        except RuntimeError:
            pass  # the interpreter is on its way out: atexit alone has to do
    _engines.add(engine)


def disown(engine: Engine) -> None:
    _engines.discard(engine)


def kill_started(spec: GroupSpec) -> None:
    """End what was started of the group of `spec`: its constructor was struck by an exception."""
    for engine in list(_engines):
        if engine.spec is spec:
            engine.kill()


def _after_fork() -> None:
    owner = os.getppid()
    for engine in list(_engines):
        engine.become_inert(
            f"{engine.name} belongs to process {owner}; this is a forked child of it (pid "
            f"{os.getpid()}), which must make a group of its own"
        )
    _engines.clear()


def _break_all(owner: int) -> None:
    if owner == os.getpid():
        for engine in list(_engines):
            engine.break_calls()


def _close_all(owner: int) -> None:
    if owner == os.getpid():
        until = clock() + EXIT_TIMEOUT  # for all of them together
        for engine in list(_engines):
            engine.close(max(0.0, until - clock()))


def abandon(owner: Engine | Seat, name: str) -> None:
    """The group of `owner` was collected without having been closed. A finalizer."""
    if owner.abandon():
        warnings.warn(
            f"the WorkerGroup {name!r} was collected without having been closed: use `with`, or "
            "call close()",
            ResourceWarning,
            stacklevel=2,
        )


def wait_readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def log_unfetched(future: GroupFuture[Any]) -> None:
    """Log, once, a failure that nobody has asked for, as asyncio does."""
    call = future._call
    failed = call.failure()
    if failed is not None and not call.return_exceptions:
        _log("nobody fetched the exception of", call, *failed)
        return
    match call.error:  # in words that need no lock and no unpickling: this runs in a finalizer
        case Expired():
            what = "CallTimeout"
        case Lost(rank=rank):
            what = f"WorkerDied: rank {rank}"
        case Broken(cause=Lost(rank=rank)):
            what = f"GroupBroken: rank {rank} died"
        case Broken():
            what = "GroupBroken"
        case _:
            return
    logger.error("nobody fetched the exception of %s(): %s", call.method, what)


def log_failure(call: Call, rank: int, body: bytes) -> None:
    """Log a failure that came after its call had its outcome.

    After another rank's failure it is a consequence, as a rule: one line, and no traceback.
    """
    first = call.failure()
    if first is not None:
        _, name, message, *_ = opened(body)
        logger.warning(
            "%s() on rank %d, after the failure of rank %d: %s: %s",
            call.method, rank, first[0], name, first_line(message),
        )  # fmt: skip
        return
    _log("not raised, for its call was settled already: the exception of", call, rank, body)


def _log(what: str, call: Call, rank: int, body: bytes) -> None:
    _, name, message, text, *_ = opened(body)
    logger.error("%s %s() on rank %d: %s: %s\n%s", what, call.method, rank, name, message, text)
