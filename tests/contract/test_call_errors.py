"""What a worker raises, and what its caller catches."""

from __future__ import annotations

import logging
import pickle
import re
import threading
import time

import pytest
from contract_worker import (
    AtHome,
    CancelledError,
    Loud,
    Picky,
    Worker,
)

from rankwise import CallTimeout, RemoteError, SerializationError, WorkerGroupError


def test_the_same_type_and_args_arrive(group):
    with pytest.raises(ValueError) as caught:
        group.call(Worker.fail, ValueError, "bad", 7)
    assert type(caught.value) is ValueError
    assert caught.value.args == ("bad", 7)


def test_the_cause_is_a_remote_error_with_its_fields(group):
    with pytest.raises(ValueError) as caught:
        group[1].call(Worker.fail, ValueError, "bad")
    cause = caught.value.__cause__
    assert type(cause) is RemoteError
    assert cause.rank == 1
    assert cause.pid == group.pids[1]
    assert cause.type_name == "ValueError"
    assert cause.method.endswith("fail")
    text = cause.remote_traceback
    assert text.startswith("Traceback (most recent call last):")
    assert "raise kind(*args)" in text
    assert text.rstrip().endswith("ValueError: bad")
    assert text.count("  File ") == 1, "our own frames are not the reader's business"
    assert text.rstrip() in str(cause)


def test_a_note_says_where_it_happened(group):
    with pytest.raises(ValueError) as caught:
        group[2].call(Worker.fail, ValueError, "bad")
    (note,) = caught.value.__notes__
    assert note.startswith(f"rank 2 (pid {group.pids[2]}) in ")
    assert note.endswith("fail")


def test_the_note_names_the_class_and_the_method(group):
    with pytest.raises(ValueError) as caught:
        group[2].call(Worker.fail, ValueError, "bad")
    assert caught.value.__notes__ == [f"rank 2 (pid {group.pids[2]}) in Worker.fail"]


def test_the_note_of_what_was_sent_by_value_names_it(group):
    with pytest.raises(ZeroDivisionError) as caught:
        group[0].call(lambda worker: 1 / 0)
    assert caught.value.__notes__ == [f"rank 0 (pid {group.pids[0]}) in <lambda>"]


def test_a_chain_of_causes_is_in_the_text(group):
    with pytest.raises(ValueError, match="outer") as caught:
        group[0].call(Worker.fail_with_cause)
    assert "KeyError: 'inner'" in caught.value.__cause__.remote_traceback
    assert "direct cause of the following exception" in caught.value.__cause__.remote_traceback


def test_notes_that_the_worker_added_arrive(group):
    def fail(worker):
        error = ValueError("x")
        error.add_note("mine")
        raise error

    with pytest.raises(ValueError) as caught:
        group[0].call(fail)
    assert caught.value.__notes__[0] == "mine"
    assert len(caught.value.__notes__) == 2


@pytest.fixture
def unhurried(monkeypatch):
    """Failures are gathered until all have answered, however long a slow machine takes."""
    monkeypatch.setattr("rankwise._ledger.FAILURE_PAUSE", 20.0)


def test_failures_has_every_rank_that_failed(group, unhurried):
    with pytest.raises(ValueError) as caught:
        group.call(Worker.fail, ValueError, "bad", ranks=[0, 2])
    failures = caught.value.failures
    assert sorted(failures) == [0, 2]
    assert all(type(error) is ValueError for error in failures.values())
    assert {error.__cause__.rank for error in failures.values()} == {0, 2}
    assert caught.value in failures.values()


def test_later_failures_are_a_line_each_on_the_first_and_alike_ones_share_it(
    group, gate, unhurried
):
    future = group.submit(Worker.fail_in_turn, gate.path)
    limit = time.monotonic() + 20
    while 1 not in future._call.answers:
        assert time.monotonic() < limit
        time.sleep(0.001)
    gate.open(0, 2)
    with pytest.raises(ValueError, match="the cause") as caught:
        future.result(timeout=20)
    first, *later = caught.value.__notes__
    assert first.startswith("rank 1 (pid ")
    assert len(later) == 1
    pattern = r"after it, [\d.]+ ms later, ranks [02], [02]: ConnectionError: a peer has gone"
    assert re.fullmatch(pattern, later[0])


