"""Guarantee 10 for what is no argument of a call: constructor arguments, closures, exceptions."""

from __future__ import annotations

import gc
import sys
import time

import numpy as np
import pytest
from drivers import SECONDS, Script, until
from g10_large_starts_and_failures_ranks import LARGE, Holder, Loaded, full

from rankwise import RemoteError, StartupError, WorkerGroup, per_rank
from rankwise._deadline import clock


def lent(group):
    """How many messages of the driver's are with its ranks, as the arena knows it now."""
    lender = group._engine.arena._lender
    with lender._lock:
        lender._collect(lender._memory, clock())
        return len(lender._blocks.loans)


def lent_by(group, rank):
    """How many answers of `rank` are with the driver."""

    def count(worker):
        import gc

        from rankwise._deadline import clock

        lenders = [one for one in gc.get_objects() if type(one).__name__ == "Lender"]
        for lender in lenders:
            lender._collect(lender._memory, clock())
        return [len(lender._blocks.loans) for lender in lenders]

    (number,) = group[rank].call(count)
    return number


# -- constructor arguments --------------------------------------------------------------------


def test_a_constructor_argument_is_one_block_for_all_ranks_for_as_long_as_one_keeps_it():
    given = full(7, 3 * LARGE + 5)
    with WorkerGroup(Holder, 3, args=(given,)) as group:
        given[:] = 99
        assert lent(group) == 1
        group[1].call("add", 1)
        for number in range(10):
            group.call("total", full(number, 3 * LARGE))
        assert group.call("now") == [(7, 7), (8, 8), (7, 7)]
        group[0:2].call("forget")
        assert lent(group) == 1
        group[2].call("forget")
        assert lent(group) == 0


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_constructor_argument_that_nobody_keeps_is_free_when_the_group_is_ready(method):
    kwargs = {"array": full(3), "keep": False}
    with WorkerGroup(Holder, 2, kwargs=kwargs, start_method=method) as group:
        assert group.call("first") == [(3, 3)] * 2
        assert lent(group) == 0


def test_each_rank_is_given_its_own():
    args = per_rank([(full(rank),) for rank in range(3)])
    with WorkerGroup(Holder, 3, args=args) as group:
        assert group.call("now") == [(0, 0), (1, 1), (2, 2)]
        assert lent(group) == 3
        group[1].call("forget")
        assert lent(group) == 2


@pytest.mark.parametrize("value", ["array", "bytes", "closure"])
def test_a_start_copies_its_arguments_once_and_not_once_a_rank(value):
    code = """
    import numpy as np, resource
    MB = 1 << 20
    array = np.ones(64 * MB, np.uint8)
    text = array.tobytes() if sys.argv[1] == "bytes" else None
    class Worker:
        def __init__(self, given): self.size = len(given)
        def tell(self): return self.size
    def make():
        return Worker(array)
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    target, args = {
        "array": (Worker, (array,)), "bytes": (Worker, (text,)), "closure": (make, ()),
    }[sys.argv[1]]
    before = peak()
    with WorkerGroup(target, 4, args=args) as group:
        sizes = group.call("tell")
        taken = os.fstat(group._engine.arena._file.fd).st_blocks * 512
    say(sizes=sizes, grown=peak() - before, taken=taken // MB)
    """
    with Script(code, value) as script:
        said = script.line(90)
        assert said["sizes"] == [64 << 20] * 4
        assert said["grown"] < 32, "MB: a copy of it in the driver"
        assert 64 <= said["taken"] < 80, "MB: one copy in the arena"
        assert script.end() == 0


def test_a_start_that_there_is_no_memory_for_is_a_memory_error_and_leaves_nothing(monkeypatch):
    from rankwise import _procfs

    monkeypatch.setattr(_procfs, "mem_available", lambda: 300 << 20)
    huge = np.zeros(400 << 20, np.uint8)
    with pytest.raises(MemoryError, match="no memory for"):
        WorkerGroup(Holder, 2, args=(huge,))
    monkeypatch.undo()
    with WorkerGroup(Holder, 2, args=(full(1),)) as group:
        assert group.call("now") == [(1, 1)] * 2


def test_large_arguments_and_failures_go_through_the_sockets_where_there_is_no_arena():
    code = """
    import resource, numpy as np
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    class Worker:
        def __init__(self, array): self.array = array
        def total(self):
            self.array += 1
            return int(self.array.sum())
        def fail(self): raise ValueError(self.array)
    group = WorkerGroup(Worker, 2, args=(np.ones(1 << 20, np.uint8),))
    totals = group.call("total")
    try:
        group[0].call("fail")
    except ValueError as error:
        (array,) = error.args
        array += 1
    say(arena=group._engine.arena is not None, totals=totals, theirs=int(array.sum()))
    group.close()
    """
    with Script(code) as script:
        said = script.line()
        assert said == {"arena": False, "totals": [2 << 20] * 2, "theirs": 3 << 20}
        assert script.end() == 0


