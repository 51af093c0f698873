"""group[i], group[a:b], group[[...]]: which ranks, in which order, and in what shape."""

from __future__ import annotations

import pytest
from contract_worker import Worker


@pytest.mark.parametrize(("index", "rank"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_an_int_gives_one_rank_and_a_bare_value(group, index, rank):
    one = group[index]
    assert one.call(Worker.get_rank) == rank
    assert one.submit(Worker.get_rank).result() == rank
    assert one.rank == rank
    assert len(one) == 1
    assert repr(one) == f"<view of 'workers': ranks [{rank}]>"


@pytest.mark.parametrize(
    ("index", "ranks"),
    [
        (slice(0, 2), [0, 1]),
        (slice(1, None), [1, 2]),
        (slice(None), [0, 1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        (slice(0, 3, 2), [0, 2]),
        (slice(-2, None), [1, 2]),
        (slice(1, 100), [1, 2]),
        (slice(1, 2), [1]),
        ([0, 2], [0, 2]),
        ([2, 0], [2, 0]),
        ([-1], [2]),
        ((1, 0), [1, 0]),
        (range(2, -1, -1), [2, 1, 0]),
    ],
)
def test_a_slice_or_list_gives_a_list_in_the_views_order(group, index, ranks):
    view = group[index]
    assert view.call(Worker.get_rank) == ranks
    assert view.submit("get_rank").result() == ranks
    assert len(view) == len(ranks)
    assert repr(view) == f"<view of 'workers': ranks {ranks}>"


def test_an_index_is_a_position_in_the_view(group):
    assert group[1:][0].call(Worker.get_rank) == 1
    assert group[[2, 0]][0].call(Worker.get_rank) == 2
    assert group[[2, 0, 1]][1:].call(Worker.get_rank) == [0, 1]
    assert group[::-1][[0, 2]].call(Worker.get_rank) == [2, 0]
    assert group[::-1][-1].call(Worker.get_rank) == 0
    assert group[1][0].call(Worker.get_rank) == 1


def test_numpys_ints_are_ints(group):
    np = pytest.importorskip("numpy")
    assert group[np.int64(1)].call(Worker.get_rank) == 1
    assert group[[np.int32(2), 0]].call(Worker.get_rank) == [2, 0]


def test_iterating_gives_the_one_rank_handles(group):
    assert [one.call(Worker.get_rank) for one in group] == [0, 1, 2]
    assert [one.rank for one in group[1:]] == [1, 2]
    assert len(group) == 3


def test_only_the_ranks_of_a_view_run_its_calls(group):
    group.call(Worker.take_seen)
    group[[0, 2]].call(Worker.note, "x")
    assert group.call(Worker.take_seen) == [["x"], [], ["x"]]


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (3, IndexError, "index 3 is out of range: the view has 3 ranks"),
        (-4, IndexError, "index -4 is out of range: the view has 3 ranks"),
        ([0, 3], IndexError, "index 3 is out of range: the view has 3 ranks"),
        ([], IndexError, "an empty list of indices picks no rank"),
        (slice(2, 2), IndexError, "no rank at [2:2]: the view has 3 ranks"),
        (slice(5, None), IndexError, "no rank at [5:]: the view has 3 ranks"),
        (slice(None, 0, 2), IndexError, "no rank at [:0:2]: the view has 3 ranks"),
        ([0, 0], ValueError, "an index is repeated in [0, 0]"),
        ([0, -3], ValueError, "an index is repeated in [0, -3]"),
        ("0", TypeError, "an index must be an int, a slice or a list of ints, not '0'"),
        (1.0, TypeError, "an index must be an int, a slice or a list of ints, not 1.0"),
        (True, TypeError, "an index must be an int, a slice or a list of ints, not True"),
        (None, TypeError, "an index must be an int, a slice or a list of ints, not None"),
        ([0, "1"], TypeError, "an index must be an int, a slice or a list of ints, not '1'"),
        ([[0]], TypeError, "an index must be an int, a slice or a list of ints, not [0]"),
    ],
)
def test_a_wrong_index_says_what_would_be_right(group, index, kind, message):
    with pytest.raises(kind) as caught:
        group[index]
    assert str(caught.value) == message


def test_a_slice_with_a_step_of_zero_is_an_error(group):
    with pytest.raises(ValueError, match="zero"):
        group[::0]


def test_a_wrong_index_of_a_view_counts_its_own_ranks(group):
    with pytest.raises(IndexError, match="index 2 is out of range: the view has 2 ranks"):
        group[1:][2]


def test_an_array_of_indices_is_refused_or_works_but_never_in_between(group):
    np = pytest.importorskip("numpy")
    try:
        view = group[np.array([0, 2])]
    except TypeError as error:
        assert "an index must be" in str(error)
    else:
        assert view.call(Worker.get_rank) == [0, 2]


def test_a_view_keeps_its_group_alive(make):
    one = make()[1]
    assert one.call(Worker.get_rank) == 1
