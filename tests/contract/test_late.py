"""`Late`: a value that is made while the rank goes on with its next calls."""

from __future__ import annotations

import pytest
from late_ranks import Worker

from rankwise import Late, RemoteError, SerializationError


@pytest.fixture
def late(make):
    return make(Worker, 2)


def test_a_rank_goes_on_while_a_value_is_late(late):
    waiting = late.submit(Worker.late, "a", 5)
    assert late.call(Worker.open, "b") == [0, 1], "it was answered before the call before it"
    assert not waiting.done()
    late.call(Worker.open, "a")
    assert waiting.result(20) == [(0, 5), (1, 5)]


def test_late_values_come_in_the_order_of_their_calls(late):
    waiting = [late.submit(Worker.late, key, key) for key in "abc"]
    late.call(Worker.open, "c", "b")
    assert not any(future.done() for future in waiting)
    late.call(Worker.open, "a")
    assert [future.result(20)[1] for future in waiting] == [(1, "a"), (1, "b"), (1, "c")]
    assert late.call(Worker.get_order) == [["a", "b", "c"]] * 2


def test_a_late_value_of_one_rank_alone(late):
    waiting = late.options(reply_from=1).submit(Worker.late, "a", "x")
    late.call(Worker.open, "a")
    assert waiting.result(20) == (1, "x")
    assert late.call(Worker.get_order) == [["a"], ["a"]], "it is asked for on every rank"


def test_what_a_late_value_raises_is_the_callers(late):
    with pytest.raises(KeyError, match="late") as caught:
        late[1].call(Worker.fails)
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "Worker.fails" in caught.value.__notes__[0]
    with pytest.raises(RemoteError, match="SystemExit"):
        late.call(Worker.leaves)
    assert late.call(Worker.open) == [0, 1], "the ranks live on"


def test_the_call_is_known_where_its_late_value_is_made(late):
    plain = late[1].call(Worker.described)
    assert plain[1:4] == ("described", None, 1)
    assert "late" in plain[4]
    limited = late[1].options(timeout=50).call(Worker.described)
    assert 0 < limited[2] <= 50
    assert limited[0] > plain[0]


def test_a_late_value_that_cannot_travel_fails_its_call_alone(late):
    with pytest.raises(SerializationError):
        late[0].call(Worker.cannot_travel)
    assert late.call(Worker.open) == [0, 1]


def test_a_late_that_is_not_the_value_itself_is_refused(late):
    with pytest.raises(SerializationError, match="return it from a method, by itself"):
        late[0].call(Worker.hidden)


def test_a_late_value_may_be_large(late):
    assert list(map(len, late.call(Worker.large, 1 << 20))) == [1 << 20] * 2


def test_close_waits_for_what_is_late(make):
    group = make(Worker, 2)
    waiting = group.submit(Worker.late, "a", 7)
    group.submit(Worker.open, "a")
    group.close(20)
    assert waiting.result(0) == [(0, 7), (1, 7)]


def test_late_wants_something_to_call():
    with pytest.raises(TypeError, match="a callable without arguments, not int"):
        Late(5)  # type: ignore[arg-type]
