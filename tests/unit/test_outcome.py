"""A value or Failed: a user's exception as a value, as bytes, and as an exception again."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading

import pytest

from rankwise._outcome import Failed, capture, encode_failure, failed_at, failure, format_traceback
from rankwise.errors import RemoteError


def fail(error):
    raise error


def travel(error, rank=3, pid=41, method="Shard.forward"):
    """`error` as a worker raises it and a driver gets it."""
    outcome = capture(fail, error)
    assert isinstance(outcome, Failed)
    return failure(encode_failure(outcome), rank, pid, method)


def test_a_value_is_itself():
    assert capture(lambda a, b: a + b, 1, 2) == 3


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(),
                                   GeneratorExit(), StopIteration(1)])  # fmt: skip
def test_whatever_is_raised_is_a_value(error):
    outcome = capture(fail, error)
    assert isinstance(outcome, Failed)
    assert outcome.error is error


def test_wrong_arguments_are_a_failure_too():
    assert isinstance(capture(lambda: 0, 1), Failed)


def test_an_exception_arrives_with_type_args_note_and_cause():
    error = travel(ValueError("bad", 7))
    assert type(error) is ValueError
    assert error.args == ("bad", 7)
    assert error.__notes__ == ["rank 3 (pid 41) in Shard.forward"]
    cause = error.__cause__
    assert type(cause) is RemoteError
    assert (cause.rank, cause.pid, cause.method) == (3, 41, "Shard.forward")
    assert cause.type_name == "ValueError"
    assert cause.args == ("rank 3 (pid 41) in Shard.forward: ValueError: ('bad', 7)",)
    assert cause.remote_traceback.startswith("Traceback (most recent call last):\n")
    assert cause.remote_traceback.endswith("ValueError: ('bad', 7)\n")
    assert "in fail\n" in cause.remote_traceback
    assert "in capture" not in cause.remote_traceback


def test_an_exception_without_a_message():
    assert str(travel(ValueError()).__cause__).splitlines()[0] == (
        "rank 3 (pid 41) in Shard.forward: ValueError"
    )


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (SystemExit(3), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(1), "StopIteration"),
        (StopAsyncIteration(), "StopAsyncIteration"),
        (asyncio.CancelledError(), "asyncio.exceptions.CancelledError"),
        (concurrent.futures.CancelledError(), "concurrent.futures._base.CancelledError"),
        (BaseExceptionGroup("g", [SystemExit(1)]), "BaseExceptionGroup"),
    ],
)
def test_what_must_not_be_raised_here_is_a_remote_error(error, name):
    arrived = travel(error)
    assert type(arrived) is RemoteError
    assert arrived.type_name == name
    assert arrived.__cause__ is None
    assert str(arrived).startswith(f"rank 3 (pid 41) in Shard.forward: {name}")


def test_what_cannot_be_pickled_is_a_remote_error():
    arrived = travel(ValueError(threading.Lock()))
    assert type(arrived) is RemoteError
    assert arrived.type_name == "ValueError"
    assert "unlocked _thread.lock object" in str(arrived)


class Textless(Exception):
    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


def test_what_has_no_text_arrives():
    arrived = travel(Textless())
    assert "(its message could not be made)" in str(arrived.__cause__ or arrived)


class Changing(Exception):
    """Is rebuilt as something else."""

    def __reduce__(self):
        return ValueError, ("other",)


def test_what_is_rebuilt_as_something_else_is_a_remote_error():
    arrived = travel(Changing("x"))
    assert type(arrived) is RemoteError
    assert arrived.type_name.endswith("test_outcome.Changing")


def test_exception_groups_arrive_whole():
    arrived = travel(ExceptionGroup("several", [ValueError(1), KeyError("k")]))
    assert type(arrived) is ExceptionGroup
    assert [type(error) for error in arrived.exceptions] == [ValueError, KeyError]


def test_each_time_it_is_a_new_exception():
    body = encode_failure(Failed(ValueError("x")))
    assert failure(body, 0, 1, "m") is not failure(body, 0, 1, "m")


def test_the_moment_of_a_failure_travels():
    first = Failed(ValueError())
    second = Failed(ValueError())
    assert failed_at(encode_failure(first)) == first.when
    assert first.when <= second.when


def test_a_traceback_of_any_depth_travels():
    def deep(n):
        return deep(n + 1)

    outcome = capture(deep, 0)
    arrived = failure(encode_failure(outcome), 0, 1, "deep")
    assert type(arrived) is RecursionError
    assert "RecursionError" in arrived.__cause__.remote_traceback


def test_a_traceback_is_told_where_nothing_can_be_imported(monkeypatch):
    """A rank that is out of descriptors must still say what has failed, and where."""
    monkeypatch.setitem(sys.modules, "traceback", None)

    def fails():
        raise ValueError("no")

    text = format_traceback(capture(fails).error)
    first, place, last = text.splitlines()
    assert first == "Traceback (most recent call last):"
    assert place.startswith(f'  File "{__file__}", line ') and place.endswith(" in fails")
    assert last == "ValueError (its traceback could not be written in full)"
