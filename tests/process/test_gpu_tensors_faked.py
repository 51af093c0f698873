"""What holds for tensors on a GPU, shown without one: whose copy lives how long, who sees what.

The "GPU" here is float16: its memory is a file, which the process that has shared it keeps for as
long as its copy lives. tests/gpu has the same with a real one.
"""

from __future__ import annotations

import gc
import os
import tempfile
import weakref

import pytest
from drivers import until

from rankwise import RemoteError, WorkerDied, WorkerGroup

torch = pytest.importorskip("torch")

COPIES: list[weakref.ref] = []  # what this process has shared


def share(copy):
    """As `gpu._share`, to a file that goes with the copy."""
    handle, path = tempfile.mkstemp(prefix="fake-gpu-")
    os.write(handle, copy.contiguous().view(torch.uint8).numpy().tobytes())
    os.close(handle)
    COPIES.append(weakref.ref(copy, lambda _: os.unlink(path)))
    return rebuild, (None, tuple(copy.shape), None, None, None, None, 0, path)


def rebuild(cls, shape, stride, offset, storage, dtype, index, path):
    with open(path, "rb") as file:  # FileNotFoundError: the copy has gone too early
        return torch.frombuffer(bytearray(file.read()), dtype=torch.float16).reshape(shape)


def pretend(sees=("uuid-a",)):
    """Let this process see these GPUs; the first is the one that its own tensors are on."""
    from rankwise.wire import gpu, tensors

    COPIES.clear()
    gpu._share = share
    gpu._count = lambda: len(sees)
    gpu._uuid = lambda index: sees[index or 0]
    tensors.is_on_gpu = lambda tensor: tensor.dtype is torch.float16
    return True


def alive():
    """How many copies this process keeps for others."""
    from rankwise._deadline import clock

    for lender in [one for one in gc.get_objects() if type(one).__name__ == "Lender"]:
        with lender._lock:
            if lender._memory is not None:
                lender._collect(lender._memory, clock())
    return sum(copy() is not None for copy in COPIES)


class Pretending:
    """Where it is rebuilt, this process pretends, before it looks at what comes after."""

    def __reduce__(self):
        return pretend, ()


class Model:
    def __init__(self, *given):
        self.kept = given[-1] if given else None

    def pretend(self, *sees):
        return pretend(sees)

    def alive(self):
        return alive()

    def keep(self, tensor):
        tensor += 1
        self.kept = tensor
        return float(tensor.sum())

    def total(self):
        return float(self.kept.sum())

    def give(self, size):
        return torch.ones(size, dtype=torch.float16)

    def fail(self, tensor):
        raise ValueError(tensor)

    def wait(self, path):
        with open(path, "rb") as file:
            file.read()


@pytest.fixture
def driver(monkeypatch):
    """A driver that sees a GPU."""
    from rankwise.wire import gpu, tensors

    for module, name in ((gpu, "_share"), (gpu, "_count"), (gpu, "_uuid"), (tensors, "is_on_gpu")):
        monkeypatch.setattr(module, name, getattr(module, name))  # as it was, afterwards
    pretend()
    yield
    gc.collect()
    assert alive() == 0, "what was shared is kept for ever"


FORKED = {"start_method": "forkserver", "preload": ("torch",)}  # it takes long to import


@pytest.fixture(scope="module")
def started():
    with WorkerGroup(Model, 2, **FORKED) as made:
        for _ in range(3):  # what it maps for large payloads stays mapped while it lives
            made.call("keep", torch.zeros(1 << 20))
        # Nor is its callback thread a leak of the test that comes to need it.
        made.submit("keep", 0).add_done_callback(lambda future: future.exception())
        made.flush()
        yield made


@pytest.fixture
def group(driver, started):
    started.call("pretend", "uuid-b", "uuid-a")
    return started


def on_gpu(value, size=8):
    return torch.full((size,), float(value), dtype=torch.float16)


@pytest.mark.parametrize("size", [8, 20_000])
def test_every_rank_has_its_own_and_the_senders_copy_ends_when_the_last_has_it(group, size):
    for value in (1, 2):
        given = on_gpu(value, size)
        future = group.submit("keep", given)
        given += 50
        assert future.result() == pytest.approx([(value + 1) * size] * 2, rel=1e-2)
        assert len(COPIES) == value
        del future
        assert alive() == 0
    group[0].call("keep", on_gpu(6))
    assert group[1].call("total") == pytest.approx(3 * size, rel=1e-2)


