"""call, submit, submit_each, scatter, flush, collective_rpc: what goes in and what comes out."""

from __future__ import annotations

import re
import threading

import pytest
from contract_worker import Worker
from untold import explained

from rankwise import CallTimeout, GroupFuture


def test_call_gives_a_list_in_rank_order(group):
    assert group.call(Worker.get_rank) == [0, 1, 2]
    assert group.call("get_rank") == [0, 1, 2]


def test_every_argument_after_the_method_is_its_own(group):
    got = group.call(Worker.echo, 1, timeout=3, method="m", self_=None, reply_from=0)
    assert got[2] == (2, (1,), {"timeout": 3, "method": "m", "self_": None, "reply_from": 0})


def test_keyword_arguments_named_like_ours_reach_the_method(group):
    assert group[0].call("echo", group=1, args=2, kwargs=3)[2] == {"group": 1, "args": 2,
                                                                 "kwargs": 3}  # fmt: skip


def test_submit_gives_a_future_of_the_same(group):
    future = group.submit(Worker.add, 1, right=2)
    assert type(future) is GroupFuture
    assert future.rank is None
    assert future.result(timeout=20) == [3, 4, 5]
    assert group[1].submit("add", 1).result() == 12


def test_calls_run_in_the_order_of_their_submission(group):
    group.call(Worker.take_seen)
    for number in range(200):
        group.submit(Worker.note, number)
    assert group.call(Worker.take_seen) == [list(range(200))] * 3


def test_submit_each_gives_one_future_a_rank(group):
    futures = group.submit_each(Worker.add, 0, right=0)
    assert [future.rank for future in futures] == [0, 1, 2]
    assert [future.result() for future in futures] == [0, 1, 2]
    futures = group[[2, 0]].submit_each("get_rank")
    assert [(future.rank, future.result()) for future in futures] == [(2, 2), (0, 0)]
    (alone,) = group[1].submit_each(Worker.get_rank)
    assert (alone.rank, alone.result()) == (1, 1)


def test_submit_each_settles_each_by_its_own_rank(group, gate):
    futures = group.submit_each(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    gate.open(2)
    assert futures[2].result() == 2
    assert not futures[0].done()
    gate.open(0)
    assert futures[0].result() == 0
    gate.open(1)
    assert futures[1].result() == 1


def test_submit_each_leaves_the_others_when_one_fails(group):
    futures = group.submit_each(Worker.fail, ValueError, "no", ranks=[1])
    assert futures[0].result() == 0
    with pytest.raises(ValueError, match="no"):
        futures[1].result()
    assert futures[2].result() == 2


def test_scatter_gives_the_ith_item_to_the_ith_rank(group):
    got = group.scatter(Worker.echo, ["a", "b", "c"], "more", k=1)
    assert got == [(0, ("a", "more"), {"k": 1}), (1, ("b", "more"), {"k": 1}),
                   (2, ("c", "more"), {"k": 1})]  # fmt: skip
    assert group.scatter("add", (10, 20, 30), 0) == [10, 21, 32]


def test_scatter_follows_the_order_of_the_view(group):
    assert group[[2, 0]].scatter(Worker.add, [100, 200], 0) == [102, 200]
    assert group[1].scatter(Worker.add, [5], 0) == 6


@pytest.mark.parametrize("parts", [range(3), (0, 1, 2), bytearray(b"\0\1\2")])
def test_scatter_takes_any_sequence(group, parts):
    assert group.scatter(Worker.add, parts, 0) == [0, 2, 4]


def test_scatter_takes_an_array_along_its_first_axis(group):
    np = pytest.importorskip("numpy")
    got = group.scatter(Worker.echo, np.arange(6).reshape(3, 2))
    assert [args[0].tolist() for _, args, _ in got] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([1, 2], ValueError, "parts must have one item for each of the 3 ranks, not 2"),
        ([1, 2, 3, 4], ValueError, "parts must have one item for each of the 3 ranks, not 4"),
        (iter([1, 2, 3]), TypeError, "parts must be a sequence with one item a rank, not <list_it"),
        ("abc", TypeError, "parts must be a sequence with one item a rank, not 'abc'"),
        (b"abc", TypeError, "parts must be a sequence with one item a rank, not b'abc'"),
        ({0: 1, 1: 2, 2: 3}, TypeError, "parts must be a sequence with one item a rank, not {0"),
        ({1, 2, 3}, TypeError, "parts must be a sequence with one item a rank, not {1"),
        (5, TypeError, "parts must be a sequence with one item a rank, not 5"),
        (None, TypeError, "parts must be a sequence with one item a rank, not None"),
    ],
)
def test_scatter_says_what_is_wrong_with_its_parts(group, parts, kind, message):
    with pytest.raises(kind) as caught:
        group.scatter(Worker.echo, parts)
    assert str(caught.value).startswith(message)


