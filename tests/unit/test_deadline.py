"""One clock; a timeout becomes a deadline once and never goes negative."""

from __future__ import annotations

import math

import pytest

from rankwise import _deadline
from rankwise._deadline import check_timeout, deadline, left


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(_deadline, "clock", lambda: 100.0)


def test_no_limit_stays_none():
    assert deadline(None) is None
    assert left(None) is None
    assert check_timeout(None) is None


def test_a_deadline_is_so_many_seconds_from_now():
    assert deadline(2.5) == 102.5
    assert deadline(0) == 100.0


def test_a_negative_timeout_is_now():
    assert deadline(-5) == 100.0


def test_what_is_left_is_never_negative():
    assert left(101.5) == 1.5
    assert left(100.0) == 0.0
    assert left(50.0) == 0.0


@pytest.mark.parametrize(("given", "seconds"), [(3, 3.0), (0, 0.0), (0.5, 0.5), (-1, -1.0)])
def test_numbers_are_seconds(given, seconds):
    checked = check_timeout(given)
    assert checked == seconds
    assert type(checked) is float


@pytest.mark.parametrize("given", [math.inf, 1e10, 10**30])
def test_what_no_clock_reaches_is_no_limit(given):
    assert check_timeout(given) is None


@pytest.mark.parametrize("given", ["3", True, False, [3], b"3", 3j, object])
def test_what_is_no_number_is_a_type_error(given):
    with pytest.raises(TypeError) as caught:
        check_timeout(given)
    assert str(caught.value) == f"timeout must be seconds (a number) or None, not {given!r}"


def test_nan_is_a_value_error():
    with pytest.raises(ValueError, match=r"^timeout must be seconds \(a number\) or None, not n"):
        check_timeout(math.nan)


def test_the_error_names_the_argument():
    with pytest.raises(TypeError, match=r"^patience must be seconds"):
        check_timeout("x", "patience")
