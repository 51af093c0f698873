"""torch tensors in CPU memory, as buffers: imported when one is first sent or received.

    tensor  > (make, storage, dtype, offset, size, stride)      storage > its bytes, out of band

torch's own pickling copies a storage into the pickle; this hands its bytes to the arena, as numpy
does with an array. Two tensors of one storage stay two tensors of one storage. But a view of a part
travels without the rest, as an array does: `x[0]` of a gigabyte is not a gigabyte.

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


def reduce_tensor(tensor: Any) -> Any:
    """How `tensor`, a Tensor or Parameter, is rebuilt; NotImplemented: torch knows better."""
    if tensor.device.type != "cpu" or not _is_plain(tensor):
        return NotImplemented
    with torch.no_grad():
        plain = tensor.detach()
        storage = plain.untyped_storage()
        if plain.numel() * plain.element_size() < storage.nbytes():
            plain = plain.clone(memory_format=torch.preserve_format)
            storage = plain.untyped_storage()
    return _make, (
        type(tensor) is torch.nn.Parameter,
        storage,
        tensor.dtype,
        plain.storage_offset(),
        tuple(plain.size()),
        plain.stride(),
        tensor.requires_grad,
    )


def reduce_storage(storage: Any) -> Any:
    """How `storage`, an UntypedStorage, is rebuilt; NotImplemented: torch knows better."""
    if storage.device.type != "cpu":
        return NotImplemented
    size = storage.nbytes()
    if not size:
        return _make_storage, (b"",)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    memory.owner = storage  # for as long as the buffer is looked at
    return _make_storage, (PickleBuffer(memory),)


def _make_storage(data: Any) -> Any:
    if not len(data):
        return torch.UntypedStorage(0)
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _make(
    parameter: bool,
    storage: Any,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> Any:
    made = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
    if parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_() if requires_grad else made
