"""Workers whose torch is a fake of its TunableOp: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import atexit
import os
import sys
from types import SimpleNamespace

KINDS = (
    "tunes", "tuning is off", "TunableOp is off", "sees no GPU", "torch 2.10", "torch for CPUs",
    "disk is full", "no torch",
)  # fmt: skip


def torch(kind: str, path: str) -> SimpleNamespace:
    """A torch, of which a rank of this `kind` notes in the file `path` when it writes its results.

    From 2.10 on it has no `write_file`; in a build for CPUs there is nothing behind its functions.
    """

    def is_enabled() -> bool:
        if kind == "torch for CPUs":
            raise AttributeError("module 'torch._C' has no attribute '_cuda_tunableop_is_enabled'")
        return kind != "TunableOp is off"

    def write_file() -> None:
        if kind == "disk is full":
            raise OSError("the disk is full")
        note(path, kind)

    tunable = SimpleNamespace(
        is_enabled=is_enabled, tuning_is_enabled=lambda: kind != "tuning is off"
    )
    if kind != "torch 2.10":
        tunable.write_file = write_file
    available = kind not in ("sees no GPU", "torch for CPUs")
    return SimpleNamespace(cuda=SimpleNamespace(tunable=tunable, is_available=lambda: available))


def note(path: str, what: str) -> None:
    with open(path, "a") as file:
        file.write(f"{what}\n")


class Tuner:
    """A rank of one of the `KINDS`."""

    def __init__(self, kind: str, path: str) -> None:
        if kind == "no torch":
            atexit.register(lambda: note(path, f"torch: {'torch' in sys.modules}"))
        else:
            sys.modules["torch"] = torch(kind, path)  # type: ignore[assignment]

    def pid(self) -> int:
        return os.getpid()


class OfVllm(Tuner):
    """The same for vLLM's factory: `worker_factory(vllm_config, rank)`."""

    def __init__(self, vllm_config: tuple[str, str], rank: int) -> None:
        super().__init__(*vllm_config)
