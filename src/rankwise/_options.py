"""What a view of a group is made of: some of its ranks, and the options of its calls."""

from __future__ import annotations

import operator
from typing import Any

from rankwise._checks import at_least, choice, is_list, seconds, wrong_type, wrong_value
from rankwise._deadline import check_timeout, clock

NEVER = float("inf")
KEEP: Any = object()  # an option that is left as it is


class Options:
    """The options of a view's calls. Nobody changes one."""

    __slots__ = (
        "grace", "on_error", "reply_from", "return_exceptions", "slow_after", "timeout",
    )  # fmt: skip

    def __init__(
        self,
        timeout: float | None = None,
        reply_from: int | None = None,
        return_exceptions: bool = False,
        on_error: str | None = None,
        grace: float = 30.0,
        slow_after: float | None = None,
    ) -> None:
        self.timeout = timeout
        self.reply_from = reply_from
        self.return_exceptions = return_exceptions
        self.on_error = on_error  # None: "fail" for several ranks, "continue" for one
        self.grace = grace
        self.slow_after = slow_after  # seconds; None: the group's own (`_slow.py`); inf: never

    def slow(self) -> tuple[float, float] | tuple[()] | None:
        """`slow_after` of a call that is made now, as `Call.slow` has it."""
        if self.slow_after is None:
            return None
        return (clock() + self.slow_after, self.slow_after) if self.slow_after < NEVER else ()

    def changed(
        self,
        ranks: tuple[int, ...],
        timeout: object,
        reply_from: object,
        return_exceptions: object,
        on_error: object,
        grace: object,
        slow_after: object,
    ) -> Options:
        """These options with others, checked; KEEP leaves one as it is."""
        return Options(
            self.timeout if timeout is KEEP else check_timeout(timeout),
            self.reply_from if reply_from is KEEP else check_reply_from(reply_from, ranks),
            self.return_exceptions
            if return_exceptions is KEEP
            else _check_bool("return_exceptions", return_exceptions),
            self.on_error
            if on_error is KEEP
            else choice("on_error", ("fail", "continue"), on_error),
            self.grace
            if grace is KEEP
            else seconds("grace", "a finite number of seconds, 0 or more", grace, zero=True),
            self.slow_after if slow_after is KEEP else _check_slow_after(slow_after),
        )

    def narrowed(self, ranks: tuple[int, ...]) -> Options:
        """The options for a part of a view: a `reply_from` that is not in it is dropped."""
        if self.reply_from is None or self.reply_from in ranks:
            return self
        return Options(
            self.timeout, None, self.return_exceptions, self.on_error, self.grace, self.slow_after
        )


DEFAULTS = Options()


def _check_slow_after(slow_after: object) -> float | None:
    if slow_after is None:
        return None
    if check_timeout(slow_after, "slow_after") is None:
        return NEVER  # what no clock reaches is never
    return seconds("slow_after", "seconds above 0, or None", slow_after, zero=False)


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value)
    return value


def check_reply_from(
    reply_from: object, ranks: tuple[int, ...], name: str = "reply_from"
) -> int | None:
    """`reply_from` as a rank of the view `ranks`, or None."""
    if reply_from is None:
        return None
    rank = at_least(0, name, "a rank of the view", reply_from)
    if rank not in ranks:
        raise wrong_value(name, f"a rank of the view {list(ranks)}", reply_from)
    return rank


def pick(ranks: tuple[int, ...], index: object) -> int | tuple[int, ...]:
    """The rank, or the ranks, at `index`: an int, a slice or a list of ints, positions in `ranks`.

    Raises TypeError, IndexError for what is out of range or empty, ValueError for a repetition.
    """
    if isinstance(index, slice):
        picked = ranks[index]
        if not picked:
            raise IndexError(f"no rank at {_slice_text(index)}: the view has {len(ranks)} ranks")
        return picked
    if is_list(index):
        places = [_place(item, len(ranks)) for item in index]
        if not places:
            raise IndexError("an empty list of indices picks no rank")
        if len(set(places)) != len(places):
            raise ValueError(f"an index is repeated in {list(index)!r}")
        return tuple(ranks[place] for place in places)
    return ranks[_place(index, len(ranks))]


def _place(index: Any, size: int) -> int:
    try:
        place = operator.index(index)
    except TypeError:
        place = None
    if place is None or isinstance(index, bool):
        raise TypeError(f"an index must be an int, a slice or a list of ints, not {index!r}")
    if not -size <= place < size:
        raise IndexError(f"index {place} is out of range: the view has {size} ranks")
    return place % size


def _slice_text(index: slice) -> str:
    parts = [index.start, index.stop] + ([] if index.step is None else [index.step])
    return "[" + ":".join("" if part is None else str(part) for part in parts) + "]"
