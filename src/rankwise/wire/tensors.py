"""torch tensors in CPU memory, as buffers: imported when one is first sent or received.

    tensor  > (make, its elements, dtype, size, stride)         storage > its bytes, out of band

torch's own pickling copies a whole storage into the pickle; this hands the tensor's own elements to
the arena, as numpy does with an array: `x[0]` of a gigabyte is not a gigabyte. So two tensors that
share memory arrive apart, as two arrays do; the same object twice arrives as one.

What is not a plain tensor in CPU memory (a subclass, sparse, quantized, on a device, with hooks or
attributes of its own) is left to torch; one in a GPU's memory is `gpu.py`'s, where its readers are
other processes.
"""

from __future__ import annotations

import ctypes
from pickle import PickleBuffer
from typing import Any

import torch


def is_on_gpu(tensor: Any) -> bool:
    """Whether `tensor` lies in a GPU's memory, and is no more than that."""
    return tensor.device.type == "cuda" and _is_plain(tensor)


def _is_plain(tensor: Any) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.__dict__
        and not tensor._backward_hooks
    )


def refuse_graph(tensor: Any) -> None:
    """Raise ValueError for a `tensor` whose gradient leads on to others: they do not travel."""
    if tensor.requires_grad and not tensor.is_leaf:
        raise ValueError(
            "it was computed from tensors that require grad, and no graph crosses processes: send "
            "tensor.detach(), or compute it under torch.no_grad()"
        )


def reduce_tensor(tensor: Any) -> Any:
    """How `tensor`, a Tensor or Parameter, is rebuilt; NotImplemented: torch knows better."""
    if tensor.device.type != "cpu" or not _is_plain(tensor):
        return NotImplemented
    with torch.no_grad():
        plain = tensor.detach()
        if not _is_dense(plain):
            plain = plain.clone(memory_format=torch.preserve_format)
    return _make, (
        type(tensor) is torch.nn.Parameter,
        _elements(plain.data_ptr(), plain.numel() * plain.element_size(), plain),
        tensor.dtype,
        tuple(plain.size()),
        plain.stride(),
        tensor.requires_grad,
    )


def _is_dense(tensor: Any) -> bool:
    """Whether its elements lie side by side, in whatever order of its dimensions."""
    if not tensor.numel():
        return True
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def _elements(address: int, size: int, owner: Any) -> Any:
    if not size:
        return b""
    memory: Any = (ctypes.c_char * size).from_address(address)
    memory.owner = owner  # for as long as the buffer is looked at
    return PickleBuffer(memory)


def reduce_storage(storage: Any) -> Any:
    """How `storage`, an UntypedStorage, is rebuilt; NotImplemented: torch knows better."""
    if storage.device.type != "cpu":
        return NotImplemented
    return _make_storage, (_elements(storage.data_ptr(), storage.nbytes(), storage),)


def _make_storage(data: Any) -> Any:
    if not len(data):
        return torch.UntypedStorage(0)
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _make(
    parameter: bool,
    elements: Any,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> Any:
    made = torch.empty(0, dtype=dtype).set_(_make_storage(elements), 0, size, stride)
    if parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_() if requires_grad else made
