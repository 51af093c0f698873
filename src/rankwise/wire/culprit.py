"""Which part of an object cannot be pickled, and the way to it. Imported after a failure only.

    explain > find           from the roots down, each time to the first part whose pickling fails
                             alone, until none does: that one is the culprit
              parts.parts_of what an object holds, and the expressions that lead to it

The pickling here writes nowhere and copies no buffer, so a lock beside 10 GB of arrays is found as
fast as one alone. The search ends after a second with what it has: a true path, if not the longest.
"""

from __future__ import annotations

import types
from time import monotonic as clock
from typing import Any, NamedTuple

from rankwise._interrupts import is_interrupt
from rankwise.errors import SerializationError
from rankwise.wire.byvalue import ByValuePickler
from rankwise.wire.codec import PROTOCOL
from rankwise.wire.parts import Parts, parts_of

SECONDS = 1.0
# A path longer than this helps nobody; what is nested deeper has failed for its depth, most likely.
MAX_STEPS = 32

_WITHOUT_ITEMS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


class Culprit(NamedTuple):
    """The deepest object found that cannot be pickled, the way to it, what its pickling raised."""

    path: str
    value: object
    error: Exception


def explain(what: str, roots: dict[str, object], error: Exception) -> SerializationError:
    """The error to raise where pickling `what`, made of `roots` (path -> object), raised `error`.

    It raises nothing itself but `^C` and what else a signal handler raises.
    """
    try:
        found = find(roots)
    except Exception as other:
        if is_interrupt(other):
            raise
        found = None  # user code is met on the way, and the error at hand matters more than ours
    if found is None:
        return SerializationError(
            f"{what} cannot be pickled ({_reason(error)}). Nothing was found in {SECONDS:g} s that "
            "fails on its own."
        )
    path, value, error = found
    return SerializationError(
        f"{path} cannot be pickled: its type is {_type_name(value)} ({_reason(error)}). "
        f"{_advice(path, value, error)}",
        path,
    )


def find(roots: dict[str, object], seconds: float = SECONDS) -> Culprit | None:
    """The culprit among `roots` and what they hold, or None where each of them can be pickled."""
    search = _Search(clock() + seconds)
    names = list(roots)
    chain: list[Culprit] = []
    parts = [Parts(list(roots.values()), names.__getitem__)]
    try:
        while len(chain) <= MAX_STEPS:
            found = search.first_failing(parts, [step.value for step in chain])
            if found is None:
                break
            chain.append(found)
            parts = parts_of(found.value, found.path)
    except _OutOfTime:
        pass
    if not chain:
        return None
    if isinstance(chain[-1].error, RecursionError) and not _recurses_itself(chain[-1].value):
        # No part of it is at fault, it is only too deep: name the whole.
        return chain[0]
    return chain[-1]


class _OutOfTime(Exception):
    pass


class _Nowhere:
    """A file that keeps nothing. The pickler writes each 64 KB, which is when the clock is read."""

    def __init__(self, until: float) -> None:
        self._until = until

    def write(self, data: object) -> None:
        if clock() > self._until:
            raise _OutOfTime


class _Search:
    def __init__(self, until: float) -> None:
        self._nowhere = _Nowhere(until)

    def first_failing(self, parts: list[Parts], above: list[object]) -> Culprit | None:
        """The first of the parts whose pickling fails, by halving. `above`: what it is within.

        Where none fails the halves add up to one pickling of each, so they are not tried together
        first.
        """
        for values, label in parts:
            low, high = 0, len(values)
            if not values:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                if self._attempt(values[low:middle], above) is None:
                    low = middle
                else:
                    high = middle
            error = self._attempt(values[low], above)
            if error is not None:
                return Culprit(label(low), values[low], error)
        return None

    def _attempt(self, value: object, above: list[object]) -> Exception | None:
        self._nowhere.write(b"")
        pickler = ByValuePickler(self._nowhere, PROTOCOL, lambda buffer: None)
        # What leads back up counts as done. Without it a child that knows its parent would take the
        # blame for the parent's other children.
        pickler.memo = {id(one): (index, one) for index, one in enumerate(above)}
        try:
            pickler.dump(value)
        except _OutOfTime:
            raise
        except Exception as error:
            if is_interrupt(error):
                raise
            return error
        return None


def _recurses_itself(obj: Any) -> bool:
    try:
        obj.__reduce_ex__(PROTOCOL)
    except Exception as error:
        return isinstance(error, RecursionError)
    return False


def _type_name(value: object) -> str:
    kind = type(value)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{prefix}{kind.__qualname__}"


def _reason(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _advice(path: str, value: object, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "It is nested too deeply: make it flatter, or raise sys.setrecursionlimit()."
    if isinstance(value, _WITHOUT_ITEMS):
        return "Pass on what it yields or returns, as a list for example."
    instead = "Return plain data instead" if path.startswith("result") else "Make it in the worker"
    return f"{instead}, or leave it out of what its owner pickles (__getstate__)."
