"""Guarantee 9: arguments may be changed once `submit` returns; what a worker gets is its own."""

from __future__ import annotations

import os

import pytest

from rankwise import WorkerGroup

np = pytest.importorskip("numpy")

# In the frame; just below and above the size from which payloads are shared; mapped.
SIZES = [8, 60_000, 70_000, 1 << 20, 8 << 20]


class Worker:
    def __init__(self):
        self.kept = []

    def wait_then_sum(self, path, data):
        with open(path, "rb") as file:
            file.read()
        return int(np.frombuffer(data, np.uint8).astype(np.int64).sum())

    def fill(self, array, value):
        """Write over all of it, and keep it."""
        array[:] = value
        self.kept.append(array)
        return int(array.sum())

    def sums(self):
        return [int(array.sum()) for array in self.kept]

    def give(self, size):
        self.kept = [np.ones(size, np.uint8)]
        return self.kept[0]


@pytest.fixture(scope="module")
def shared():
    with WorkerGroup(Worker, 2, name="copies") as group:
        for _ in range(3):  # what it maps for large payloads stays mapped while it lives
            group.call("give", 16 << 20)
            group.call("fill", np.zeros(16 << 20, np.uint8), 0)
        group.submit("sums").add_done_callback(lambda future: future.result())
        group.flush()
        yield group


@pytest.fixture
def group(shared):
    shared.call(lambda worker: worker.kept.clear())
    return shared


@pytest.mark.parametrize("kind", ["array", "bytearray"])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_passed_may_be_changed_as_soon_as_submit_returns(group, tmp_path, size, kind):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    data = np.ones(size, np.uint8) if kind == "array" else bytearray(b"\1" * size)
    future = group[0].submit("wait_then_sum", path, data)
    data[:] = bytes(size) if kind == "bytearray" else 7
    with open(path, "wb") as file:
        file.write(b"go on")
    assert future.result(10) == size


@pytest.mark.parametrize("size", SIZES)
def test_a_worker_may_write_into_what_it_gets_and_nobody_else_sees_it(group, size):
    data = np.ones(size, np.uint8)
    assert group.call("fill", data, 3) == [3 * size] * 2
    assert group[1].call("fill", data, 5) == 5 * size
    assert group.call("sums") == [[3 * size], [3 * size, 5 * size]]
    assert int(data.sum()) == size, "the driver's own is as it was"


@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_stays_as_it_was_whatever_comes_after(group, size):
    """Memory that is used again for later messages must not show through."""
    for value in range(1, 9):
        group.call("fill", np.zeros(size, np.uint8), value)
    assert group.call("sums") == [[value * size for value in range(1, 9)]] * 2


@pytest.mark.parametrize("size", SIZES)
def test_a_result_is_the_callers_own(group, size):
    first, second = group.call("give", size)
    first[:] = 9
    assert int(second.sum()) == size
    assert group.call("sums") == [[size], [size]], "the worker's own is as it was"
    later = [group.call("give", size) for _ in range(4)]
    assert int(first.sum()) == 9 * size
    assert all(int(one.sum()) == size for pair in later for one in pair)


def test_two_arguments_that_are_one_object_stay_one(group):
    data = np.ones(1 << 20, np.uint8)

    def same(worker, first, second):
        first[:] = 4
        return first is second, int(second.sum())

    assert group.call(same, data, data) == [(True, 4 << 20)] * 2
