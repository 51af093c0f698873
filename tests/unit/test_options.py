"""The options of a view, and the ranks that an index picks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise._deadline import clock
from rankwise._options import DEFAULTS, KEEP, Options, pick

RANKS = (4, 2, 7)


def change(options, ranks=RANKS, **given):
    names = ("timeout", "reply_from", "return_exceptions", "on_error", "grace", "slow_after")
    assert set(given) <= set(names)
    return options.changed(ranks, *(given.get(name, KEEP) for name in names))


def fields(options):
    return (
        options.timeout,
        options.reply_from,
        options.return_exceptions,
        options.on_error,
        options.grace,
        options.slow_after,
    )


def test_defaults():
    assert fields(DEFAULTS) == (None, None, False, None, 30.0, None)


def test_what_is_not_given_stays():
    options = Options(5.0, 2, True, "fail", 1.0, 9.0)
    assert fields(change(options)) == fields(options)
    assert fields(change(options, timeout=None)) == (None, 2, True, "fail", 1.0, 9.0)
    assert fields(change(options, reply_from=7)) == (5.0, 7, True, "fail", 1.0, 9.0)
    assert fields(change(options, reply_from=None)) == (5.0, None, True, "fail", 1.0, 9.0)
    assert fields(change(options, return_exceptions=False)) == (5.0, 2, False, "fail", 1.0, 9.0)
    assert fields(change(options, on_error="continue")) == (5.0, 2, True, "continue", 1.0, 9.0)
    assert fields(change(options, grace=0)) == (5.0, 2, True, "fail", 0.0, 9.0)
    assert fields(change(options, slow_after=None)) == (5.0, 2, True, "fail", 1.0, None)
    assert fields(options) == (5.0, 2, True, "fail", 1.0, 9.0), "nobody changes one"


def test_slow_after_as_a_call_has_it():
    assert DEFAULTS.slow() is None, "the group's own limit"
    assert change(DEFAULTS, slow_after=float("inf")).slow() == (), "never"
    before = clock()
    when, seconds = change(DEFAULTS, slow_after=2).slow()
    assert seconds == 2.0
    assert before + 2.0 <= when <= clock() + 2.0


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_a_wrong_slow_after_names_the_option(value, error):
    with pytest.raises(error, match="slow_after must be"):
        change(DEFAULTS, slow_after=value)


@pytest.mark.parametrize("rank", [0, 1, 3, 99])
def test_reply_from_must_be_of_the_view(rank):
    with pytest.raises(ValueError) as caught:
        change(DEFAULTS, reply_from=rank)
    assert str(caught.value) == f"reply_from must be a rank of the view [4, 2, 7], not {rank}"


def test_a_part_drops_a_reply_from_that_is_not_in_it():
    options = Options(5.0, 2, True, "fail", 1.0, 9.0)
    assert fields(options.narrowed((2, 7))) == fields(options)
    assert fields(options.narrowed((4, 7))) == (5.0, None, True, "fail", 1.0, 9.0)
    assert fields(DEFAULTS.narrowed((1,))) == fields(DEFAULTS)


def test_an_int_picks_a_rank():
    assert [pick(RANKS, place) for place in (0, 1, 2, -1, -3)] == [4, 2, 7, 7, 4]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.data())
def test_a_slice_picks_as_from_a_tuple(size, data):
    ranks = tuple(range(10, 10 + size))
    index = data.draw(st.slices(size))
    if ranks[index]:
        assert pick(ranks, index) == ranks[index]
    else:
        with pytest.raises(IndexError, match=f"the view has {size} ranks"):
            pick(ranks, index)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.lists(st.integers(-12, 12), max_size=6))
def test_a_list_picks_in_its_order_or_says_why_not(size, index):
    ranks = tuple(range(10, 10 + size))
    if not index:
        error: type[Exception] | None = IndexError
    elif any(not -size <= place < size for place in index):
        error = IndexError
    elif len({place % size for place in index}) < len(index):
        error = ValueError
    else:
        error = None
    if error is None:
        assert pick(ranks, index) == tuple(ranks[place] for place in index)
    else:
        with pytest.raises(error):
            pick(ranks, index)
