"""The hand-over of the lead as a model: the real `Lead` and `Port`, and all that moves them.

    waiter   new > looking > leading > blocked > serving > ... > leaving > out
    await    the same, then parking > awaiting > out          (`Port.wait`)
    loop     idle > reading | refused > idle                  (`Port._readable`)
    keeper   idle > reading > idle                            (`Keeper._handle`, `_timeout`)

It is cut into steps at the places where a thread of `_pump.py` and `_port.py` lets go of the lock,
and the keeper where it leads. `steps` are those that are possible now, `take` takes one, and
`check` says what must hold after it. `test_lead.py` takes them in every order there is.
"""

from __future__ import annotations

import contextlib

from lead_cases import Case, Wait
from lead_loops import IDLE, READING, Loop, Promise

from rankwise._calls import Call
from rankwise._lead import Lead, Waiter

Step = tuple[str, int]


# Where a wait stands; BLOCKED: the leader, inside its poll. A wait that is frozen by a handler's
# stays where it is.
NEW, LOOKING, LEADING, BLOCKED, SERVING, ASLEEP, LEAVING, PARKING, AWAITING, OUT = range(10)
POLLING = (LOOKING, LEADING, BLOCKED, SERVING, ASLEEP, LEAVING)
# What may happen, and need not: nobody is saved by it.
WHIMS = ("strike", "strike the loop", "cancel", "time out", "tick")


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
        self.loops = {wait.thread: Loop(self) for wait in case.waits if wait.awaits}
        self.promises: dict[int, Promise] = {}  # what a task awaits
        self.coming = set(range(case.calls))
        self.later = case.calls - 1 if "later" in case.held else None  # not submitted yet
        self.looks = "looked at" in case.held
        self.here: set[int] = set()  # in the sockets
        self.taken: set[int] = set()  # off the sockets, not fed yet
        self.kicked = False
        self.roused = False
        self.armed = False  # as the kernel sees it
        self.keeper: Waiter | None = None  # while it leads
        self.wrong = ""
        if case.held:
            self.lead.placed(self.calls[0])
        else:
            self.lead.rearm()

    def _arm_keeper(self, armed: bool) -> None:
        self.armed = armed

    def rouse(self) -> None:
        self.roused = True

    def rouse_who_was_robbed(self) -> None:
        self.rouse()

    def _unled(self) -> bool:
        return any(
            not call.done and not call.led and call is not self.lead.held
            for number, call in enumerate(self.calls)
            if number != self.later
        )

    def key(self) -> object:
        """All of the state, as something that can be compared."""
        names: dict[Waiter | None, object] = {None: None}
        names |= {waiter: index for index, waiter in enumerate(self.waiters)}
        names |= {loop.me: ("loop", thread) for thread, loop in self.loops.items() if loop.me}
        if self.keeper is not None:
            names[self.keeper] = "keeper"

        def name(waiter: Waiter | None) -> object:
            return names.get(waiter, "gone")

        return (
            tuple(self.at), frozenset(self.coming), frozenset(self.here), frozenset(self.taken),
            self.kicked, self.roused, self.armed, self.keeper is not None,
            tuple((call.done, call.led) for call in self.calls),
            self.lead.armed, self.lead.stranded, self.lead.held is None, self.later, self.looks,
            name(self.lead.leader), tuple(name(waiter) for waiter in self.lead.sleepers),
            tuple((w.gone, name(w.outer), w.gate is None or w.gate.locked()) for w in self.waiters),
            tuple((loop.key(self.calls), loop in self.lead.ports) for loop in self.loops.values()),
            tuple(promise.kept for promise in self.promises.values()),
        )  # fmt: skip

    # -- what may happen ----------------------------------------------------------------------

    def steps(self) -> list[Step]:
        found = [("arrive", call) for call in self.coming if call != self.later]
        if self.later is not None:
            found.append(("submit", self.later))
        if self.looks:
            found.append(("look", 0))
        if self.keeper is None:
            found.append(("tick", 0))
        for index, wait in enumerate(self.case.waits):
            if wait.call != self.later and not self._frozen(index) and self._begun(index):
                found += [(what, index) for what in self._steps_of(index, wait)]
        for thread, loop in self.loops.items():
            if loop.does != IDLE:
                found.append(("read on", thread))
                struck = any(wait.struck for wait in self.case.waits if wait.thread == thread)
                if struck and loop.does == READING:
                    found.append(("strike the loop", thread))
            elif not self._polls(thread):
                if loop._told:
                    found.append(("tell", thread))
                if loop.armed and (self.here or self.roused):
                    found.append(("read", thread))
        if self.keeper is not None or self.kicked or (self.armed and (self.here or self.roused)):
            found.append(("keep", 0))
        return found

    def _steps_of(self, index: int, wait: Wait) -> list[str]:
        at = self.at[index]
        gate = self.waiters[index].gate
        found = []
        if (
            at in (NEW, LOOKING, LEADING, SERVING, LEAVING, PARKING)
            or (at == BLOCKED and (self.here or self.roused))
            or (at == ASLEEP and gate is not None and not gate.locked())
            or (at == AWAITING and self.promises[index].kept)
        ):
            found.append("go")
            if at == NEW and wait.awaits:
                found.append("go without polling")  # spin=0
        elif at in (BLOCKED, ASLEEP) and (wait.timeout or wait.awaits):
            # A task polls for a while only, and then sleeps in its loop.
            found.append("stop polling" if wait.awaits else "time out")
        if wait.awaits and wait.timeout and at in (PARKING, AWAITING):
            found.append("cancel")
        if wait.struck and not wait.awaits and at not in (NEW, OUT):
            found.append("strike")
        return found

    def _polls(self, thread: int) -> bool:
        """A task has the loop's thread, and nothing else of the loop runs."""
        return any(
            wait.awaits and wait.thread == thread and self.at[index] in POLLING
            for index, wait in enumerate(self.case.waits)
        )

    def _frozen(self, index: int) -> bool:
        """Another has its thread: a handler that interrupted it, or something else of its loop."""
        me = self.case.waits[index]
        if me.awaits and self.at[index] not in POLLING:
            return self.loops[me.thread].does != IDLE or self._polls(me.thread)
        return any(
            wait.inside == index and self.at[other] not in (NEW, OUT)
            for other, wait in enumerate(self.case.waits)
        )

    def _begun(self, index: int) -> bool:
        """A handler's wait begins while the other is somewhere in the middle."""
        inside = self.case.waits[index].inside
        return inside is None or self.at[index] != NEW or self.at[inside] not in (NEW, OUT)

    def take(self, step: Step) -> None:
        what, index = step
        if what == "arrive":
            self.coming.discard(index)
            self.here.add(index)
        elif what == "submit":
            self.later = None
            self._submit(index)
        elif what == "look":  # Pump.attend
            self.looks = False
            self.kicked = self.kicked or self.lead.held is self.calls[index]
        elif what == "keep":
            self._keep()
        elif what == "tick":
            self._keep(looks=True)
        elif what in ("time out", "stop polling"):
            self.at[index] = LEAVING
        elif what == "strike":
            self.waiters[index].gone = True
            self.kicked = True
            self.at[index] = OUT
        elif what == "go":
            self._go(index)
        elif what == "go without polling":
            self._go(index)
            self.at[index] = PARKING
        elif what == "cancel":
            wait = self.case.waits[index]
            self.loops[wait.thread].cancel(self.calls[wait.call], self.promises.get(index))
            self.at[index] = OUT
        elif what == "tell":
            self.loops[index]._deliver()
        elif what == "strike the loop":
            self.loops[index].strike()
            self.kicked = True
        else:
            self.loops[index].read(self)

    def _submit(self, number: int) -> None:
        """Pump.submit of another call, alone or by `call()`, which leads where nobody does."""
        lead = self.lead
        if lead.leader is not None:
            return
        if "called" in self.case.held:
            [index] = [i for i, wait in enumerate(self.case.waits) if wait.call == number]
            lead.take(self.waiters[index])
            self.at[index] = LEADING
        elif not lead.armed:
            lead.placed(None)

    # -- a waiter: Pump.wait and Pump._poll; a task: Port.wait --------------------------------

    def _go(self, index: int) -> None:
        waiter = self.waiters[index]
        wait = self.case.waits[index]
        call = self.calls[wait.call]
        at = self.at[index]
        if at == NEW and wait.awaits:
            if self.loops[wait.thread] not in self.lead.ports:
                self.lead.ports = [*self.lead.ports, self.loops[wait.thread]]
            self.lead.led_by_loop(call, True)
            self.at[index] = PARKING if call.done else LOOKING
        elif at == PARKING:
            promise = self.loops[wait.thread].park(call)
            self.at[index] = OUT if promise is None else AWAITING
            if promise is not None:
                self.promises[index] = promise
        elif at == AWAITING:
            self.at[index] = OUT
        elif at == LEAVING:
            self.at[index] = PARKING if wait.awaits else OUT
            if self.lead.leave(waiter, call):
                self.kicked = self.kicked or self.lead.stranded
            elif waiter.outer is not None:
                self.rouse()
        elif at == SERVING:
            self._feed()
            self.at[index] = LEADING
        elif at == BLOCKED:
            self._receive()
            self.at[index] = SERVING
        elif call.done:
            self.at[index] = LEAVING
        elif at in (NEW, LOOKING):
            if self.lead.leader is not waiter:
                self.lead.take_or_sleep(waiter, call)
                others = self.armed or any(loop.armed for loop in self.loops.values())
                if self.lead.leader is waiter and others:
                    self.wrong = "who has taken the lead wakes others at each answer"
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
        self.roused = False
        self.taken |= self.here
        self.here.clear()

    def _feed(self) -> None:
        for number in sorted(self.taken):
            call = self.calls[number]
            call.done = True
            for watcher in call.watchers or ():
                with contextlib.suppress(RuntimeError):
                    watcher()
        self.taken.clear()

    # -- who leads once: Pump.lead_once, for Port._readable and Keeper._handle ----------------

    def lead_once(self, thread: int) -> Waiter | None:
        """Who leads now, and has taken what was there; None: somebody else leads."""
        if self.lead.current() is not None:
            return None
        me = Waiter()
        me.thread = thread
        self.lead.leader = me
        self.lead.stranded = False
        self._receive()
        return me

    def end_once(self, me: Waiter) -> None:
        self._feed()
        if self.lead.end(me):
            self.kicked = self.kicked or self.lead.stranded

    def _keep(self, looks: bool = False) -> None:
        """The keeper: woken, or awake by the clock, and `looks` around."""
        if self.keeper is not None:
            self.end_once(self.keeper)
            self.keeper = None
        else:
            self._handle(looks)
        if self.keeper is None:
            self.lead.release()

    def _handle(self, looks: bool) -> None:
        """Keeper._handle, Pump.mend."""
        lead = self.lead
        replies = looks or (self.armed and bool(self.here or self.roused))
        if self.kicked:
            self.kicked = False
            if lead.leader is None or lead.current() is not lead.leader:
                lead.hand_on()
        if lead.stranded:
            self.keeper = self.lead_once(-2)
            if self.keeper is None:
                self.rouse_who_was_robbed()
        if replies and self.keeper is None:
            self.keeper = self.lead_once(-2)
            if self.keeper is None:
                lead.disarm()
                self.rouse()

    # -- what must hold -----------------------------------------------------------------------

    def check(self, path: list[Step]) -> None:
        """In any state: nothing went wrong on the way. In the last: nothing is left undone."""
        told = "\n".join(f"  {what} {index}" for what, index in path)
        assert not self.wrong, f"{self.wrong} after\n{told}"
        if any(what not in WHIMS for what, _ in self.steps()):
            return
        assert not self.here, f"nobody hears the answers {self.here} after\n{told}"
        assert not self.taken, f"the answers {self.taken} were taken and forgotten after\n{told}"
        waiting = [i for i, at in enumerate(self.at) if at not in (NEW, OUT)]
        assert not waiting, f"waits {waiting} never end after\n{told}"