def test_flush_waits_for_all_that_was_submitted_and_raises_nothing(group, gate):
    failing = group.submit(Worker.fail, ValueError)
    future = group[1].submit(Worker.pass_gate, gate.path)
    gate.entered(1)
    for rank in (0, 2):
        group[rank].call(Worker.get_rank)  # they have failed by now
    error = explained(lambda: group.flush(timeout=0.05))
    assert error.missing == (1,)
    assert "flush(0.05) of workers has waited its 0.05 s" in str(error)
    where = rf"rank 1: pid {group.pids[1]}, running pass_gate\(\) for [0-9.]+ s, in contract_work"
    assert re.search(rf"; waiting for rank 1\n  {where}", str(error))
    assert (error.answered, error.states) == ((0, 2), {1: "running"})
    assert error.seconds[1] > 0
    assert "in pass_gate" in error.stacks[1]
    with pytest.raises(CallTimeout, match=r"flush\(0\) of workers has waited no longer") as look:
        group.flush(0)
    assert (look.value.missing, look.value.stacks) == ((1,), {1: None}), "it interrupts nobody"
    opener = threading.Thread(target=gate.open, args=(1,))
    opener.start()
    group.flush()
    opener.join()
    assert future.done()
    assert failing.done()
    assert isinstance(failing.exception(), ValueError)


def test_flush_with_nothing_open_returns_at_once(group):
    group.flush()
    group.flush(0)
    group[0:2].flush(timeout=5)


def test_flush_of_a_view_waits_for_the_whole_group(group, gate):
    future = group[2].submit(Worker.pass_gate, gate.path)
    gate.entered(2)
    with pytest.raises(CallTimeout):
        group[0].flush(0.01)
    gate.open(2)
    assert future.result() == 2


# -- vLLM's verb ----------------------------------------------------------------------------------


def test_collective_rpc_takes_a_name_or_a_callable(group):
    assert group.collective_rpc("get_rank") == [0, 1, 2]
    assert group.collective_rpc(Worker.get_rank) == [0, 1, 2]
    assert group.collective_rpc(lambda worker, more: worker.rank + more, args=(1,)) == [1, 2, 3]


def test_collective_rpc_takes_all_forms_of_arguments(group):
    assert group.collective_rpc("add", 40.0, (1,), {"right": 1}) == [2, 3, 4]
    assert group.collective_rpc("add", timeout=40, args=[1], kwargs={"right": 1}) == [2, 3, 4]
    assert group.collective_rpc("add", args=(0,), kwargs=None) == [10, 11, 12]


def test_collective_rpc_can_return_a_future(group):
    future = group.collective_rpc("get_rank", non_block=True)
    assert type(future) is GroupFuture
    assert future.result() == [0, 1, 2]
    assert group.collective_rpc("get_rank", non_block=True, unique_reply_rank=2).result() == 2


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_collective_rpc_with_a_unique_reply_rank_gives_its_bare_value(group, rank):
    group.call(Worker.take_seen)
    assert group.collective_rpc("note", args=("x",), unique_reply_rank=rank) == 1
    assert group.call(Worker.take_seen) == [["x"]] * 3, "every rank ran it"


def test_collective_rpc_gives_the_bare_value_in_a_world_of_one_too(make):
    group = make(Worker, 1)
    assert group.collective_rpc("get_rank", unique_reply_rank=0) == 0
    assert group.collective_rpc("get_rank", unique_reply_rank=0, non_block=True).result() == 0
    assert group.collective_rpc("get_rank") == [0]


def test_collective_rpc_has_a_deadline(group, gate):
    with pytest.raises(CallTimeout, match=r"pass_gate\(\) has 0 of 3 answers after 0\.05 s"):
        group.collective_rpc("pass_gate", timeout=0.05, args=(gate.path,))
    gate.open(0, 1, 2)
    assert group.collective_rpc("get_rank") == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"timeout": "40"}, TypeError, "timeout"),
        ({"unique_reply_rank": 3}, ValueError, "unique_reply_rank"),
        ({"unique_reply_rank": -1}, ValueError, "unique_reply_rank"),
        ({"unique_reply_rank": "0"}, TypeError, "unique_reply_rank"),
        ({"args": 5}, TypeError, "args"),
        ({"args": "abc"}, TypeError, "args"),
        ({"kwargs": 5}, TypeError, "kwargs"),
        ({"kwargs": [1]}, TypeError, "kwargs"),
    ],
)
def test_collective_rpc_names_the_argument_that_is_wrong(group, options, kind, name):
    with pytest.raises(kind, match=rf"^{name} must be "):
        group.collective_rpc("echo", **options)


def test_arguments_may_be_changed_once_submit_returns(group):
    items = [1]
    future = group.submit(Worker.echo, items)
    items.append(2)
    assert [args for _, args, _ in future.result()] == [([1],)] * 3


def test_what_a_worker_receives_is_its_own(group):
    items = [1]
    group.call(lambda worker, got: got.append(worker.rank), items)
    assert items == [1]
    kept = group.call(lambda worker: worker.seen)
    kept[0].append("changed here")
    assert group[0].call(lambda worker: "changed here" in worker.seen) is False


def test_a_large_argument_and_a_large_result_travel(group):
    data = bytes(range(256)) * (40 << 10)  # 10 MB
    assert group[0:2].call(lambda worker, got: got, data) == [data] * 2


def test_calls_from_many_threads_get_their_own_answers(group):
    wrong = []

    def caller(number):
        for turn in range(50):
            if group.call(Worker.add, number, turn) != [r + number + turn for r in range(3)]:
                wrong.append((number, turn))

    threads = [threading.Thread(target=caller, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
