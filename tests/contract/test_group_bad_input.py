"""Every misuse of the constructor is told before anything is started, and names its argument."""

from __future__ import annotations

import threading

import pytest
from contract_worker import Worker

from rankwise import WorkerGroup, per_rank


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """Whatever is wrong is found before a backend is asked for anything."""
    import rankwise._group
    import rankwise._start

    def refuse(spec):
        raise AssertionError("it was started")

    monkeypatch.setattr(rankwise._group, "launch", refuse)
    monkeypatch.setattr(rankwise._start, "launch", refuse)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


WRONG = [
    ({"world_size": 0}, ValueError, "world_size must be an int of at least 1, not 0"),
    ({"world_size": -2}, ValueError, "world_size must be an int of at least 1, not -2"),
    ({"world_size": 2.0}, TypeError, "world_size must be an int of at least 1, not 2.0"),
    ({"world_size": "2"}, TypeError, "world_size must be an int of at least 1, not '2'"),
    ({"world_size": None}, TypeError, "world_size must be an int of at least 1, not None"),
    ({"world_size": True}, TypeError, "world_size must be an int of at least 1, not True"),
    ({"target": 5}, TypeError, "target must be a class or another callable, not 5"),
    ({"target": "Worker"}, TypeError, "target must be a class or another callable, not 'Worker'"),
    ({"target": None}, TypeError, "target must be a class or another callable, not None"),
    ({"args": "model"}, TypeError,
     "args must be a tuple, not 'model'; one argument x alone is args=(x,)"),
    ({"args": 5}, TypeError, "args must be a tuple, not 5; one argument x alone is args=(x,)"),
    ({"args": None}, TypeError, "args must be a tuple, not None"),
    ({"args": per_rank([()])}, ValueError,
     "args=per_rank([...]) must have one item for each of the 2 ranks, not 1"),
    ({"args": per_rank([(), (), ()])}, ValueError,
     "args=per_rank([...]) must have one item for each of the 2 ranks, not 3"),
    ({"args": per_rank(["a", "b"])}, TypeError,
     "item 0 of args=per_rank([...]) must be a tuple, not 'a'; one argument x alone is (x,)"),
    ({"args": (per_rank([1, 2]),)}, TypeError, "args must not have per_rank(...) inside"),
    ({"kwargs": [1]}, TypeError, "kwargs must be a mapping of names to values, not [1]"),
    ({"kwargs": {1: 2}}, TypeError, "kwargs must have names of type str, not 1"),
    ({"kwargs": per_rank([{}])}, ValueError,
     "kwargs=per_rank([...]) must have one item for each of the 2 ranks, not 1"),
    ({"name": ""}, ValueError, "name must be 1 to 64 printable characters without '/', not ''"),
    ({"name": "a/b"}, ValueError, "name must be 1 to 64 printable characters"),
    ({"name": 3}, TypeError, "name must be a str of 1 to 64 printable characters"),
    ({"name": "x" * 65}, ValueError, "name must be 1 to 64 printable characters"),
    ({"start_method": "fork"}, ValueError, "start_method must be 'spawn' or 'forkserver', not"),
    ({"start_method": "thread"}, ValueError, "start_method must be 'spawn' or 'forkserver', not"),
    ({"preload": "torch"}, TypeError, "preload must be a sequence of module names, not 'torch'"),
    ({"preload": ["os"]}, ValueError, "preload="),
    ({"start_timeout": 0}, ValueError, "start_timeout must be a positive, finite number of sec"),
    ({"start_timeout": "5"}, TypeError, "start_timeout must be a positive, finite number of sec"),
    ({"logs": "loud"}, ValueError, "logs must be 'prefix', 'inherit' or 'off', not 'loud'"),
    ({"logs": None}, TypeError, "logs must be 'prefix', 'inherit' or 'off', not None"),
    ({"on_failure": 5}, TypeError, "on_failure must be a callable that takes the GroupBroken, or"),
    ({"spin": -1}, ValueError, "spin must be 'auto' or a finite number of seconds, 0 or more"),
    ({"spin": "fast"}, ValueError, "spin must be 'auto' or a finite number of seconds, 0 or more"),
    ({"threads": 0}, ValueError, "threads must be 'auto', None or an int of at least 1, not 0"),
    ({"threads": "all"}, ValueError, "threads must be 'auto', None or an int of at least 1, not"),
    ({"devices": "all"}, ValueError, "devices must be None, 'shared', 'isolated' or a list of"),
    ({"devices": [0]}, ValueError, "devices must have one item for each of the 2 ranks, not 1"),
    ({"devices": [0, -1]}, ValueError, "devices[1] must be an index of at least 0 or a UUID"),
    ({"env": {"RANK": "0"}}, ValueError, "env must not set 'RANK', which rankwise sets"),
    ({"env": [{}, {"MASTER_PORT": "1"}]}, ValueError,
     "env for rank 1 must not set 'MASTER_PORT', which rankwise sets"),
    ({"env": [{}]}, ValueError, "env must have one item for each of the 2 ranks, not 1"),
    ({"env": {"A": 1}}, TypeError, "env must give 'A' a str, not a value of type int"),
    ({"env": {"A=B": "1"}}, ValueError, "env has 'A=B', which cannot be the name of a variable"),
    ({"env": 5}, TypeError, "env must be a mapping, a list of mappings (one a rank) or a callable"),
    ({"backend": "ray"}, ValueError, "backend must be 'local' or 'inline', not 'ray'"),
    ({"backend": None}, TypeError, "backend must be 'local' or 'inline', not None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind", "message"), WRONG, ids=[f"{next(iter(w[0]))}-{i}" for i, w in
                                                enumerate(WRONG)],
)  # fmt: skip
@pytest.mark.parametrize("start", [WorkerGroup, WorkerGroup.start], ids=["make", "start"])
def test_a_wrong_argument_says_what_would_be_right(backend, start, options, kind, message):
    merged = {"target": Worker, "world_size": 2, "backend": backend, **options}
    with pytest.raises(kind) as caught:
        start(merged.pop("target"), merged.pop("world_size"), **merged)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"env": {"A": "1"}}, "env"),
        ({"devices": "shared"}, "devices"),
        ({"threads": 2}, "threads"),
        ({"logs": "off"}, "logs"),
        ({"start_method": "forkserver"}, "start_method"),
    ],
)
def test_inline_refuses_what_only_processes_have(options, name):
    with pytest.raises(ValueError, match=rf"^{name}=.* cannot be had with backend='inline'"):
        WorkerGroup(Worker, 2, backend="inline", **options)


@pytest.mark.parametrize("values", ["ab", b"ab", {0: 1}, {1, 2}, 5, None])
def test_per_rank_wants_an_order(values):
    with pytest.raises(TypeError, match="per_rank takes a sequence, one item a rank, not"):
        per_rank(values)


def test_an_argument_that_does_not_exist_is_a_type_error(backend):
    with pytest.raises(TypeError, match="wolrd_size"):
        WorkerGroup(Worker, 2, backend=backend, wolrd_size=3)
