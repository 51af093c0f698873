"""The ways in which a caller waits for a call of `Faulty`, and all of them at once."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from faulty import Faulty

SOON = 5.0  # seconds; a hang is minutes. Medians are the benchmark's business, not the tests'.


def by_call(group: Any, *args: object, method: Any = Faulty.work) -> Any:
    return group.call(method, *args)


def by_result(group: Any, *args: object, method: Any = Faulty.work) -> Any:
    return group.submit(method, *args).result()


def by_callback(group: Any, *args: object, method: Any = Faulty.work) -> Any:
    done: queue.SimpleQueue = queue.SimpleQueue()
    group.submit(method, *args).add_done_callback(done.put)
    return done.get(timeout=SOON).result()


def by_await(group: Any, *args: object, method: Any = Faulty.work) -> Any:
    async def main() -> Any:
        return await group.submit(method, *args)

    return asyncio.run(main())


def by_each(group: Any, *args: object, method: Any = Faulty.work) -> Any:
    futures = group.submit_each(method, *args)
    return [future.result() for future in reversed(futures)][::-1]


ALL = (by_call, by_result, by_callback, by_await, by_each)
NAMES = ", ".join(waiter.__name__.removeprefix("by_") for waiter in ALL)

waiters = pytest.mark.parametrize("waiter", ALL, ids=lambda waiter: waiter.__name__)


class Everybody:
    """All waiters at once, each in a thread of its own: `errors()` is what they got."""

    def __init__(self, group: Any, *args: object) -> None:
        self._errors: dict[str, BaseException | None] = {}
        self._threads = [
            threading.Thread(target=self._wait, args=(waiter, group, *args), daemon=True)
            for waiter in ALL
        ]
        for thread in self._threads:
            thread.start()

    def _wait(self, waiter: Callable[..., Any], group: Any, *args: object) -> None:
        try:
            waiter(group, *args)
        except BaseException as error:
            self._errors[waiter.__name__] = error
        else:
            self._errors[waiter.__name__] = None

    def errors(self) -> dict[str, BaseException | None]:
        for thread in self._threads:
            thread.join(SOON)
            assert not thread.is_alive(), "somebody waits still"
        assert set(self._errors) == {waiter.__name__ for waiter in ALL}
        return self._errors
