"""Exceptions that resist: frozen ones, odd texts, and what is raised within an `except`."""

from __future__ import annotations

import signal
import threading

import pytest
from resistant_ranks import FailsToLoad, Frozen, Tells, Worker

from rankwise import RemoteError, SerializationError


@pytest.fixture
def group(make):
    return make(Worker, 2)


def test_an_exception_that_refuses_to_be_changed_arrives_with_its_cause(group):
    with pytest.raises(Frozen) as caught:
        group.call(Worker.fails, Frozen, 3)
    assert caught.value.code == 3
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "in fails" in caught.value.__cause__.remote_traceback
    assert any("Worker.fails" in note for note in caught.value.__notes__)
    answers = group.options(return_exceptions=True).call(Worker.fails, Frozen, 4)
    assert [type(answer) for answer in answers] == [Frozen, Frozen]
    assert group.call(Worker.takes, 1) == [1, 1]


def test_it_may_be_raised_while_the_arguments_are_rebuilt(group):
    with pytest.raises(Frozen) as caught:
        group.call(Worker.takes, FailsToLoad())
    assert any("while the arguments were rebuilt" in note for note in caught.value.__notes__)
    assert group.call(Worker.takes, 1) == [1, 1], "the ranks live on"


def test_it_may_be_raised_while_the_result_is_rebuilt(group):
    with pytest.raises(RemoteError, match="could not be rebuilt in the driver: Frozen"):
        group.call(Worker.makes)


def test_a_text_that_is_more_than_a_str_is_told_as_one(group):
    with pytest.raises(Tells) as caught:
        group.call(Worker.fails, Tells)
    assert isinstance(caught.value.__cause__, RemoteError)
    assert str(caught.value.__cause__).endswith("Tells: told")


def test_what_is_raised_inside_an_except_of_the_caller_is_not_the_handlers(group):
    """The alarm that is being dealt with is over: no later error is an interrupt because of it."""

    class Alarm(Exception):
        pass

    def handler(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.raise_signal(signal.SIGALRM)
    except Alarm:
        with pytest.raises(SerializationError, match=r"args\[0\]"):
            group.call(Worker.takes, threading.Lock())
        with pytest.raises(RemoteError, match="could not be rebuilt"):
            group.call(Worker.makes)
    finally:
        signal.signal(signal.SIGALRM, before)
