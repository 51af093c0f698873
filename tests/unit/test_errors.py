"""The tree of errors: what each is, what it carries, and that all of it survives pickle."""

from __future__ import annotations

import copy
import pickle
import traceback
from concurrent.futures import BrokenExecutor

import pytest

import rankwise
from rankwise import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    RemoteError,
    SerializationError,
    StartupError,
    StartupTimeout,
    WorkerDied,
    WorkerGroupError,
    errors,
)
from rankwise.errors import describe_exit, signal_name

PARENTS = [
    (WorkerGroupError, RuntimeError),
    (StartupError, WorkerGroupError),
    (StartupTimeout, StartupError),
    (StartupTimeout, TimeoutError),
    (GroupBroken, WorkerGroupError),
    (GroupBroken, BrokenExecutor),
    (WorkerDied, GroupBroken),
    (WorkerDied, ChildProcessError),
    (GroupClosed, WorkerGroupError),
    (RemoteError, WorkerGroupError),
    (CallTimeout, WorkerGroupError),
    (CallTimeout, TimeoutError),
    (SerializationError, WorkerGroupError),
    (SerializationError, TypeError),
]

UNRELATED = [
    (GroupClosed, GroupBroken),
    (CallTimeout, GroupBroken),
    (StartupError, GroupBroken),
    (RemoteError, GroupBroken),
    (StartupError, TimeoutError),
]


@pytest.mark.parametrize(("child", "parent"), PARENTS)
def test_is_a(child, parent):
    assert issubclass(child, parent)


@pytest.mark.parametrize(("child", "parent"), UNRELATED)
def test_is_not_a(child, parent):
    assert not issubclass(child, parent)


@pytest.mark.parametrize("name", errors.__all__)
def test_all_are_importable_from_rankwise(name):
    assert getattr(rankwise, name) is getattr(errors, name)
    assert name in rankwise.__all__


def remote() -> RemoteError:
    return RemoteError(
        "rank 3 (pid 41) in Shard.forward: ValueError: bad",
        rank=3,
        pid=41,
        method="Shard.forward",
        type_name="ValueError",
        remote_traceback="Traceback (most recent call last):\nValueError: bad\n",
    )


def died() -> WorkerDied:
    return WorkerDied(
        "rank 1 died",
        rank=1,
        pid=42,
        exitcode=-9,
        oom_killed=True,
        method="forward",
        call_id=7,
        log_tail="last words",
        stack="File ...",
        peak_rss=1 << 30,
    )


EXAMPLES = {
    "WorkerGroupError": (lambda: WorkerGroupError("a"), {}),
    "StartupError": (
        lambda: StartupError("a", rank=1, phase="construct", exitcode=3, log_tail="t"),
        {"rank": 1, "phase": "construct", "exitcode": 3, "exit_status": 3, "log_tail": "t"},
    ),
    "StartupTimeout": (
        lambda: StartupTimeout(
            "a",
            phases={0: "import", 2: "spawn"},
            stacks={0: "File ...", 2: None},
            last_lines={0: "loading", 2: ""},
            rank=0,
            phase="import",
        ),
        {
            "phases": {0: "import", 2: "spawn"},
            "stacks": {0: "File ...", 2: None},
            "last_lines": {0: "loading", 2: ""},
            "rank": 0,
            "phase": "import",
            "exitcode": None,
        },
    ),
    "GroupBroken": (
        lambda: GroupBroken("a", stacks={1: "File ...", 2: None}),
        {"first": None, "stacks": {1: "File ...", 2: None}},
    ),
    "WorkerDied": (
        died,
        {
            "rank": 1,
            "pid": 42,
            "exitcode": -9,
            "signal": 9,
            "oom_killed": True,
            "method": "forward",
            "call_id": 7,
            "log_tail": "last words",
            "stack": "File ...",
            "peak_rss": 1 << 30,
        },
    ),
    "GroupClosed": (lambda: GroupClosed("a"), {}),
    "RemoteError": (
        remote,
        {
            "rank": 3,
            "pid": 41,
            "method": "Shard.forward",
            "type_name": "ValueError",
            "remote_traceback": "Traceback (most recent call last):\nValueError: bad\n",
        },
    ),
    "CallTimeout": (
        lambda: CallTimeout(
            "a",
            method="load",
            answered=[0],
            missing=[1, 2],
            states={1: "running", 2: "stopped"},
            seconds={1: 2.5, 2: 0.0},
            cpu={1: 0.5, 2: None},
            stacks={1: "File ...", 2: None},
            reasons={2: "it is stopped"},
            last_lines={1: "loading", 2: ""},
        ),
        {
            "method": "load",
            "answered": (0,),
            "missing": (1, 2),
            "states": {1: "running", 2: "stopped"},
            "seconds": {1: 2.5, 2: 0.0},
            "cpu": {1: 0.5, 2: None},
            "stacks": {1: "File ...", 2: None},
            "reasons": {2: "it is stopped"},
            "last_lines": {1: "loading", 2: ""},
        },
    ),
    "SerializationError": (
        lambda: SerializationError("a", "args[0]['cfg'].lock"),
        {"path": "args[0]['cfg'].lock"},
    ),
}


