"""The hand-over of the lead, checked exhaustively: every order of events, for small sizes.

The lead is the real one (`_lead.py`). Around it stands a model of what `_pump.py` and `_keeper.py`
do with it, cut at the places where a thread lets go of the lock: waiters, the keeper, answers that
arrive, timeouts, exceptions out of signal handlers, and handlers that wait themselves. From every
state that can be reached, all steps that are possible are taken. Where none is left, whoever waited
must have gone, and every answer that came must have been dealt with: nobody sleeps over one.

The keeper's look at the clock, every quarter of a second, is no part of it: nothing here needs it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import pytest

from rankwise._calls import Call
from rankwise._lead import Lead, Waiter


class Wait(NamedTuple):
    """One wait: by `thread`, for `call`. `inside`: of a handler that has interrupted that wait."""

    thread: int
    call: int
    timeout: bool = False
    struck: bool = False
    inside: int | None = None


class Case(NamedTuple):
    waits: tuple[Wait, ...]
    calls: int


CASES = {
    "alone": Case((Wait(0, 0),), 1),
    "nobody waits": Case((), 2),
    "two for two": Case((Wait(0, 0), Wait(1, 1)), 2),
    "two for one": Case((Wait(0, 0), Wait(1, 0)), 1),
    "three for three": Case((Wait(0, 0), Wait(1, 1), Wait(2, 2)), 3),
    "one beside a callback": Case((Wait(0, 0),), 2),
    "two beside a callback": Case((Wait(0, 0), Wait(1, 1)), 3),
    "impatient": Case((Wait(0, 0, timeout=True),), 1),
    "impatient beside another": Case((Wait(0, 0, timeout=True), Wait(1, 1)), 2),
    "both impatient, and a callback": Case((Wait(0, 0, True), Wait(1, 1, True)), 3),
    "struck": Case((Wait(0, 0, struck=True),), 1),
    "struck beside another": Case((Wait(0, 0, struck=True), Wait(1, 1)), 2),
    "struck beside an impatient one": Case((Wait(0, 0, struck=True), Wait(1, 1, True)), 2),
    "struck beside two": Case((Wait(0, 0, struck=True), Wait(1, 1), Wait(2, 2)), 3),
    "a handler waits": Case((Wait(0, 0), Wait(0, 1, inside=0)), 2),
    "a handler waits for the same": Case((Wait(0, 0), Wait(0, 0, inside=0)), 1),
    "a handler waits, beside another": Case((Wait(0, 0), Wait(0, 1, inside=0), Wait(1, 2)), 3),
    "a handler waits, impatient": Case((Wait(0, 0), Wait(0, 1, True, inside=0), Wait(1, 0)), 2),
    "a handler waits and is struck": Case(
        (Wait(0, 0, struck=True), Wait(0, 1, struck=True, inside=0), Wait(1, 2)), 3
    ),
}

# Where a wait stands; BLOCKED: the leader, inside its poll. A wait that is frozen by a handler's
# stays where it is.
NEW, LOOKING, LEADING, BLOCKED, SERVING, ASLEEP, LEAVING, OUT = range(8)


class World:
    """One run. Every method that changes something is one step, which nothing comes between."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.calls = [Call("m", b"", (0,)) for _ in range(case.calls)]
        self.lead = Lead(self._arm_keeper, self._unled)
        self.waiters: list[Waiter] = []
        for wait in case.waits:
            waiter = Waiter()
            waiter.thread = wait.thread
            self.waiters.append(waiter)
        self.at = [NEW] * len(case.waits)
        self.coming = set(range(case.calls))
        self.here: set[int] = set()  # in the sockets
        self.taken: set[int] = set()  # off the sockets, not fed yet
        self.kicked = False
        self.roused = False
        self.armed = False  # as the kernel sees it
        self.keeper: Waiter | None = None  # while it leads
        self.lead.rearm()

    def _arm_keeper(self, armed: bool) -> None:
        self.armed = armed

    def _rouse(self) -> None:
        self.roused = True

    def _unled(self) -> bool:
        return any(not call.done for call in self.calls)

    def key(self) -> object:
        """All of the state, as something that can be compared."""
        names = {waiter: index for index, waiter in enumerate(self.waiters)}
        if self.keeper is not None:
            names[self.keeper] = -2

        def name(waiter: Waiter | None) -> object:
            return None if waiter is None else names.get(waiter, "gone keeper")

        return (
            tuple(self.at), frozenset(self.coming), frozenset(self.here), frozenset(self.taken),
            self.kicked, self.roused, self.armed, self.keeper is not None,
            tuple(call.done for call in self.calls), self.lead.armed, self.lead.stranded,
            name(self.lead.leader), tuple(name(waiter) for waiter in self.lead.sleepers),
            tuple((w.gone, name(w.outer), w.gate is None or w.gate.locked()) for w in self.waiters),
        )  # fmt: skip

    # -- what may happen ----------------------------------------------------------------------

    def steps(self) -> list[tuple[str, int]]:
        found = [("arrive", call) for call in self.coming]
        for index, wait in enumerate(self.case.waits):
            if self._frozen(index) or not self._begun(index):
                continue
            at = self.at[index]
            waiter = self.waiters[index]
            if at in (NEW, LOOKING, LEADING, SERVING, LEAVING):
                found.append(("go", index))
            elif at == BLOCKED:
                if self.here or self.roused:
                    found.append(("go", index))
                elif wait.timeout:
                    found.append(("time out", index))
            elif at == ASLEEP:
                assert waiter.gate is not None
                if not waiter.gate.locked():
                    found.append(("go", index))
                elif wait.timeout:
                    found.append(("time out", index))
            if wait.struck and at not in (NEW, OUT):
                found.append(("strike", index))
        if self.keeper is not None or self.kicked or (self.armed and self.here):
            found.append(("keep", 0))
        return found

    def _frozen(self, index: int) -> bool:
        """A handler has interrupted this wait, and has not returned."""
        return any(
            wait.inside == index and self.at[other] not in (NEW, OUT)
            for other, wait in enumerate(self.case.waits)
        )

    def _begun(self, index: int) -> bool:
        """A handler's wait begins while the other is somewhere in the middle."""
        inside = self.case.waits[index].inside
        return inside is None or self.at[index] != NEW or self.at[inside] not in (NEW, OUT)

    def take(self, step: tuple[str, int]) -> None:
        what, index = step
        if what == "arrive":
            self.coming.discard(index)
            self.here.add(index)
        elif what == "keep":
            self._keep()
        elif what == "time out":
            self.at[index] = LEAVING
        elif what == "strike":
            self.waiters[index].gone = True
            self.kicked = True
            self.at[index] = OUT
        else:
            self._go(index)

    # -- a waiter: Pump.wait and Pump._poll ---------------------------------------------------

    def _go(self, index: int) -> None:
        waiter = self.waiters[index]
        call = self.calls[self.case.waits[index].call]
        at = self.at[index]
        if at == LEAVING:
            self.at[index] = OUT
            if self.lead.leave(waiter, call):
                self.kicked = self.kicked or self.lead.stranded
            elif waiter.outer is not None:
                self._rouse()
        elif at == SERVING:
            self._feed()
            self.at[index] = LEADING
        elif at == BLOCKED:
            self.roused = False
            self._receive()
            self.at[index] = SERVING
        elif call.done:
            self.at[index] = LEAVING
        elif at in (NEW, LOOKING):
            if self.lead.leader is not waiter:
                self.lead.take_or_sleep(waiter, call)
            self.at[index] = LEADING if self.lead.leader is waiter else ASLEEP
        elif at == ASLEEP:
            assert waiter.gate is not None
            assert waiter.gate.acquire(blocking=False)
            self.at[index] = LOOKING
        elif self.lead.leader is not waiter:
            self.at[index] = LOOKING
        elif self.lead.stranded:
            self.lead.stranded = False
            self.at[index] = SERVING
        else:
            self.at[index] = BLOCKED

    def _receive(self) -> None:
        self.taken |= self.here
        self.here.clear()

    def _feed(self) -> None:
        for number in sorted(self.taken):
            call = self.calls[number]
            call.done = True
            for watcher in call.watchers or ():
                try:
                    watcher()
                except RuntimeError:
                    pass
        self.taken.clear()

    # -- the keeper: Keeper._handle, Pump.mend, Pump.lead_once ---------------------------------

    def _keep(self) -> None:
        lead = self.lead
        if self.keeper is not None:
            self._feed()
            if lead.end(self.keeper):
                self.kicked = self.kicked or lead.stranded
            self.keeper = None
            return
        replies = self.armed and bool(self.here)
        if self.kicked:
            self.kicked = False
            if lead.leader is None or lead.current() is not lead.leader:
                lead.hand_on()
        if not (lead.stranded or replies):
            return
        if lead.current() is not None:
            lead.disarm()
            self._rouse()
            return
        self.keeper = Waiter()
        self.keeper.thread = -2
        lead.leader = self.keeper
        lead.stranded = False
        self._receive()

    # -- what must hold -----------------------------------------------------------------------

    def check(self, path: list[tuple[str, int]]) -> None:
        """In any state: at most one leads. In the last: nothing is left undone."""
        if self.steps():
            return
        told = "\n".join(f"  {what} {index}" for what, index in path)
        assert not self.here, f"nobody hears the answers {self.here} after\n{told}"
        assert not self.taken, f"the answers {self.taken} were taken and forgotten after\n{told}"
        waiting = [i for i, at in enumerate(self.at) if at not in (NEW, OUT)]
        assert not waiting, f"waits {waiting} never end after\n{told}"


def explore(case: Case) -> int:
    """Go through every state that `case` can come to. Returns how many there are."""
    seen = set()
    ahead: deque[list[tuple[str, int]]] = deque([[]])
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


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ("gate", "two for two"),
        ("rearm", "nobody waits"),
        ("stranded", "struck"),
        ("rouse", "a handler waits"),
        ("end", "a handler waits and is struck"),
    ],
)
def test_the_model_finds_a_lead_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, broken: str, name: str
) -> None:
    """Each part of the hand-over, taken away, is missed in one of the cases."""
    if broken == "gate":
        monkeypatch.setattr(Waiter, "open_gate", lambda waiter: None)
    elif broken == "end":
        monkeypatch.setattr(Lead, "end", lambda lead, me: lead.leader is me and lead.hand_on())
    elif broken == "rearm":
        monkeypatch.setattr(Lead, "rearm", lambda lead: None)
    elif broken == "stranded":
        monkeypatch.setattr(Lead, "stranded", property(lambda lead: False, lambda lead, to: None))
    else:
        monkeypatch.setattr(World, "_rouse", lambda world: None)
    with pytest.raises(AssertionError, match="after"):
        explore(CASES[name])
