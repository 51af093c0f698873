"""Guarantee 9: arguments may be changed as soon as `submit` returns; what a worker receives is its
own, writable and private.

Small and large, sent at once and queued in the driver: each may take another way to the worker.
"""

from __future__ import annotations

import array
import os

import pytest
from drivers import SECONDS, in_thread, until
from g09_arguments_are_copies_ranks import Worker

from rankwise import WorkerGroup, per_rank

SIZE = 2
AHEAD = 64  # so many calls are sent ahead to a rank: what comes after them is queued
SMALL, LARGE = 16, 1 << 20  # bytes: in one write, and in many


@pytest.fixture(scope="module")
def shared():
    with WorkerGroup(Worker, SIZE) as group:
        for _ in range(3):  # what it maps for large payloads stays mapped while it lives
            group.call(lambda worker, data: data, bytearray(8 << 20))
        yield group


@pytest.fixture
def group(shared):
    yield shared
    shared.options(timeout=SECONDS).call("forget")


@pytest.fixture
def held(group, tmp_path):
    """Both ranks are busy, and more is under way to them than is sent ahead, until it is called."""
    fifos = [str(tmp_path / str(rank)) for rank in range(SIZE)]
    for rank, path in enumerate(fifos):
        os.mkfifo(path)
        group[rank].submit("hold", path)
    for _ in range(AHEAD):
        group.submit("echo", None)

    def let_go():
        while fifos:
            with open(fifos.pop(), "wb"):
                pass

    yield let_go
    let_go()


def numbers(nbytes, byte):
    return array.array("Q", bytes([byte]) * nbytes)