def test_a_copy_lives_until_the_slowest_rank_has_loaded_it(group):
    read, write = os.pipe()
    held = group[1].submit("wait", f"/proc/{os.getpid()}/fd/{read}")
    future = group.submit("keep", on_gpu(1))
    group[0].call("total")
    assert alive() == 1
    os.close(write)
    held.result()
    assert future.result() == [16, 16]
    assert alive() == 0
    os.close(read)


def test_a_call_that_is_never_sent_keeps_nothing(group):
    read, write = os.pipe()
    held = group.submit("wait", f"/proc/{os.getpid()}/fd/{read}")
    futures = [group.submit("keep", on_gpu(1)) for _ in range(100)]
    dropped = sum(future.cancel() for future in futures)
    assert dropped > 10
    os.close(write)
    held.result()
    group.flush()
    del futures, held
    gc.collect()
    assert alive() == 0
    os.close(read)


def test_results_come_home_and_those_that_nobody_fetches_keep_nothing(driver):
    with WorkerGroup(Model, 1, **FORKED) as group:
        group.call("pretend", "uuid-a")
        got = group[0].call("give", 10)
        got += 1
        assert float(got.sum()) == 20
        unfetched = [group.submit("give", 10) for _ in range(5)]
        group.flush()
        assert group[0].call("alive") == 5
        del unfetched
        gc.collect()
        assert until(lambda: group[0].call("alive") == 0)
    assert float(got.sum()) == 20


def test_a_gpu_that_a_rank_does_not_see_is_an_error_that_says_so(group):
    group[1].call("pretend", "uuid-c")
    with pytest.raises(RuntimeError, match=r"uuid-a\), which this process .*: it sees GPU uuid-c"):
        group.call("keep", on_gpu(1))
    assert alive() == 0
    group[1].call("pretend")
    with pytest.raises(RuntimeError, match=r"it sees no GPU.*tensor\.cpu"):
        group.call("keep", on_gpu(1))
    assert group[0].call("keep", on_gpu(1)) == 16


def test_a_gpu_that_the_driver_does_not_see_is_an_error_that_says_so(driver):
    with WorkerGroup(Model, 1, **FORKED) as group:
        group.call("pretend", "uuid-c")
        with pytest.raises(RemoteError, match=r"could not be rebuilt in the driver: .*uuid-c"):
            group.call("give", 10)
        gc.collect()
        assert until(lambda: group[0].call("alive") == 0)


def test_a_constructor_argument_is_shared_too(driver):
    with WorkerGroup(Model, 2, args=(Pretending(), on_gpu(3)), **FORKED) as group:
        assert group.call("total") == [24, 24]
        assert len(COPIES) == 1
        assert alive() == 0


def test_beside_a_definition_it_is_shared_once(group):
    scale = 3
    given = on_gpu(2)
    assert group.call(lambda worker, tensor: float(tensor.sum()) * scale, given) == [48, 48]
    assert len(COPIES) == 1


def test_the_same_one_twice_arrives_as_one(group):
    given = on_gpu(2)
    assert group[0].call(lambda worker, one, two: one is two, given, given)
    assert len(COPIES) == 1


def test_in_an_exception_and_between_threads_it_is_not_shared(group, driver):
    group.call("pretend", "uuid-a")
    with pytest.raises(ValueError) as raised:
        group.call("fail", on_gpu(1))
    assert raised.value.args[0].tolist() == [1] * 8
    assert group.call("alive") == [0, 0]
    COPIES.clear()
    with WorkerGroup(Model, 1, args=(on_gpu(1),), backend="inline") as inline:
        assert inline[0].call("total") == 8
        assert inline[0].call("keep", on_gpu(1)) == 16
    assert COPIES == []


def test_parameters_stay_what_they_are(group):
    frozen = torch.nn.Parameter(on_gpu(1), requires_grad=False)
    leaf = on_gpu(1).requires_grad_()

    def tell(worker, *tensors):
        return [(type(one).__name__, one.requires_grad) for one in tensors]

    told = group[0].call(tell, frozen, leaf, torch.nn.Parameter(on_gpu(1)))
    assert told == [("Parameter", False), ("Tensor", True), ("Parameter", True)]


def test_a_rank_that_dies_before_it_has_looked_leaves_the_driver_nothing(driver):
    group = WorkerGroup(Model, 1, logs="off", **FORKED)
    group.call("pretend", "uuid-a")
    group.submit(lambda worker: os._exit(3))
    future = group.submit("keep", on_gpu(1))
    with pytest.raises(WorkerDied):
        future.result()
    group.close()
