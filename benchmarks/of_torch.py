"""A torch tensor of 64 MB beside a numpy array as large and laid out alike, each to one rank.

Contiguous; transposed; every second column. Then all types of elements that torch has, contiguous,
beside one array. Tensor and array take turns to be first, and the ratio is taken within a round.
The rank maps what it gets and reads none of it: it is the driver's copy that is measured.
Where torch is not installed there is no such row.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from typing import Any

import numpy as np
from figures import spread

from rankwise import WorkerGroup

MB = 1 << 20
SIZE = 64 * MB
WARM = 3  # rounds before those that count; one for each type, after all those

Rows = dict[str, dict[str, list[float]]]  # row -> "tensor", "array" -> seconds, one a round


class Taker:
    def take(self, payload: object) -> None:
        pass


def pairs(torch: Any) -> dict[str, tuple[Any, np.ndarray]]:
    """Row -> a tensor, and an array as large and as laid out."""
    columns = 1024
    array = np.ones((SIZE // (4 * columns), columns), np.float32)
    wide = np.ones((SIZE // (4 * columns), 2 * columns), np.float32)
    tensor, wide_tensor = torch.from_numpy(array.copy()), torch.from_numpy(wide.copy())
    return {
        "contiguous": (tensor, array),
        "transposed": (tensor.T, array.T),
        "every second column": (wide_tensor[:, ::2], wide[:, ::2]),
    }


def dtypes(torch: Any) -> dict[str, Any]:
    """Type's name -> a tensor of it, for all types that torch itself can convert to."""
    raw = torch.ones(SIZE, dtype=torch.uint8)
    found = {}
    for name in sorted(vars(torch)):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q"):
            try:
                with warnings.catch_warnings(action="ignore"):  # complex32 is young, it says
                    torch.ones(1).to(dtype)
            except (RuntimeError, TypeError):
                continue  # an int3, say: names for what is to come
            found[str(dtype).removeprefix("torch.")] = raw.view(dtype)
    return found


def measure(rounds: int) -> tuple[Rows, Rows]:
    """The layouts; the types."""
    if importlib.util.find_spec("torch") is None:
        return {}, {}
    import torch

    array = np.ones(SIZE, np.uint8)
    with WorkerGroup(Taker, 1, logs="off") as group:  # torch warns there too
        laid_out = {
            name: beside(group, tensor, like, rounds, WARM)
            for name, (tensor, like) in pairs(torch).items()
        }
        typed = {
            name: beside(group, tensor, array, rounds, 1) for name, tensor in dtypes(torch).items()
        }
    return laid_out, typed


def beside(
    group: WorkerGroup, tensor: Any, array: np.ndarray, rounds: int, warm: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"tensor": [], "array": []}
    for turn in range(warm + rounds):
        both = (("tensor", tensor), ("array", array))
        for name, payload in both if turn % 2 else both[::-1]:
            began = time.perf_counter()
            group.call(Taker.take, payload)
            if turn >= warm:
                found[name].append(time.perf_counter() - began)
    return found


def times(row: dict[str, list[float]]) -> list[float]:
    """How many times the array the tensor took, round by round."""
    return [tensor / array for tensor, array in zip(row["tensor"], row["array"], strict=True)]


def table(laid_out: Rows, typed: Rows) -> str:
    if not laid_out:
        return "torch is not installed: no rows of tensors"
    lines = [f"{'ms, 64 MB to one rank':<24}{'tensor':>24}{'array':>24}{'x':>20}"]
    for name, row in laid_out.items():
        ms = [spread([value * 1e3 for value in row[what]], 2) for what in ("tensor", "array")]
        lines.append(f"{name:<24}{ms[0]:>24}{ms[1]:>24}{spread(times(row), 2):>20}")
    ratios = {name: statistics.median(times(row)) for name, row in typed.items()}
    most, least = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    lines.append(
        f"{len(ratios)} types of elements: {ratios[least]:.2f} x ({least}) "
        f"to {ratios[most]:.2f} x ({most})"
    )
    return "\n".join(lines)