KINDS = {
    "bytearray": lambda nbytes, byte: bytearray([byte]) * nbytes,
    "array": numbers,
}
try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]
else:
    KINDS |= {
        "numpy": lambda nbytes, byte: np.full(nbytes, byte, np.uint8),
        "numpy of floats": lambda nbytes, byte: np.frombuffer(numbers(nbytes, byte), "f8").copy(),
        "numpy by columns": lambda nbytes, byte: np.full((nbytes // 8, 8), byte, np.uint8, "F"),
        "numpy of every second": lambda nbytes, byte: np.full(2 * nbytes, byte, np.uint8)[::2],
    }

kinds = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize("nbytes", [SMALL, LARGE], ids=["small", "large"])


def overwrite(value, byte):
    if np is not None and isinstance(value, np.ndarray):
        value[...] = np.frombuffer(bytes([byte]) * value.dtype.itemsize, value.dtype)[0]
    else:
        memoryview(value).cast("B")[:] = bytes([byte]) * memoryview(value).nbytes


def change(worker):
    """Write the rank's own number all over what the worker has kept."""
    kept, mine = worker.kept[0], 5 + int(os.environ["RANK"])
    if hasattr(kept, "flags"):
        assert kept.flags.writeable
        kept[...] = mine
    else:
        memoryview(kept).cast("B")[:] = bytes([mine]) * memoryview(kept).nbytes


def raw(value):
    return value.tobytes() if hasattr(value, "tobytes") else bytes(value)


# -- the caller's side ------------------------------------------------------------------------


@kinds
@sizes
def test_what_the_caller_changes_after_submit_reaches_nobody(group, held, kind, nbytes):
    """Queued calls and sent ones: one call waits in the driver, whole, when its array changes."""
    value = KINDS[kind](nbytes, 1)
    before = raw(value)
    futures = [
        group.submit("echo", value),
        group[1].submit("echo", value),
        *group.submit_each("echo", value),
        group.collective_rpc("echo", args=(value,), non_block=True),
    ]
    overwrite(value, 2)
    later = group.submit("echo", value)
    overwrite(value, 3)
    held()
    got = [future.result(SECONDS) for future in futures]
    assert {raw(one) for one in (*got[0], got[1], got[2], got[3], *got[4])} == {before}
    assert {raw(one)[:1] for one in later.result(SECONDS)} == {b"\2"}
    assert raw(value)[:1] == b"\3"


@sizes
def test_a_thread_that_writes_all_the_time_is_never_seen_after_submit(group, nbytes):
    """The writer goes on the moment that `submit` has returned, and the call is being sent."""
    value = bytearray(nbytes)
    for byte in range(1, 10):
        value[:] = bytes([byte]) * nbytes
        future = group.submit("echo", value)
        writer = in_thread(lambda: overwrite(value, 0xFF))
        expected = bytes([byte]) * nbytes
        assert future.result(SECONDS) == [expected] * SIZE
        writer.value()


def test_containers_may_be_changed_too(group, held):
    cfg = {"list": [1, 2], "nested": {"deep": {3}}}
    args = [cfg, "more"]
    kwargs = {"value": cfg}
    futures = [
        group.submit("echo", cfg),
        group.submit(Worker.echo, args),
        group.collective_rpc("echo", kwargs=kwargs, non_block=True),
    ]
    cfg["list"].append(3)
    cfg["nested"]["deep"].clear()
    args.clear()
    kwargs["value"] = None
    held()
    was = {"list": [1, 2], "nested": {"deep": {3}}}
    assert [future.result(SECONDS) for future in futures] == [
        [was] * SIZE, [[was, "more"]] * SIZE, [was] * SIZE,
    ]  # fmt: skip


def test_so_may_what_a_function_has_closed_over(group, held):
    closed = [1]
    default = {"a": 1}

    def by_value(worker, given=default):
        return list(closed), dict(given)

    future = group.submit(by_value)
    closed.append(2)
    default["a"] = 2
    held()
    assert future.result(SECONDS) == [([1], {"a": 1})] * SIZE


@sizes
def test_the_parts_of_a_scatter_may_be_changed_while_it_waits(group, held, nbytes):
    """`scatter` blocks; another thread has the parts meanwhile."""
    parts = [bytearray([rank + 1]) * nbytes for rank in range(SIZE)]
    before = [bytes(part) for part in parts]
    open_calls = len(group._engine.pump.ledger.open)
    scattering = in_thread(lambda: group.scatter("echo", parts))
    until(lambda: len(group._engine.pump.ledger.open) > open_calls, what="it is submitted")
    for part in parts:
        overwrite(part, 0xFF)
    parts.clear()
    held()
    assert scattering.value() == before


def test_the_arguments_of_the_constructor_may_be_changed():
    """By the workers too: each has its own, also where all were given the same object."""
    common, own = bytearray(LARGE), [[rank] for rank in range(SIZE)]
    with (
        WorkerGroup(Worker, SIZE, args=(common, common)) as same,
        WorkerGroup(Worker, SIZE, args=per_rank([(one,) for one in own])) as each,
    ):
        common[:1] = b"x"
        own[0].append("changed")
        assert each.call(lambda worker: worker.made_with) == [([0],), ([1],)]
        same[0].call(lambda worker: worker.fill(worker.made_with[0], 7))
        heads = same.call(lambda worker: bytes(worker.made_with[1][:2]))
        assert heads == [b"\7\7", b"\0\0"], "one object twice is one object there"
    assert bytes(common[:2]) == b"x\0"


# -- the worker's side --------------------------------------------------------------------------


@kinds
@sizes
def test_a_worker_may_write_to_what_it_receives_and_nobody_else_sees_it(group, kind, nbytes):
    value = KINDS[kind](nbytes, 1)
    before = raw(value)

    group.call("keep", value)
    group.call(change)
    assert raw(value) == before, "not the caller's"
    first, second = group.call(lambda worker: worker.kept[0])
    assert raw(first) != raw(second), "not another rank's"
    assert {raw(one) for one in group.call("echo", value)} == {before}, "not the next message's"


def test_what_was_read_only_here_is_writable_there(group):
    np = pytest.importorskip("numpy")
    values = {
        "frozen": np.zeros(LARGE // 8),
        "of bytes": np.frombuffer(bytes(SMALL), np.uint8),
        "broadcast": np.broadcast_to(np.float64(0), (4, 4)),
    }
    values["frozen"].flags.writeable = False

    def write(worker, received):
        for one in received.values():
            one[...] = 1
        return [float(one.reshape(-1)[-1]) for one in received.values()]

    assert group.call(write, values) == [[1.0] * 3] * SIZE
    assert all(not one.any() for one in values.values())


@kinds
@sizes
def test_what_a_worker_keeps_is_not_changed_by_later_calls(group, kind, nbytes):
    """Memory that messages come in is used again, but never while anything of it is kept."""
    for byte in (1, 2):
        group.call("keep", KINDS[kind](nbytes, byte))
    for byte in range(3, 8):
        group.call("echo", KINDS[kind](nbytes, byte))
        group.submit("echo", KINDS[kind](2 * nbytes, byte))
    kept = group.call(lambda worker: worker.kept)
    expected = [raw(KINDS[kind](nbytes, byte)) for byte in (1, 2)]
    assert [[raw(one) for one in both] for both in kept] == [expected] * SIZE


def test_a_part_that_is_kept_outlives_the_rest(group):
    """Of two arrays of one message one is dropped; and a view keeps what it looks at."""
    np = pytest.importorskip("numpy")

    def keep_one(worker, first, second):
        worker.keep(second[10:20])

    group.call(keep_one, np.zeros(LARGE // 8), np.arange(LARGE // 8))
    for _ in range(5):
        group.call("echo", np.full(LARGE // 8, -1))
    for (kept,) in group.call(lambda worker: worker.kept):
        assert kept.tolist() == list(range(10, 20))


def test_the_same_object_twice_in_one_call_is_one_object_there(group):
    value = bytearray(SMALL)

    def same(worker, one, other, more):
        one[:1] = b"x"
        return one is other, more["again"] is one, bytes(more["again"][:1])

    assert group.call(same, value, value, {"again": value}) == [(True, True, b"x")] * SIZE
    assert value == bytearray(SMALL)


# -- results --------------------------------------------------------------------------------------


@kinds
@sizes
def test_a_result_is_the_callers_own(group, kind, nbytes):
    """It may be written to, and neither the worker nor another rank's result changes with it."""
    value = KINDS[kind](nbytes, 1)
    before = raw(value)
    group.call("keep", value)
    first, second = group.call(lambda worker: worker.kept[0])
    overwrite(first, 9)
    assert raw(second) == before
    assert [raw(one) for one in group.call(lambda worker: worker.kept[0])] == [before] * SIZE


@kinds
@sizes
def test_a_worker_may_change_what_it_has_returned(group, kind, nbytes):
    """Its answer was made before the next call began, however late the caller looks at it."""

    def keep_and_return(worker, value):
        worker.keep(value)
        return value

    value = KINDS[kind](nbytes, 1)
    before = raw(value)
    future = group.submit(keep_and_return, value)
    group.call(change)
    assert [raw(one) for one in future.result(SECONDS)] == [before] * SIZE
