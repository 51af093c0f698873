"""What a group is made of, and what a start that fails leaves behind."""

from __future__ import annotations

import os
import pickle
import re

import pytest
from contract_worker import Failing, Managed, Worker, make_worker
from untold import explained

from rankwise import (
    GroupClosed,
    RemoteError,
    SerializationError,
    StartupError,
    StartupTimeout,
    WorkerGroup,
    per_rank,
)


def test_args_and_kwargs_reach_every_rank(group):
    assert group.call(Worker.made_with) == [(("a",), {"b": 2})] * 3


def test_per_rank_gives_each_rank_its_own(make):
    group = make(
        Worker, 3, args=per_rank([("x",), ("y",), ()]), kwargs=per_rank([{}, {"k": 1}, {"k": 2}])
    )
    assert group.call(Worker.made_with) == [(("x",), {}), (("y",), {"k": 1}), ((), {"k": 2})]


def test_per_rank_args_go_with_common_kwargs(make):
    group = make(args=per_rank([rank] for rank in range(2)), kwargs={"k": "all"})
    assert group.call(Worker.made_with) == [((0,), {"k": "all"}), ((1,), {"k": "all"})]


def test_a_function_can_be_the_target(make):
    group = make(make_worker, 1, args=("w",))
    assert group.call(Worker.made_with) == [(("made by a function", "w"), {})]


def test_a_lambda_and_a_closure_can_be_the_target(make):
    word = "closed over"
    assert make(lambda: Worker(word), 1)[0].call(Worker.made_with) == ((word,), {})


def test_a_class_from_inside_a_function_can_be_the_target(make):
    greeting = "hello"

    class Local:
        def greet(self, name):
            return f"{greeting}, {name}"

    group = make(Local)
    assert group.call(Local.greet, "you") == ["hello, you"] * 2
    assert group.call("greet", "you") == ["hello, you"] * 2


def test_arguments_may_change_once_the_group_is_made(make):
    weights = [1, 2]
    group = make(world_size=1, args=(weights,))
    weights.append(3)
    assert group[0].call(Worker.made_with) == (([1, 2],), {})


def test_name_size_pids_and_repr(make, backend):
    group = make(name="gpt", world_size=2)
    assert (group.name, group.world_size, len(group)) == ("gpt", 2, 2)
    assert group.pids == group.call(Worker.get_pid)
    if backend == "inline":
        assert group.pids == [os.getpid()] * 2
    else:
        assert len({*group.pids, os.getpid()}) == 3
    polls = str(group._engine.spin)
    assert repr(group) == f"<WorkerGroup 'gpt': 2 ranks, {backend}, spin={polls}, open>"
    group.close()
    assert repr(group) == f"<WorkerGroup 'gpt': 2 ranks, {backend}, spin={polls}, closed>"
    assert repr(group[0]) == "<view of 'gpt': ranks [0]>"


def test_a_context_manager_is_entered_once_made_and_left_at_close(make, tmp_path):
    with make(Managed, args=(str(tmp_path),)) as group:
        assert group.call(Managed.work) == [True, True]
    for rank in range(2):
        text = (tmp_path / str(rank)).read_text()
        assert text == "enter\nwork\nexit None None None\n"


def test_an_exit_that_fails_does_not_keep_the_group_from_closing(make, tmp_path):
    with make(Managed, args=(str(tmp_path), True)) as group:
        group.call(Managed.work)
    assert not group.healthy
    assert group.failure is None
    with pytest.raises(GroupClosed):
        group.call(Managed.work)


def test_what_enter_returns_is_the_worker(make):
    class Wrapped:
        def __enter__(self):
            return Worker("the inner one")

        def __exit__(self, *exc_info):
            pass

    assert make(Wrapped, 1)[0].call("made_with") == (("the inner one",), {})


def test_a_constructor_that_fails_is_a_startup_error(backend):
    with pytest.raises(StartupError) as caught:
        WorkerGroup(Failing, 2, name="loader", args=("no shard",), backend=backend)
    error = caught.value
    assert str(error).startswith("loader: rank 1 (pid ")
    assert str(error).endswith(") failed in phase 'construct': OSError: no shard")
    assert (error.rank, error.phase) == (1, "construct")
    assert not isinstance(error, StartupTimeout)
    cause = error.__cause__
    assert type(cause) is OSError
    assert cause.args == ("no shard",)
    assert type(cause.__cause__) is RemoteError
    assert "raise OSError(message)" in cause.__cause__.remote_traceback


def test_a_constructor_that_exits_is_a_startup_error_too(backend):
    with pytest.raises(StartupError, match=r"'construct': SystemExit: 3$") as caught:
        WorkerGroup(lambda: exit(3), 1, backend=backend)
    assert caught.value.rank == 0
    assert caught.value.__cause__.type_name == "SystemExit"


def test_arguments_that_fit_no_constructor_are_a_startup_error(backend):
    class NoArguments:
        pass

    with pytest.raises(StartupError, match="NoArguments") as caught:
        WorkerGroup(NoArguments, 1, args=(1, 2), backend=backend)
    assert type(caught.value.__cause__) is TypeError


def test_a_start_that_takes_too_long_says_who_is_not_ready(backend, gate):
    path = gate.path

    def slow():
        from rankwise import worker_info

        if worker_info().rank == 1:
            with open(f"{path}.1"):
                pass
        return Worker()

    limit = 3 if backend == "local" else 0.3
    error = explained(
        lambda: WorkerGroup(slow, 2, backend=backend, start_timeout=limit), kind=StartupTimeout
    )
    assert isinstance(error, TimeoutError)
    assert error.phases == {1: "construct"}
    assert (error.rank, error.phase) == (1, "construct")
    assert f"1 of 2 ranks were not ready after {limit} s (start_timeout)" in str(error)
    assert re.search(
        r"\n  rank 1: pid \d+, construct, in test_construction\.py:\d+ slow", str(error)
    )
    assert list(error.stacks) == [1] and "in slow" in error.stacks[1]


def test_a_target_that_cannot_travel_fails_before_anything_is_started(backend):
    import threading

    with pytest.raises(SerializationError) as caught:
        WorkerGroup(Worker, 2, args=(1, {"cfg": threading.Lock()}), backend=backend)
    assert caught.value.path == "args[1]['cfg']"
    assert "args[1]['cfg']" in str(caught.value)


def test_a_group_and_its_views_cannot_be_pickled(group):
    with pytest.raises(TypeError, match="a WorkerGroup cannot be pickled: it belongs to the proc"):
        pickle.dumps(group)
    with pytest.raises(TypeError, match="a view of a WorkerGroup cannot be pickled"):
        pickle.dumps(group[0:2])
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(group[0])
    with pytest.raises(SerializationError, match=r"args\[0\]"):
        group.call(Worker.echo, group)
    with pytest.raises((TypeError, SerializationError)):
        pickle.dumps(group.submit(Worker.get_rank))
    assert group.call(Worker.get_rank) == [0, 1, 2]
