"""Where each microsecond of a call goes, from the driver to a rank and back: one table.

    python benchmarks/call_path.py [--ranks 1 4] [--calls 2000] [--rounds 5]

    serialise > place > send ==> wake > read > deserialise > run > serialise > send ==> wake
    > receive > feed > deserialise > rest

Real calls of a real group, with a stamp at each of these places in both processes (`stamps.py` says
how). So the parts follow one another without a gap, and their sum is a whole call. A group without
stamps is called in turn with it, in the same run; the two differ by what the stamps take, some
0.3 us a pair, and by the noise. The driver rings the ranks' bells once it has sent to all of them:
that is in their wake. Of several ranks it is the path of the one whose answer is received last;
what the driver does for the others meanwhile is in its two wakes.

    polled   calls one after the other: each side polls, and `wake` is a look at a word of memory
    asleep   3 ms between two calls: the rank sleeps in the kernel, the driver polls for the answer

A column is the mean of the calls in the middle half by their length, of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from calls import Echo
from stamps import (
    A_CALL,
    ENCODE,
    ENCODED,
    LOADED,
    LOADS,
    RAN,
    READ,
    RECV,
    RUN,
    SEND,
    SENT,
    Driver,
    Stamped,
    now,
)

from rankwise import WorkerGroup

PAUSE = 0.003
DRIVER, RANK = "driver", "rank"
# In the order of a call; who does it, and what it is.
PARTS = (
    (DRIVER, "resolve the method, serialise the arguments"),
    (DRIVER, "make the call, place it, write the frame"),
    (DRIVER, "send, to it and to those before it (a system call each)"),
    (RANK, "wake: until it looks at its socket"),
    (RANK, "read (a system call)"),
    (RANK, "deserialise"),
    (RANK, "run the method"),
    (RANK, "serialise the answer"),
    (RANK, "send (a system call)"),
    (RANK, "its loop, between these"),
    (DRIVER, "wake: until it looks at that socket"),
    (DRIVER, "receive (a system call)"),
    (DRIVER, "feed the ledger, hand on the lead"),
    (DRIVER, "deserialise, and shape the result"),
    (DRIVER, "rest: return to the caller"),
)


def calls(
    group: WorkerGroup, method: Callable[..., object], number: int, pause: float
) -> list[int]:
    """When each of `number` calls began and ended."""
    call = group.call
    times = []
    for value in range(number):
        if pause:
            time.sleep(pause)
        times.append(now())
        call(method, value)
        times.append(now())
    return times


def spans(group: WorkerGroup, driver: Driver, number: int, pause: float) -> list[list[int]]:
    """The parts of each of `number` calls, in nanoseconds."""
    group.call(Stamped.clear)
    with driver:
        driver.clear()
        times = calls(group, Stamped.echo, number, pause)
    stamps: list[list[int]] = group.call(Stamped.fetch, number)
    ranks = len(group)
    found = []
    rank_of = {channel.sock: channel.rank for channel in group._engine.pump.sockets.channels}
    assert len(driver.sent) == 2 * ranks * number and len(driver.received) == 3 * ranks * number
    for at in range(number):
        began, ended = times[2 * at : 2 * at + 2]
        _, encoded = driver.encoded[2 * at : 2 * at + 2]
        sent = driver.sent[2 * ranks * at : 2 * ranks * (at + 1)]
        last = 3 * ranks * (at + 1)
        sock, before, after = driver.received[last - 3 : last]
        taking, taken = driver.taken[2 * at : 2 * at + 2]
        rank = rank_of[sock]
        mine = stamps[rank][A_CALL * at : A_CALL * (at + 1)]
        gone = sent[2 * rank + 1]
        parts = [
            encoded - began,
            sent[0] - encoded,
            gone - sent[0],
            mine[RECV] - gone,
            mine[READ] - mine[RECV],
            mine[LOADED] - mine[LOADS],
            mine[RAN] - mine[RUN],
            mine[ENCODED] - mine[ENCODE],
            mine[SENT] - mine[SEND],
            mine[LOADS] - mine[READ] + mine[RUN] - mine[LOADED]
            + mine[ENCODE] - mine[RAN] + mine[SEND] - mine[ENCODED],
            before - mine[SENT],
            after - before,
            taking - after,
            taken - taking,
            ended - taken,
        ]  # fmt: skip
        assert sum(parts) == ended - began
        found.append(parts)
    return found


def middle(values: list[list[int]]) -> list[float]:
    """The mean of each part, in microseconds, of the middle half by their sum."""
    by_length = sorted(values, key=sum)
    half = by_length[len(values) // 4 : -len(values) // 4]
    return [statistics.fmean(part) / 1e3 for part in zip(*half, strict=True)]


def measure(ranks: int, number: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """For each way to call: the parts of a stamped call, and a plain one; microseconds."""
    found: dict[str, tuple[list[list[int]], list[list[int]]]] = {}
    with WorkerGroup(Stamped, ranks) as group, WorkerGroup(Echo, ranks) as plain:
        for turn in range(rounds):
            for way, pause in (("polled", 0.0), ("asleep", PAUSE)):
                each = number if not pause else number // 10
                parts, whole = found.setdefault(way, ([], []))
                for stamped in (turn % 2 == 0, turn % 2 == 1):
                    for warm_up in (each // 5, 0):
                        if stamped:
                            newest = spans(group, Driver(), warm_up or each, pause)
                        else:
                            took = calls(plain, Echo.echo, warm_up or each, pause)
                parts += newest
                whole += [[end - begin] for begin, end in zip(took[::2], took[1::2], strict=True)]
    return {way: (middle(parts), middle(whole)[0]) for way, (parts, whole) in found.items()}


def table(columns: dict[str, tuple[list[float], float]]) -> str:
    lines = [f"| us | | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    rows = [(who, what, [parts[at] for parts, _ in columns.values()])
            for at, (who, what) in enumerate(PARTS)]  # fmt: skip
    rows.append(("", "**their sum**", [sum(parts) for parts, _ in columns.values()]))
    rows.append(("", "a call without stamps", [whole for _, whole in columns.values()]))
    for who, what, values in rows:
        lines.append(f"| {who} | {what} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--calls", type=int, default=2000, help="a round; asleep: a tenth of them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    columns = {}
    for ranks in options.ranks:
        for way, column in measure(ranks, options.calls, options.rounds).items():
            columns[f"{ranks} rank{'s' if ranks > 1 else ''}, {way}"] = column
    print(table(columns))


if __name__ == "__main__":
    main()
