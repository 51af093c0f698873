"""The hand-over of the lead, checked exhaustively: every order of events, for small sizes.

The lead is the real one (`_lead.py`), and so is an event loop's port (`_port.py`). Around them
stands a model of what the pump and the keeper do with them (`lead_world.py`): waiters, the keeper,
tasks of event loops, answers that arrive, timeouts, cancellations, exceptions out of signal
handlers, and handlers that wait themselves. From every state that can be reached, all steps that
are possible are taken. Where none is left that must come, whoever waited must have gone, and every
answer that came must have been dealt with: nobody sleeps over one.

What the keeper does by the clock may come at any moment, and saves nobody: nothing here needs it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from lead_cases import CASES, Case
from lead_world import Step, World

from rankwise._calls import Call
from rankwise._lead import Lead, Waiter
from rankwise._port import Port


def explore(case: Case) -> int:
    """Go through every state that `case` can come to. Returns how many there are."""
    seen = set()
    ahead: deque[list[Step]] = deque([[]])
    while ahead:
        path = ahead.popleft()
        world = World(case)
        for step in path:
            world.take(step)
        key = world.key()
        if key in seen:
            continue
        seen.add(key)
        world.check(path)
        ahead.extend([*path, step] for step in world.steps())
    return len(seen)


@pytest.mark.limit(300)
@pytest.mark.parametrize("name", CASES)
def test_no_order_of_events_leaves_a_waiter_or_an_answer_behind(name: str) -> None:
    assert explore(CASES[name]) > 2


def rearm_threads_alone(lead: Lead) -> None:
    unled = lead._unled()
    if lead.leader is None and unled is not lead.armed:
        lead.arm(unled)


def take_from_the_keeper_alone(lead: Lead, me: Waiter) -> None:
    ports, lead.ports = lead.ports, []
    take(lead, me)
    lead.ports = ports


# `call.led` stays set.
def leave_and_still_lead(port: Port, call: Call, waiter: object) -> None:
    port._waiting.pop(call, None)
    port._pump.lead.rearm()


def take_or_sleep_and_hold(lead: Lead, me: Waiter, call: Call) -> None:
    held = lead.held
    take_or_sleep(lead, me, call)
    lead.held = held


def hold_on(lead: Lead, alone: Call | None) -> None:
    if lead.held is None:
        placed(lead, alone)


def lead_and_hold(lead: Lead, call: Call, led: bool) -> None:
    call.led = led
    lead.rearm()


take = Lead.take
take_or_sleep = Lead.take_or_sleep
placed = Lead.placed

# Each part of the hand-over, taken away, is missed in one of the cases.
BROKEN: dict[str, tuple[type, str, Any, str]] = {
    "no gate opens": (Waiter, "open_gate", lambda waiter: None, "two for two"),
    "nobody is armed": (Lead, "rearm", lambda lead: None, "nobody waits"),
    "what is stranded is forgotten": (
        Lead, "stranded", property(lambda lead: False, lambda lead, to: None), "struck",
    ),
    "no sleeping leader is roused": (World, "rouse", lambda world: None, "a handler waits"),
    "nor one that a handler's wait has robbed": (
        World, "rouse_who_was_robbed", lambda world: None, "a handler's wait is struck",
    ),
    "a handler's struck wait is not passed over": (
        Lead, "end", lambda lead, me: lead.leader is me and lead.hand_on(),
        "a handler's wait is struck",
    ),
    "no loop is armed": (Lead, "rearm", rearm_threads_alone, "a loop"),
    "a loop stays armed": (Lead, "take", take_from_the_keeper_alone, "a loop beside a thread"),
    "a loop is disarmed late": (
        Port, "_readable", lambda port: port.arm(False), "a loop beside a thread",
    ),
    "a task that is cancelled leads on": (
        Port, "_leave", leave_and_still_lead, "a task is cancelled",
    ),
    "who gives up waiting still holds it": (
        Lead, "take_or_sleep", take_or_sleep_and_hold, "held by one impatient",
    ),
    "another call leaves it held": (Lead, "placed", hold_on, "held, and another call"),
    "a look leaves it held": (Lead, "release", lambda lead: None, "held, and looked at"),
    "a task that was cancelled still holds it": (
        Lead, "led_by_loop", lead_and_hold, "held, and awaited until cancelled",
    ),
    "no loop is told": (Port, "settled", lambda port, call: None, "a loop and a thread for one"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_the_model_finds_a_lead_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    owner, part, instead, name = BROKEN[broken]
    monkeypatch.setattr(owner, part, instead)
    with pytest.raises(AssertionError, match="after"):
        explore(CASES[name])
