"""torch tensors in a GPU's memory, through torch's own IPC: imported when one is first sent or met.

    sender  > a copy on its GPU, kept with the loan > CUDA's handle, an event, the GPU's UUID
    reader  > opens it > a copy of its own          > closes it, and lets go of the loan

Nothing leaves the GPU, and what is received is the receiver's own, as in CPU memory: the sender may
write to its tensor as soon as it is sent, no reader sees what another writes, and a tensor outlives
the process that it came from (what is merely opened ends with the process that has made it).

torch counts, in a file, the readers of what is shared: one for each pickling, and it keeps memory
that is freed before that one has come. Here one pickle is read by any number of ranks, or never; so
its count is taken back at once, and the loan of the message, which knows all that, keeps the copy.
(torch/csrc/CudaIPCTypes.cpp: what is freed at a count of 0 or less is freed at once, and a place in
the file is used for one pickling only, so readers that count down later do no harm.)
The same GPU may have another index in each process: its UUID says which it is.
"""

from __future__ import annotations

from typing import Any

import torch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_DEVICE = 6  # where `rebuild_cuda_tensor` takes the index of the device
_COUNTER = slice(11, 13)  # and the file and the offset of the count


def share_tensor(tensor: Any, pickler: Any) -> Any:
    """How `tensor`, a Tensor or Parameter on a GPU, is rebuilt by the readers of `pickler`."""
    with torch.no_grad():
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
    rebuild, share = _share(copy)
    # Kept from here on: by the pickler, then by the loan of its message.
    pickler.kept = [*(pickler.kept or ()), copy]
    index = tensor.device.index
    return _open, (
        type(tensor) is torch.nn.Parameter,
        tensor.requires_grad,
        _uuid(index),
        f"cuda:{index}",
        rebuild,
        share,
    )


def _open(
    parameter: bool,
    requires_grad: bool,
    uuid: str,
    named: str,
    rebuild: Callable[..., Any],
    share: tuple[Any, ...],
) -> Any:
    seen = [_uuid(index) for index in range(_count())]
    if uuid not in seen:
        raise RuntimeError(
            f"a tensor lies on {named} of its sender (GPU {uuid}), which this process does not "
            f"see: it sees {', '.join(f'GPU {one}' for one in seen) or 'no GPU'}. Send "
            "tensor.cpu(), or make the group with devices='shared' or None"
        )
    try:
        opened = rebuild(*share[:_DEVICE], seen.index(uuid), *share[_DEVICE + 1 :])
        with torch.no_grad():
            own = opened.detach().clone(memory_format=torch.preserve_format)
        if opened.is_cuda:
            # torch closes it first and waits then: the copy must not be under way any more.
            torch.cuda.current_stream(opened.device).synchronize()
        del opened
    except RuntimeError as error:
        raise RuntimeError(
            f"a tensor on {named} of its sender (GPU {uuid}) could not be opened here: {error}. "
            "Its sender may have ended, or the driver may not share its memory (WSL, or some "
            "settings of PYTORCH_CUDA_ALLOC_CONF): send tensor.cpu()"
        ) from error
    if parameter:
        return torch.nn.Parameter(own, requires_grad)
    return own.requires_grad_() if requires_grad else own


# -- what needs a GPU ---------------------------------------------------------------------------


def _share(copy: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How another process opens `copy`, which this one keeps."""
    from torch.multiprocessing.reductions import reduce_tensor

    reduced: Any = reduce_tensor(copy)
    rebuild, share = reduced
    file, offset = share[_COUNTER]
    if file is not None:  # None: it is empty, and has no memory
        torch.UntypedStorage._release_ipc_counter(file, offset, device=share[_DEVICE])
    return rebuild, share


def _count() -> int:
    """How many GPUs this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
