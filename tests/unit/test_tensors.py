"""torch tensors travel as buffers, and arrive as they were."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest

from rankwise import SerializationError
from rankwise.wire import codec

torch = pytest.importorskip("torch")

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex128",
    "complex64", "complex32", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32",
    "uint64", "bool",
]  # fmt: skip


def there_and_back(value):
    return codec.loads(codec.dumps(value))


def equal_bytes(one, two):
    flat = [t.detach().contiguous().flatten().view(torch.uint8) for t in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*flat)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_arrives_bit_by_bit(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex32, that it is experimental
        given = torch.arange(24, dtype=torch.uint8).reshape(2, 12)
        given = given.to(torch.bool) if name == "bool" else given.repeat(1, 16)
        given = given.view(getattr(torch, name)) if name != "bool" else given
        assert equal_bytes(there_and_back(given), given)


@pytest.mark.parametrize(
    "shape",
    [
        lambda a: a.T, lambda a: a[1:], lambda a: a[:, ::2], lambda a: a[2, 3], lambda a: a[:0],
        lambda a: a[0].expand(5, 8), lambda a: a.flip(0), lambda a: a[..., None].permute(2, 1, 0),
    ],
    ids=["transposed", "part", "step", "scalar", "empty", "expanded", "flipped", "permuted"],
)  # fmt: skip
def test_every_layout_arrives(shape):
    given = shape(torch.arange(64.0).reshape(8, 8))
    got = there_and_back(given)
    assert got.shape == given.shape
    assert torch.equal(got, given)


def test_a_small_view_does_not_take_its_whole_storage_along():
    whole = torch.zeros(1000, 1000)
    assert len(codec.dumps(whole[0])) < 5000
    assert there_and_back(whole[:, 0]).untyped_storage().nbytes() == 4000


def test_tensors_that_share_their_memory_arrive_apart_and_one_object_as_one():
    weight = torch.arange(6.0).reshape(2, 3)
    first, second, third = there_and_back((weight, weight, weight.T))
    assert first is second
    first[0, 1] = 50
    assert third[1, 0] == 1
    assert third.stride() == weight.T.stride()
    assert there_and_back({"a": weight, "b": weight.view(6)})["b"].shape == (6,)


def test_a_part_that_lies_side_by_side_is_not_copied_first(monkeypatch):
    whole = torch.zeros(4, 1000)
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("a copy was made"))
    for part in (whole, whole.T, whole[1:3], whole[:1, 5], whole[:0], whole[2, None]):
        assert there_and_back(part).shape == part.shape


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"loss": [t]}])
def test_a_tensor_with_a_graph_behind_it_is_refused_by_path(wrap):
    computed = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(SerializationError, match=r"args\[0\].*detach"):
        codec.encode_call("forward", (wrap(computed),), {})
    with pytest.raises(SerializationError, match=r"result.*detach"):
        codec.encode_result(wrap(computed))


def test_what_it_requires_and_what_it_is_stay():
    assert there_and_back(torch.ones(2, requires_grad=True)).requires_grad
    assert not there_and_back(torch.ones(2)).requires_grad
    frozen = there_and_back(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(frozen) is torch.nn.Parameter
    assert not frozen.requires_grad
    layer = torch.nn.Linear(3, 2)
    again = there_and_back(layer)
    assert torch.equal(again.weight, layer.weight)
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.cfloat).conj(),
        lambda: torch.empty(2, 3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    ],
    ids=["sparse", "conjugate", "meta", "quantized"],
)
def test_what_is_no_plain_tensor_is_left_to_torch(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantization, that it is deprecated
        given = make()
        got = there_and_back(given)
    assert type(got) is type(given)
    assert (got.shape, got.dtype, got.layout) == (given.shape, given.dtype, given.layout)


def test_an_attribute_of_its_own_arrives():
    given = torch.ones(2)
    given.label = "mine"
    assert there_and_back(given).label == "mine"


def test_memory_is_let_go_of_with_the_tensor():
    data = bytearray(codec.dumps(torch.ones(100_000)))
    got = codec.loads(data)
    storage = weakref.ref(got.untyped_storage())
    part = got[:5]
    del got
    gc.collect()
    assert float(part.sum()) == 5
    del part
    gc.collect()
    assert storage() is None
