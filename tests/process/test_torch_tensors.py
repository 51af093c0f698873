"""torch tensors to and from ranks: private, writable, for as long as somebody has them."""

from __future__ import annotations

import pytest

from rankwise import WorkerGroup

torch = pytest.importorskip("torch")


class Model:
    def __init__(self):
        self.kept = None

    def keep(self, tensor):
        tensor += 1
        self.kept = tensor
        return float(tensor.sum())

    def total(self):
        return float(self.kept.sum())

    def give(self, size):
        return torch.ones(size)


@pytest.fixture(scope="module", params=["local", "inline"])
def group(request):
    with WorkerGroup(Model, 2, backend=request.param) as made:
        for _ in range(3):  # what it maps for large payloads stays mapped while it lives
            made.call("keep", torch.zeros(1 << 20))
            made.call("give", 1 << 20)
        yield made


@pytest.mark.parametrize("size", [10, 20_000, 1 << 20])
def test_a_rank_may_write_to_its_tensor_and_keep_it(group, size):
    for _ in range(2):
        given = torch.zeros(size)
        assert group.call("keep", given) == [size, size]
        assert float(given.sum()) == 0, "the driver's own is as it was"
        for _ in range(5):
            group.call("give", size)
            group[0].call("keep", given)
        assert group.call("total") == [size, size]
        results = group.call("give", size)
        results[0] += 1
        assert (float(results[0].sum()), float(results[1].sum())) == (2 * size, size)


def test_a_result_outlives_its_group():
    with WorkerGroup(Model, 1) as group:
        kept = group[0].call("give", 1 << 20)
    kept += 1
    assert float(kept.sum()) == 2 << 20