def test_a_failure_long_after_the_first_is_logged_in_one_line(group, gate, caplog):
    with caplog.at_level(logging.WARNING, "rankwise"):
        with pytest.raises(ValueError, match="the cause"):
            group.call(Worker.fail_in_turn, gate.path)
        gate.open(0, 2)
        group.flush()
        waited = time.monotonic() + 20
        while len(caplog.records) < 2 and time.monotonic() < waited:
            time.sleep(0.01)
    texts = sorted(record.getMessage() for record in caplog.records)
    assert len(texts) == 2
    for rank, text in zip((0, 2), texts, strict=True):
        assert f"on rank {rank}" in text and "after the failure of rank 1" in text
        assert text.endswith("ConnectionError: a peer has gone")


def test_the_first_of_several_failures_is_raised(group, gate):
    view = group.options(on_error="continue")
    future = view.submit(Worker.fail_behind_gate, gate.path)
    gate.open(2)
    with pytest.raises(ValueError) as caught:
        future.result(timeout=20)
    assert caught.value.args == ("late", 2)
    assert list(caught.value.failures) == [2]
    gate.open(0, 1)
    group.flush()


def test_one_failing_while_the_others_wait_is_heard_of_at_once(group, gate):
    future = group.submit(Worker.fail_or_wait, [1], gate.path)
    with pytest.raises(ValueError) as caught:
        future.result(timeout=20)
    assert caught.value.args == ("no", 1)
    assert list(caught.value.failures) == [1]
    gate.open(0, 2)
    group.flush()
    assert group.call(Worker.get_rank) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "args", "name"),
    [
        (SystemExit, (3,), "SystemExit"),
        (KeyboardInterrupt, (), "KeyboardInterrupt"),
        (GeneratorExit, (), "GeneratorExit"),
        (BaseException, ("base",), "BaseException"),
        (StopIteration, (4,), "StopIteration"),
        (StopAsyncIteration, (), "StopAsyncIteration"),
    ],
)
def test_what_must_not_travel_arrives_as_a_remote_error(group, kind, args, name):
    with pytest.raises(RemoteError) as caught:
        group[1].call(Worker.fail, kind, *args)
    error = caught.value
    assert type(error) is RemoteError
    assert error.type_name == name
    assert (error.rank, error.pid) == (1, group.pids[1])
    assert str(error).startswith(f"rank 1 (pid {group.pids[1]}) in ")
    assert f"fail: {name}" in str(error).splitlines()[0]
    assert "raise kind(*args)" in error.remote_traceback
    assert group.call(Worker.get_rank) == [0, 1, 2], "the worker lives on"


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("asyncio", "asyncio.exceptions.CancelledError"),
        ("futures", "concurrent.futures._base.CancelledError"),
    ],
)
def test_a_cancellation_over_there_is_not_one_here(group, name, type_name):
    with pytest.raises(RemoteError) as caught:
        group[0].call(Worker.fail_by_name, name)
    assert caught.value.type_name == type_name
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_users_own_class_named_cancelled_error_is_raised_as_it_is(group):
    with pytest.raises(CancelledError, match="gone"):
        group[0].call(Worker.fail_by_name, "own")


def test_a_subclass_of_a_cancellation_is_one_too(group):
    def fail(worker):
        import concurrent.futures

        class Gone(concurrent.futures.CancelledError):
            pass

        raise Gone

    with pytest.raises(RemoteError, match="Gone"):
        group[0].call(fail)


def test_what_arrives_as_a_remote_error_survives_pickle(group):
    with pytest.raises(RemoteError) as caught:
        group.call(Worker.fail, SystemExit, 3)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is RemoteError
    assert again.args == caught.value.args
    assert again.type_name == "SystemExit"
    assert sorted(again.failures) == sorted(caught.value.failures)


def test_an_exception_that_cannot_be_pickled_arrives_as_a_remote_error(group):
    with pytest.raises(RemoteError) as caught:
        group[0].call(Worker.fail_with, "lock")
    assert caught.value.type_name == "contract_worker.Holding"
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_an_exception_with_an_init_of_its_own_arrives_whole(group):
    with pytest.raises(Picky) as caught:
        group[0].call(Worker.fail_with, "picky")
    assert (caught.value.number, caught.value.word) == (3, "x")
    assert str(caught.value) == "3 x"