def test_every_class_has_an_example():
    assert set(EXAMPLES) == set(errors.__all__)


@pytest.fixture(params=sorted(EXAMPLES))
def example(request):
    make, fields = EXAMPLES[request.param]
    return make(), fields


def assert_same(again, error, fields):
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    for name, value in fields.items():
        assert getattr(again, name) == value, name


def test_fields(example):
    error, fields = example
    assert_same(error, error, fields)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_survives_pickle(example, protocol):
    error, fields = example
    assert_same(pickle.loads(pickle.dumps(error, protocol)), error, fields)


def test_it_survives_copy(example):
    error, fields = example
    assert_same(copy.copy(error), error, fields)
    assert_same(copy.deepcopy(error), error, fields)


def test_its_cause_and_notes_survive_pickle(example):
    error, fields = example
    error.__cause__ = remote()
    error.add_note("while loading")
    again = pickle.loads(pickle.dumps(error))
    assert_same(again, error, fields)
    assert again.__notes__ == ["while loading"]
    assert type(again.__cause__) is RemoteError
    assert again.__cause__.rank == 3
    assert "while loading" in "".join(traceback.format_exception(again))


def test_it_survives_pickle_with_the_failures_that_a_caller_finds_on_it(example):
    error, fields = example
    other = GroupClosed("other")
    error.failures = {0: error, 1: other}
    again = pickle.loads(pickle.dumps(error))
    assert_same(again, error, fields)
    assert again.failures[0] is again
    assert type(again.failures[1]) is GroupClosed


def test_it_survives_pickle_twice(example):
    error, fields = example
    once = pickle.loads(pickle.dumps(error))
    assert_same(pickle.loads(pickle.dumps(once)), error, fields)


def test_a_chain_of_causes_survives_pickle():
    broken = GroupBroken("broken", first=died())
    outer = StartupError("outer")
    outer.__cause__ = broken
    again = pickle.loads(pickle.dumps(outer))
    assert type(again.__cause__) is GroupBroken
    assert type(again.__cause__.first) is WorkerDied
    assert again.__cause__.first.exitcode == -9


def test_first_is_the_cause_of_a_broken_group():
    first = ValueError("x")
    error = GroupBroken("broken", first=first)
    assert error.first is first
    assert error.__cause__ is first
    again = pickle.loads(pickle.dumps(error))
    assert type(again.first) is ValueError
    assert again.first is again.__cause__


def test_a_worker_that_died_is_its_own_first_cause():
    error = died()
    assert error.first is error
    assert pickle.loads(pickle.dumps(error)).first.rank == 1
    again = pickle.loads(pickle.dumps(error))
    assert again.first is again
    "".join(traceback.format_exception(again))


@pytest.mark.parametrize(
    ("exitcode", "signal"), [(-9, 9), (-11, 11), (0, None), (3, None), (None, None)]
)
def test_signal_follows_from_the_exit_code(exitcode, signal):
    assert WorkerDied("x", exitcode=exitcode).signal == signal


def test_the_text_of_a_remote_error_has_the_remote_traceback():
    assert str(remote()) == (
        "rank 3 (pid 41) in Shard.forward: ValueError: bad\n\n"
        "Traceback (most recent call last):\nValueError: bad"
    )
    assert str(RemoteError("plain")) == "plain"


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (None, "ended (its exit status is not known)"),
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
    ],
)
def test_an_exit_in_words(exitcode, words):
    assert describe_exit(exitcode) == words


def test_the_name_of_a_signal():
    assert signal_name(15) == "SIGTERM"
    assert signal_name(99) == "signal 99"


def test_what_a_caller_gave_is_not_shared_with_the_error():
    phases = {0: "import"}
    error = StartupTimeout("x", phases=phases)
    phases[1] = "spawn"
    assert error.phases == {0: "import"}


@pytest.mark.parametrize(
    ("text", "line"),
    [("no", "no"), ("no\nmore", "no"), ("", ""), ("x" * 500, "x" * 300 + "... (500 characters)")],
)
def test_a_line_of_ours_is_no_longer_than_a_line(text, line):
    assert errors.first_line(text) == line
