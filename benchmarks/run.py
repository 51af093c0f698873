"""The benchmark: rankwise beside the machine's floor and the alternatives, in one run.

    python benchmarks/run.py [--only calls payloads rates startup] [--ranks 1 2 4 8] [--rounds 5]
                             [--seconds 0.25] [--out docs/benchmarks]

Prints tables; with --out it writes every row's rounds as JSON, and plots, to that folder.
Each measurement has a process of its own: a peer leaves threads behind, and torch a heap that makes
each of the garbage collector's passes longer for all that comes after it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).parent))

import calls
import memory
import of_torch
import payloads
import rates
import startup

PARTS = ("calls", "payloads", "rates", "startup")


P = ParamSpec("P")
R = TypeVar("R")


def alone(measure: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`measure(...)` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *args, **kwargs).result()


def machine() -> dict[str, object]:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of what is measured beside rankwise, or through it; what is not installed is not there."""
    found = {}
    for name in ("numpy", "torch", "ray", "torchmonarch"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="per subject and round")
    parser.add_argument("--out", type=Path, help="a folder for JSON and plots")
    options = parser.parse_args()
    about = machine()
    described = ", ".join(f"{value} {key}" if key == "cpus" else
                          f"{key} {value}" for key, value in about.items())  # fmt: skip
    beside = versions()
    print(described, "beside " + ", ".join(map(" ".join, beside.items())), sep="\n", flush=True)
    found: dict[str, object] = {"machine": about, "versions": beside}
    called: dict[int, dict[str, list[float]]] = {}
    started: startup.Rows = {}
    swept: tuple[payloads.Sweep, payloads.Sweep] = ({}, {})
    if "calls" in options.only:
        for ranks in options.ranks:
            called[ranks] = alone(calls.measure, ranks, options.rounds, options.seconds)
        found["calls"] = called
        print(calls.table(called))
        print("x: times the floor, median of the ratios within each round\n", flush=True)
    if "payloads" in options.only:
        large = alone(payloads.measure, 4, options.rounds)
        few = alone(payloads.many, options.rounds)
        swept = alone(payloads.sweep, options.rounds)
        found |= {"payloads": large, "5,000 arrays": few}
        found |= {"throughput": swept[0], "memcpy": swept[1]}
        print(payloads.table(large, few, swept, 4), end="\n\n", flush=True)
        found["memory"] = taken = alone(memory.measure, 4, options.rounds)
        print(memory.table(taken, 4), end="\n\n", flush=True)
        laid_out, typed = alone(of_torch.measure, options.rounds)
        found |= {"tensors": laid_out, "types of tensors": typed}
        print(of_torch.table(laid_out, typed), end="\n\n", flush=True)
    if "rates" in options.only:
        found["rates"] = measured = alone(rates.measure, options.rounds)
        print(rates.table(measured), end="\n\n", flush=True)
    if "startup" in options.only:
        found["startup"] = started = alone(startup.measure, options.rounds)
        print(startup.table(started))
    if options.out:
        write(options.out, found, called, swept, started, described)


def write(
    folder: Path,
    found: dict[str, object],
    called: dict[int, dict[str, list[float]]],
    swept: tuple[payloads.Sweep, payloads.Sweep],
    started: startup.Rows,
    described: str,
) -> None:
    import plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    if called:
        plot.plot_calls(called, described, folder)
    if swept[0]:
        plot.plot_sweep(*swept, described, folder)
    if started:
        plot.plot_startup(started, described, folder)


if __name__ == "__main__":  # `alone`, and the workers of some peers, import this file
    main()