def test_an_exception_that_cannot_be_rebuilt_here_arrives_as_a_remote_error(group):
    with pytest.raises(RemoteError) as caught:
        group[0].call(Worker.fail_with, "at home")
    assert caught.value.type_name == f"{AtHome.__module__}.AtHome"
    assert "only here" in str(caught.value)
    (note,) = caught.value.__notes__
    assert note.startswith("its own exception object could not be rebuilt here: RuntimeError(")
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_an_exception_without_a_text_arrives_all_the_same(group):
    with pytest.raises(Exception) as caught:
        group[0].call(Worker.fail_with, "nasty")
    assert "Nasty" in repr(caught.value) or "Nasty" in str(caught.value)
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_an_exception_of_a_class_made_in_the_call_arrives(group):
    def fail(worker):
        class Odd(Exception):
            pass

        raise Odd("one", 2)

    with pytest.raises(Exception) as caught:
        group[0].call(fail)
    assert type(caught.value).__name__ == "Odd"
    assert caught.value.args == ("one", 2)


def test_a_result_that_cannot_be_pickled_fails_that_call_only(group):
    with pytest.raises(SerializationError) as caught:
        group.call(Worker.give, "lock")
    assert caught.value.path == "result['cfg'][1]"
    assert "result['cfg'][1]" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert type(caught.value.__cause__) is RemoteError
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_result_that_cannot_be_rebuilt_fails_that_call_only(group):
    with pytest.raises(RemoteError) as caught:
        group[1].call(Worker.give, "at home")
    assert (caught.value.rank, caught.value.type_name) == (1, "RuntimeError")
    assert "could not be rebuilt in the driver: RuntimeError: worker_info() was" in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_an_argument_that_cannot_be_rebuilt_over_there_fails_that_call_only(group):
    class Bomb:
        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(ValueError, match="no number"):
        group.call(Worker.echo, Bomb())
    assert group.call(Worker.get_rank) == [0, 1, 2]


class Config:
    def __init__(self):
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        ((threading.Lock(),), {}, "args[0]"),
        ((1, {"cfg": Config()}), {}, "args[1]['cfg'].lock"),
        ((), {"deep": [0, (threading.Lock(),)]}, "kwargs['deep'][1][0]"),
    ],
)
def test_an_argument_that_cannot_travel_fails_before_anything_is_sent(group, args, kwargs, path):
    group.call(Worker.take_seen)
    for verb in (group.call, group.submit, group.submit_each, group[0].call):
        with pytest.raises(SerializationError) as caught:
            verb(Worker.note, *args, **kwargs)
        assert caught.value.path == path
        assert path in str(caught.value)
    assert group.call(Worker.take_seen) == [[], [], []], "no rank has run it"


def test_a_part_that_cannot_travel_fails_before_anything_is_sent(group):
    group.call(Worker.take_seen)
    with pytest.raises(SerializationError):
        group.scatter(Worker.note, [1, 2, threading.Lock()])
    assert group.call(Worker.take_seen) == [[], [], []]


def test_a_function_whose_closure_cannot_travel_names_the_method(group):
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="method"):
        group.call(lambda worker: lock)


def test_a_failure_that_nobody_fetched_is_logged_once(group, caplog):
    group.submit(Worker.fail, ValueError, "nobody asked", ranks=[1])
    group.flush()
    group.call(Worker.get_rank)

    def logged():
        return [r.getMessage() for r in caplog.records if "nobody asked" in r.getMessage()]

    limit = time.monotonic() + 20
    while not logged() and time.monotonic() < limit:
        group.call(Worker.get_rank)
    messages = logged()
    assert len(messages) == 1
    assert (
        "nobody fetched the exception of fail() on rank 1: ValueError: nobody asked" in messages[0]
    )


def test_a_failure_of_a_future_that_was_given_up_and_dropped_is_logged(group, gate, caplog):
    """Its waiter has kept it for as long as he waited, and nobody does after that."""
    future = group.submit(Worker.fail_behind_gate, gate.path)
    gate.entered(0, 1, 2)
    with pytest.raises(CallTimeout):
        future.result(0.01)
    del future
    gate.open(0, 1, 2)
    group.flush()
    limit = time.monotonic() + 20
    while "nobody fetched" not in caplog.text:
        assert time.monotonic() < limit
        group.call(Worker.get_rank)


def test_a_failure_that_was_fetched_is_not_logged(group, caplog):
    future = group.submit(Worker.fail, ValueError, "asked")
    assert isinstance(future.exception(), ValueError)
    del future
    group.call(Worker.get_rank)
    assert not caplog.records


def test_all_of_ours_are_worker_group_errors(group):
    with pytest.raises(WorkerGroupError):
        group.call(Worker.fail, SystemExit)
    assert issubclass(Loud, Worker)
