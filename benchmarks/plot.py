"""The plots of the benchmark, as PNG and SVG: shapes and labels as well as colours, log scales."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which is told apart with any kind of colour vision.
COLORS = (
    "#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#999999",
    "#F0E442",
)  # fmt: skip
MARKERS = "so^vDPX*h"

# In the table alone: as many lines as there are colours are as many as can be told apart.
NOT_DRAWN = ("floor, spawned ranks", "drop-in", "submit, forked ranks", "await, forked ranks")


def plot_calls(results: dict[int, dict[str, list[float]]], machine: str, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    sizes = list(results)
    drawn = [name for name in next(iter(results.values())) if name not in NOT_DRAWN]
    for index, name in enumerate(drawn):
        us = [statistics.median(found[name]) * 1e6 for found in results.values()]
        axes.plot(sizes, us, color=COLORS[index], marker=MARKERS[index], label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="ranks", ylabel="microseconds a call (median)",
        title=f"One call to all ranks, and all answers\n{machine}",
    )  # fmt: skip
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, folder / "calls")


def plot_sweep(
    swept: dict[int, list[float]], copied: dict[int, list[float]], machine: str, folder: Path
) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    rates = [statistics.median(values) / 1e9 for values in swept.values()]
    axes.plot(list(swept), rates, color=COLORS[1], marker="o", label="call")
    copies = [statistics.median(values) / 1e9 for values in copied.values()]
    axes.plot(list(copied), copies, color=COLORS[0], marker="s", linestyle="--", label="memcpy")
    axes.legend(fontsize=8)
    axes.set(
        xscale="log", yscale="log", xlabel="bytes in one array", ylabel="GB a second to one rank",
        title=f"Throughput of arguments\n{machine}",
    )  # fmt: skip
    axes.grid(True, alpha=0.3)
    _save(figure, folder / "throughput")


def plot_startup(rows: dict[str, dict[str, list[float]]], machine: str, folder: Path) -> None:
    """A bar a row with its least and greatest, and a mark for what stands beside it."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for place, found in enumerate(reversed(rows.values())):
        ms = sorted(value * 1e3 for value in found["took"])
        middle = statistics.median(ms)
        axes.barh(place, middle, color=COLORS[2], height=0.6)
        axes.plot([ms[0], ms[-1]], [place, place], color=COLORS[0], linewidth=1)
        if "beside" in found:
            beside = statistics.median(found["beside"]) * 1e3
            axes.plot([beside], [place], color=COLORS[4], marker="D", linestyle="none")
    axes.set(
        xscale="log", xlabel="ms (median; line: least to most; diamond: bare interpreters)",
        title=f"Starting\n{machine}",
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.grid(True, axis="x", alpha=0.3)
    _save(figure, folder / "startup")


def _save(figure: plt.Figure, path: Path) -> None:
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)
    plt.close(figure)
