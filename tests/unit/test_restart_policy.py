"""When a group starts again, as lists of moments."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise import Restart
from rankwise._restart import CALM, LONGEST, Policy


def test_without_terms_nothing_starts_again() -> None:
    assert Policy(None).failed(0.0) is None


def test_a_limit_is_a_limit_failed_starts_included() -> None:
    policy = Policy(Restart(2, 0.0))
    assert [policy.failed(0.0), policy.failed(1.0), policy.failed(2.0)] == [0.0, 0.0, None]
    assert (policy.used, policy.count()) == (2, "2 of 2")


def test_none_is_no_limit() -> None:
    policy = Policy(Restart(None, 0.5))
    assert all(policy.failed(0.0) is not None for _ in range(100))
    assert policy.count() == "100"


def test_the_back_off_doubles_up_to_a_minute() -> None:
    policy = Policy(Restart(None, 1.0))
    waits = [policy.failed(float(at)) for at in range(80)]
    assert waits[:8] == [1, 2, 4, 8, 16, 32, LONGEST, LONGEST]
    assert waits[-1] == LONGEST


def test_a_back_off_that_is_longer_stays_as_it_was_asked_for() -> None:
    policy = Policy(Restart(None, 600.0))
    assert [policy.failed(0.0), policy.failed(1.0)] == [600.0, 600.0]


def test_a_group_that_was_ready_for_a_while_begins_with_the_shortest_again() -> None:
    policy = Policy(Restart(None, 1.0))
    assert [policy.failed(0.0), policy.failed(1.0)] == [1.0, 2.0]
    policy.ready(10.0)
    assert policy.failed(10.0 + CALM / 2) == 4.0
    policy.ready(100.0)
    assert policy.failed(100.0 + CALM) == 1.0


def test_the_limit_counts_over_the_whole_life() -> None:
    policy = Policy(Restart(1, 0.0))
    policy.failed(0.0)
    policy.ready(0.0)
    assert policy.failed(10 * CALM) is None


@pytest.mark.parametrize(
    ("terms", "kind", "names"),
    [
        ({"max_restarts": -1}, ValueError, "max_restarts"),
        ({"max_restarts": 1.5}, TypeError, "max_restarts"),
        ({"backoff": -1.0}, ValueError, "backoff"),
        ({"backoff": float("inf")}, ValueError, "backoff"),
        ({"backoff": "1"}, TypeError, "backoff"),
        ({"on_restart": "reload"}, TypeError, "on_restart"),
    ],
)
def test_wrong_terms_are_refused_by_name(
    terms: dict[str, Any], kind: type[Exception], names: str
) -> None:
    with pytest.raises(kind, match=names):
        Restart(**terms)
