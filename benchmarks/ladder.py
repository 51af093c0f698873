"""The ladder: what each promise of a call costs, on top of the floor, in the least code for it.

    python benchmarks/ladder.py [--ranks 1 2 4 8] [--rounds 5] [--seconds 0.4]

    floor > framed > asleep > shared > struck          (`rungs.py`)
    rankwise: all of these promises, and the others; its ranks forked, as the rungs' are, or spawned

So it says how little a call with these promises could take in Python: the limit that rankwise is to
be held against. Each rung runs in a process of its own, in an order that changes from round to
round; the number of a round is the median of its calls, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from calls import Echo, timed
from rungs import RUNGS

from rankwise import WorkerGroup

OURS = {"rankwise, forked": "forkserver", "rankwise, spawned": "spawn"}


def seconds_a_call(name: str, ranks: int, seconds: float) -> float:
    """The median."""
    if name in RUNGS:
        group = RUNGS[name](ranks)
        call = group.call
    else:
        group = WorkerGroup(Echo, ranks, start_method=OURS[name])

        def call(number: int) -> object:
            return group.call(Echo.echo, number)

    run = timed(call)
    run(seconds / 5)  # warm up
    took = run(seconds)
    group.close()
    return took


def measure(ranks: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each rung, one number a round."""
    names = [*RUNGS, *OURS]
    order = random.Random(ranks)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            command = [sys.executable, __file__, "--one", name, str(ranks), str(seconds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(float(done.stdout))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="per rung and round")
    parser.add_argument("--out", type=Path, help="a folder for ladder.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, ranks, seconds = options.one
        print(seconds_a_call(name, int(ranks), float(seconds)))
        return
    results = {ranks: measure(ranks, options.rounds, options.seconds) for ranks in options.ranks}
    print(f"{'us a call, x the floor':<24}" + "".join(f"{n:>10} ranks" for n in results))
    for name in [*RUNGS, *OURS]:
        cells = []
        for found in results.values():
            pairs = zip(found[name], found["floor"], strict=True)
            ratio = statistics.median(took / floor for took, floor in pairs)
            cells.append(f"{statistics.median(found[name]) * 1e6:>10.1f}{ratio:>6.2f}")
        print(f"{name:<24}" + "".join(cells))
    if options.out:
        (options.out / "ladder.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
