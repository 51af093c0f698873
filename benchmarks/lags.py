"""How late callbacks and an asyncio loop are while a rank is called 20,000 times a second.

    callback    of calls that the main thread submits; one in twenty has one, or every one. Late:
                from the moment at which the method returns in the rank, by a clock that all
                processes share, to the first line of the callback, on the callback thread
    loop        a task of the loop is to run every 2 ms, by a fixed schedule (a stall of 100 ms is
                fifty that are late). Late: how long after its time. Alone in its loop; while
                another task of it awaits the calls; while another thread makes them by `call`

Calls come on a schedule, and who is behind it does not sleep: the row says how many a second were
made, fewer than 20,000 where this machine makes no more. A selector's timeouts are whole
milliseconds, rounded up, so a loop with nothing to do is late too: that row stands beside.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable

from figures import share

from rankwise import WorkerGroup

RATE = 20_000
BEAT = 2e-3
NAP = 1e-3  # who is ahead of the schedule sleeps so long: calls come some twenty at a time

clock = time.monotonic

Round = tuple[int, float, list[float]]  # calls made, in so many seconds; lags, in seconds


class Teller:
    def now(self) -> float:
        return clock()


def due(began: float) -> int:
    """How many calls the schedule has had since."""
    return int((clock() - began) * RATE)


def callbacks(group: WorkerGroup, length: float, every: int) -> Round:
    lags: list[float] = []
    ended = threading.Event()

    def called(future: object) -> None:
        now = clock()
        lags.append(now - future.result()[0])  # type: ignore[attr-defined]

    began = clock()
    made = 0
    while clock() < began + length:
        if made < due(began):
            future = group.submit(Teller.now)
            if made % every == 0:
                future.add_done_callback(called)
            made += 1
        else:
            time.sleep(NAP)
    # Callbacks run in the order of the calls, all on one thread.
    group.submit(Teller.now).add_done_callback(lambda future: ended.set())
    ended.wait()
    return made, clock() - began, lags


async def heartbeat(end: float) -> list[float]:
    lags = []
    beat = clock()
    while beat < end:
        beat += BEAT
        if (ahead := beat - clock()) > 0.0:
            await asyncio.sleep(ahead)
        lags.append(clock() - beat)
    return lags


async def awaits(group: WorkerGroup, began: float, end: float) -> int:
    made = 0
    while clock() < end:
        if made < due(began):
            await group.submit(Teller.now)
            made += 1
        else:
            await asyncio.sleep(NAP)
    return made


def calls(group: WorkerGroup, began: float, end: float) -> int:
    made = 0
    while clock() < end:
        if made < due(began):
            group.call(Teller.now)
            made += 1
        else:
            time.sleep(NAP)
    return made


def loop(load: Callable[[float, float], Awaitable[int]], length: float) -> Round:
    """A heartbeat in a loop, beside `load(began, end)`, which says how many calls it made."""

    async def main() -> Round:
        began = clock()
        end = began + length
        beat = asyncio.create_task(heartbeat(end))
        made = await load(began, end)
        return made, clock() - began, await beat

    return asyncio.run(main())


def measure(rounds: int, length: float = 0.8) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with WorkerGroup(Teller, 1) as group:

        async def alone(began: float, end: float) -> int:
            return 0

        def by_thread(began: float, end: float) -> Awaitable[int]:
            return asyncio.to_thread(calls, group, began, end)

        def by_awaits(began: float, end: float) -> Awaitable[int]:
            return awaits(group, began, end)

        subjects: dict[str, Callable[[], Round]] = {
            "callback's lag, one call in 20": lambda: callbacks(group, length, 20),
            "callback's lag, every call": lambda: callbacks(group, length, 1),
            "loop's lag, calls by awaits": lambda: loop(by_awaits, length),
            "loop's lag, calls by a thread": lambda: loop(by_thread, length),
            "loop's lag, no calls": lambda: loop(alone, length),
        }
        for turn in range(rounds + 1):
            for name, once in subjects.items():
                made, seconds, lags = once()
                if not turn:
                    continue  # it warms up
                numbers = {
                    "p50, us": statistics.median(lags) * 1e6,
                    "p99, us": share(lags, 0.99) * 1e6,
                    "worst, us": max(lags) * 1e6,
                }
                if made:
                    numbers["calls a second"] = made / seconds
                for what, number in numbers.items():
                    found.setdefault(f"{name}: {what}", []).append(number)
    return found
