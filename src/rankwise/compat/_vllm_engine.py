"""What the drop-in needs of a group's engine and rankwise's core has no public word for.

Each function here is a word that the core may come to have; nothing else in `compat` looks behind
an engine's own verbs.
"""

from __future__ import annotations

import os
import re

from rankwise import _procfs
from rankwise._calls import Call, Closed
from rankwise._lead import Waiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._calls import Error
    from rankwise.backends.local import LocalEngine


def wait_news(engine: LocalEngine, happened: Callable[[], bool], until: float | None) -> bool:
    """Wait for something that the launcher says."""
    return engine.link.wait_for(happened, until)


def is_gone(engine: LocalEngine) -> bool:
    """Whether the launcher has ended: no more reports will come."""
    return engine.link.gone or engine.ending.closed


def is_over(engine: LocalEngine) -> bool:
    """Whether a rank that has not been started by now will not be."""
    return is_gone(engine) or engine.pump.ledger.broken is not None


def open_pidfd(engine: LocalEngine, pid: int) -> int | None:
    """A pidfd of the rank, whose number is `pid`; None where it has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    process = _procfs.stat(pid)
    if process is not None and process.starttime == engine.ranks.starttimes[0]:
        return fd
    os.close(fd)  # the number is somebody else's by now
    return None


def when_settled(engine: LocalEngine, call: Call, then: Callable[[], object]) -> None:
    """Call `then` once `call` is settled. It must not block: it runs where sockets are read."""
    with engine.pump.lock:
        if not call.done:
            call.watchers = [*(call.watchers or ()), then]
            return
    then()


def submit_call(engine: LocalEngine, call: Call, awaited: bool) -> Error | None:
    """Submit `call`. `awaited`: without having the keeper watch for the answer, as
    `Engine.submit` would, until whoever waits takes the lead.

    For one worker this is nothing. Whoever calls eight of them, each a group with a keeper of its
    own, and then waits for one after the other, would find seven threads awake and in his way.
    """
    pump = engine.pump
    me = Waiter()
    call.led = awaited
    try:
        refusal = pump.submit((call,), me)
        with pump.lock:
            if pump.ledger.queues[0]:
                call.led = False  # it is long, or there is a queue: the keeper has to push it out
            if pump.lead.leader is me:
                if pump.lead.hand_on():
                    pump.see_to_rest()
            elif not call.led:
                pump.lead.rearm()
    except BaseException:
        me.gone = True  # it may be leading: the keeper takes the lead away from it
        pump.kick()
        raise
    return refusal


def settle_early(engine: LocalEngine, call: Call) -> None:
    """Settle `call` as closed, though it stays queued and runs; its answer is dropped."""
    with engine.pump.lock:
        if call.done:
            return
        call.error = Closed()
        engine.pump.ledger._finish(call)
    engine.pump.tell()
    engine.pump.rouse_leader()


def show_original_prefix(engine: LocalEngine, name: str) -> None:
    """Show `(VllmWorkerProcess pid=7)` where rankwise says `(VllmWorkerProcess rank=0 pid=7)`.

    The lines have their prefix by the time they come here, each one its own, so what stands at the
    start of a line is never the user's text.
    """
    shown = re.compile(rb"^((?:\x1b\[\d+m)?\(%b) rank=0 " % name.encode(), re.MULTILINE)
    printer = engine.link.printer
    put = printer.put

    def put_renamed(stream: int, data: bytes) -> None:
        renamed = shown.sub(rb"\1 ", data)
        put(stream, renamed)
        if len(renamed) < len(data):
            engine.link.shown(len(data) - len(renamed))  # the launcher counts what it has sent

    printer.put = put_renamed  # type: ignore[method-assign]
