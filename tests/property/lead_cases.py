"""What the hand-over of the lead is checked for: who waits, how, and for which calls."""

from __future__ import annotations

from typing import NamedTuple


class Wait(NamedTuple):
    """One wait: by `thread`, for `call`.

    inside: of a handler that has interrupted that wait.
    awaits: by a task of the event loop that runs in `thread`; with `timeout` it may be cancelled.
    struck: a handler's exception may end it; of a task: strike its loop, as it leads.
    """

    thread: int
    call: int
    timeout: bool = False
    struck: bool = False
    inside: int | None = None
    awaits: bool = False


class Case(NamedTuple):
    """The `waits` for the first of `calls` calls, of which the others are watched by callbacks.

    held: the first is a future that was submitted alone, before all else. Words in it: "looked at",
        somebody does, without waiting; "later", the last call is submitted after it; "called", by
        who waits for that at once.
    """

    waits: tuple[Wait, ...]
    calls: int
    held: str = ""


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
    "a handler's wait is struck": Case((Wait(0, 0), Wait(0, 1, struck=True, inside=0)), 2),
    "a loop": Case((Wait(9, 0, awaits=True),), 1),
    "a loop beside a callback": Case((Wait(9, 0, awaits=True),), 2),
    "a loop beside a thread": Case((Wait(9, 0, awaits=True), Wait(0, 1)), 2),
    "a loop and a thread for one": Case((Wait(9, 0, awaits=True), Wait(0, 0)), 1),
    "two tasks": Case((Wait(9, 0, awaits=True), Wait(9, 1, awaits=True)), 2),
    "two loops": Case((Wait(9, 0, awaits=True), Wait(8, 1, awaits=True)), 2),
    "a task is cancelled": Case((Wait(9, 0, True, awaits=True),), 1),
    "a task is cancelled beside a thread": Case((Wait(9, 0, True, awaits=True), Wait(0, 1)), 2),
    "a loop is struck": Case((Wait(9, 0, struck=True, awaits=True),), 2),
    "a loop beside one struck": Case((Wait(9, 0, awaits=True), Wait(0, 1, struck=True)), 2),
    "a loop beside one impatient": Case((Wait(9, 0, awaits=True), Wait(0, 1, True)), 2),
    "held": Case((Wait(0, 0),), 1, held="held"),
    "held, and looked at": Case((), 1, held="looked at"),
    "held by one impatient": Case((Wait(0, 0, timeout=True),), 1, held="held"),
    "held by two": Case((Wait(0, 0, timeout=True), Wait(1, 0)), 1, held="held"),
    "held by one struck": Case((Wait(0, 0, struck=True),), 1, held="held"),
    "held, looked at and waited for": Case((Wait(0, 0, True),), 1, held="looked at"),
    "held, and another call": Case((), 2, held="later"),
    "held, and another call is waited for": Case((Wait(0, 1),), 2, held="later, looked at"),
    "held, another call is waited for, impatient": Case((Wait(0, 1, True),), 2, held="later"),
    "held beside a call": Case((Wait(0, 1),), 2, held="later, called, looked at"),
    "held beside a call, and waited for": Case(
        (Wait(0, 1), Wait(1, 0, True)), 2, held="later, called"
    ),
    "held beside one struck": Case((Wait(0, 1, struck=True),), 2, held="later, called, looked at"),
    "held, waited for, and another": Case((Wait(0, 0, True),), 2, held="later"),
    "held in a handler": Case((Wait(0, 1), Wait(0, 0, True, inside=0)), 2, held="later"),
    "held, and awaited": Case((Wait(9, 0, awaits=True),), 1, held="held"),
    "held, and awaited until cancelled": Case((Wait(9, 0, True, awaits=True),), 1, held="held"),
    "held beside a loop": Case((Wait(9, 1, awaits=True),), 2, held="later, looked at"),
}
