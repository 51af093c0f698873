"""worker_info() and current_call()."""

from __future__ import annotations

import pickle

import pytest
from contract_worker import Worker

import rankwise
from rankwise import current_call, worker_info


def test_worker_info_has_all_fields(group):
    for rank, info in enumerate(group.call(Worker.get_info)):
        assert info.rank == rank
        assert info.world_size == 3
        assert info.local_rank == rank
        assert info.local_world_size == 3
        assert info.node_rank == 0
        assert info.num_nodes == 1
        assert info.group == "workers"
        assert info.device is None
        assert info.master_addr == "127.0.0.1"
        assert isinstance(info.master_port, int)
        assert pickle.loads(pickle.dumps(info)) == info
        with pytest.raises(AttributeError):
            info.rank = 5


def test_worker_info_is_there_while_the_worker_is_made(group):
    assert group.call(lambda worker: worker.info.rank) == [0, 1, 2]


def test_worker_info_outside_a_worker_is_a_runtime_error(group):
    with pytest.raises(RuntimeError, match=r"^worker_info\(\) was called outside a worker"):
        worker_info()


def test_current_call_outside_a_call_is_a_runtime_error(make):
    with pytest.raises(RuntimeError, match=r"^current_call\(\) was called outside a call of a"):
        current_call()

    class Early:
        def __init__(self):
            try:
                current_call()
            except RuntimeError as error:
                self.message = str(error)

        def get_message(self):
            return self.message

    assert make(Early, 1)[0].call(Early.get_message).startswith("current_call() was called outsi")


def test_current_call_says_which_call_it_is(group):
    first = group.call(Worker.described)
    second = group.call(Worker.described)
    assert len({described[0] for described in first}) == 1, "one id on all ranks"
    assert second[0][0] > first[0][0]
    assert [(method, left, cancelled) for _, method, left, cancelled, _ in first] == [
        ("described", None, False)
    ] * 3
    assert first[0][4] == f"CurrentCall(id={first[0][0]}, method='described')"
    assert isinstance(rankwise.CurrentCall, type)


def test_current_call_names_what_was_sent_by_value(group):
    assert group[0].call(lambda worker: rankwise.current_call().method) == "<lambda>"


def test_current_call_knows_what_is_left_of_the_deadline(group):
    _, _, left, _, _ = group[1].options(timeout=50).call(Worker.described)
    assert 40 < left <= 50


def test_the_deadline_counts_the_time_in_the_queue(group, gate):
    group[0].submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    late = group[0].options(timeout=0.0).submit(Worker.described)
    kept = group[0].options(timeout=60).submit(Worker.described)
    with pytest.raises(rankwise.CallTimeout):
        late.result()
    gate.open(0)
    assert 0 < kept.result()[2] < 60


def test_remaining_is_never_negative(group, gate):
    def after_the_gate(worker, path):
        worker.pass_gate(path)
        worker.seen.append(current_call().remaining())

    group[0].call(Worker.take_seen)
    future = group[0].options(timeout=0.01).submit(after_the_gate, gate.path)
    gate.entered(0)
    with pytest.raises(rankwise.CallTimeout):
        future.result()
    gate.open(0)
    assert group[0].call(Worker.take_seen) == [0.0]