def test_a_group_that_breaks_while_its_arguments_are_copied_says_so(monkeypatch):
    """The boot call is refused then: nobody is to wait for its answers."""
    from rankwise.backends import boot

    made = boot.boot_call

    def late(engine, targets):
        assert until(lambda: engine.refusal() is not None)
        return made(engine, targets)

    monkeypatch.setattr(boot, "boot_call", late)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    began = time.monotonic()
    with pytest.raises(StartupError):
        WorkerGroup(Holder, 2, args=(full(1),))
    assert time.monotonic() - began < SECONDS


# -- closures ---------------------------------------------------------------------------------


def test_what_a_function_closes_over_is_one_block_for_all_ranks():
    array = full(4, 2 * LARGE)
    with WorkerGroup(Holder, 3, args=(full(1),), kwargs={"keep": False}) as group:

        def keep(worker):
            worker.array = array
            return int(array.sum())

        assert group.collective_rpc(keep) == [8 * LARGE] * 3
        assert lent(group) == 1
        array[:] = 9
        group[0].call("add", 1)
        group.call("total", full(6, 2 * LARGE))
        assert group.call("now") == [(5, 5), (4, 4), (4, 4)]
        assert lent(group) == 1
        group.call("forget")
        assert lent(group) == 0


# -- exceptions -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["local", "inline"])
def holders(request):
    options = {"args": (full(1),), "kwargs": {"keep": False}, "backend": request.param}
    with WorkerGroup(Holder, 2, **options) as group:
        for _ in range(3):  # what it maps for large payloads stays mapped while it lives
            with pytest.raises(Loaded):
                group.call("fail", LARGE, 1)
        yield group


@pytest.mark.parametrize("size", [100, 100 << 10, 5 * LARGE + 3])
def test_what_an_exception_carries_arrives_and_is_the_callers_own(holders, size, monkeypatch):
    monkeypatch.setattr("rankwise._ledger.FAILURE_PAUSE", 20.0)  # until both have failed
    for value in (3, 4):
        with pytest.raises(Loaded, match="in a call") as raised:
            holders.call("fail", size, value)
        assert [error.array.sum() for error in raised.value.failures.values()] == [size * value] * 2
        raised.value.array += 1
        assert int(raised.value.array.sum()) == size * (value + 1)
        assert isinstance(raised.value.__cause__, RemoteError)
        assert "in a call" in raised.value.__cause__.remote_traceback


def test_an_exception_outlives_its_group_and_its_memory_is_given_back():
    with WorkerGroup(Holder, 1, args=(full(1),)) as group:
        kept = group[0].options(return_exceptions=True).call("fail", LARGE, 5)
        for number in range(10):
            with pytest.raises(Loaded):
                group[0].call("fail", LARGE, number)
            unfetched = group[0].submit("fail", LARGE, 9)
            unfetched._fetched = True  # not to be logged
        group.flush()
        assert (kept.array == 5).all()
        del unfetched
        gc.collect()
        assert until(lambda: lent_by(group, 0) == 1)
        kept_late = group[0].options(return_exceptions=True).submit("fail", LARGE, 6)
        group.flush()
    assert (kept.array == 5).all()
    assert (kept_late.result().array == 6).all()


def test_a_failure_that_comes_too_late_gives_its_memory_back(caplog):
    with WorkerGroup(Holder, 2, args=(full(1),)) as group:

        def both(worker):
            import time

            from rankwise import worker_info

            rank = worker_info().rank
            if rank:
                time.sleep(0.3)  # past the pause in which failures are gathered
            raise ValueError(bytes([rank]) * (1 << 20))

        with pytest.raises(ValueError) as raised:
            group.options(on_error="continue").call(both)
        assert raised.value.args == (bytes(1 << 20),)
        group.flush()
        assert until(lambda: "ValueError" in caplog.text)
        del raised
        gc.collect()
        assert until(lambda: lent_by(group, 1) == 0)


def test_an_exception_that_there_is_no_memory_for_arrives_as_text():
    def shrink(worker):
        from rankwise import _procfs

        _procfs.mem_available = lambda: 300 << 20

    with WorkerGroup(Holder, 1, args=(full(1),)) as group:
        group.call(shrink)
        with pytest.raises(RemoteError, match="Loaded: in a call") as raised:
            group.call("fail", 400 << 20, 1)
        assert raised.value.type_name.endswith("Loaded")
        assert group[0].call("now") == (1, 1)


def test_a_start_that_fails_with_a_large_exception_tells_it():
    with pytest.raises(StartupError) as raised:
        WorkerGroup(Holder, 2, args=(full(21, 2 * LARGE),), kwargs={"fail": True})
    cause = raised.value.__cause__
    assert type(cause) is Loaded
    assert (cause.array == 42).all()
    assert len(cause.array) == 2 * LARGE
