"""The status page: one page a rank, in one memory that both sides see."""

from __future__ import annotations

import os

import pytest

from rankwise._status import (
    BELL,
    CANCELLED,
    DONE,
    LINE,
    NEXT_CANCEL,
    PAGE,
    PHASE,
    PHASES,
    POLLS,
    PORT,
    READY,
    RING,
    RUNNING,
    SINCE,
    WORDS,
    News,
    StatusPage,
    is_cancelled,
    make_status,
)


@pytest.fixture
def pages():
    made = StatusPage(3)
    yield made
    made.close()


def test_it_starts_with_zeros(pages):
    assert all(word == 0 for rank in range(3) for word in pages.words(rank))


def test_each_rank_has_a_page_of_its_own(pages):
    for rank in range(3):
        pages.words(rank)[RUNNING] = 10 + rank
    assert [pages.get(rank, RUNNING) for rank in range(3)] == [10, 11, 12]
    assert len(pages.words(1)) == WORDS == PAGE // 8


def test_phases_in_order(pages):
    assert PHASES == ("spawn", "import", "construct", "ready", "exit")
    assert PHASES[READY] == "ready"
    assert PHASES[pages.get(1, PHASE)] == "spawn"


def test_two_mappings_of_one_descriptor_see_the_same():
    fd = make_status(2)
    try:
        assert os.fstat(fd).st_size == 3 * PAGE  # two ranks, and their news
        assert not os.get_inheritable(fd)
        driver, worker = StatusPage(2, fd), StatusPage(2, fd)
    finally:
        os.close(fd)
    worker.words(1)[DONE] = (1 << 64) - 1
    assert driver.get(1, DONE) == (1 << 64) - 1
    assert driver.get(0, DONE) == 0
    driver.close()
    worker.close()


@pytest.mark.parametrize("ranks", [1, 64, 65])
def test_news_follow_the_pages_of_the_ranks_with_a_line_for_each(ranks):
    fd = make_status(ranks)
    try:
        pages, driver, worker = StatusPage(ranks, fd), News(ranks, fd), News(ranks, fd)
        before = driver.look()
        worker.words[(ranks - 1) * LINE] = 7
        assert driver.look() != before
        assert driver.words[(ranks - 1) * LINE] == 7
        assert all(word == 0 for rank in range(ranks) for word in pages.words(rank))
        assert len(before) == ranks * LINE * 8
    finally:
        os.close(fd)
    pages.close()
    driver.close()
    worker.close()


def test_what_one_side_polls_and_the_other_writes_shares_no_line_with_anything_else():
    others = {PHASE, RUNNING, SINCE, DONE, PORT, NEXT_CANCEL, POLLS, CANCELLED}
    assert BELL // LINE not in {word // LINE for word in others}


def test_a_cancelled_call_is_found_by_its_rank_alone(pages):
    pages.cancel(1, 77)
    assert is_cancelled(pages.words(1), 77)
    assert not is_cancelled(pages.words(0), 77)
    assert not is_cancelled(pages.words(1), 76)


def test_as_many_are_kept_as_the_ring_holds(pages):
    words = pages.words(2)
    for call in range(1, RING + 11):
        pages.cancel(2, call)
    assert not is_cancelled(words, 10)
    assert all(is_cancelled(words, call) for call in range(11, RING + 11))
    assert words[NEXT_CANCEL] == RING + 10
    assert CANCELLED + RING == WORDS


def test_the_ring_holds_more_than_is_ever_under_way():
    from rankwise._ledger import WINDOW_CALLS

    assert RING > WINDOW_CALLS


def test_a_ring_that_is_full_leaves_the_next_page_alone(pages):
    for call in range(1, 3 * RING):
        pages.cancel(0, call)
    assert all(word == 0 for word in pages.words(1))


def test_no_call_is_call_zero(pages):
    """An idle rank's RUNNING is 0, and the ring's empty places are 0 too: ids begin with 1."""
    from rankwise._calls import Call
    from rankwise._ledger import Ledger

    ledger = Ledger(1)
    call = Call("m", b"", (0,))
    ledger.place((call,))
    assert call.id == 1
