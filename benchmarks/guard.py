"""The guard of the call path: fails where a call has become a thread hop slower.

    python benchmarks/guard.py

A call to one rank is compared with the floor in the same moment, and again, up to seven times,
until one comparison is below LIMIT. A call takes 2.2 to 2.5 times the floor; with a thread between
(`ThreadPoolExecutor(1).submit(group.call, ...).result()`) it took 4.9 to 6.0 in the same moments.
Noise only ever makes a comparison worse, so the best one counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from calls import Echo, measure_floor, timed

from rankwise import WorkerGroup

LIMIT = 4.0  # times the floor
TRIES = 7
SECONDS = 0.3


def main() -> int:
    seen = []
    with WorkerGroup(Echo, 1) as group:
        call = timed(lambda number: group.call(Echo.echo, number))
        call(SECONDS)  # warm up
        for _ in range(TRIES):
            seen.append(call(SECONDS) / measure_floor(1, SECONDS))
            if seen[-1] < LIMIT:
                break
    said = ", ".join(f"{ratio:.1f}" for ratio in seen)
    slow = min(seen) >= LIMIT
    print(f"speed guard: a call takes {said} times the floor ({LIMIT:g} is too slow)")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
