"""health(), healthy and failure: never blocking, never calling a worker."""

from __future__ import annotations

from contract_worker import Worker

from rankwise import RankHealth


def test_an_idle_group(group, backend):
    group.flush()
    for rank, health in enumerate(group.health()):
        assert type(health) is RankHealth
        assert health.rank == rank
        assert health.state == "idle"
        assert health.pid == group.pids[rank]
        assert (health.method, health.call_id, health.seconds) == (None, None, 0.0)
        if backend == "local":
            assert health.memory > 1 << 20
        else:
            assert health.memory is None
    assert group.healthy
    assert group.failure is None


def test_a_running_call_is_shown(group, gate):
    future = group[1].submit(Worker.pass_gate, gate.path)
    gate.entered(1)
    health = group.health()
    assert [h.state for h in health] == ["idle", "running", "idle"]
    assert health[1].method == "pass_gate"
    assert health[1].call_id > 0
    assert 0 <= health[1].seconds < 60
    assert group.health()[1].seconds >= health[1].seconds
    gate.open(1)
    future.result()
