"""When the keeper wakes: to look at what is open, by its own clock, and no more than that."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from drivers import until
from held_ranks import Held

from rankwise import GroupBroken, WorkerGroup
from rankwise._keeper import Keeper
from rankwise._pump import NEVER
from rankwise.backends.local import LocalEngine

TICK = 0.05


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each look was, of a keeper that looks twenty times a second."""
    seen: list[float] = []
    look = Keeper._look_for_lost

    def noted(keeper: Keeper) -> None:
        seen.append(time.monotonic())
        look(keeper)

    monkeypatch.setattr("rankwise._keeper.TICK", TICK)
    monkeypatch.setattr(Keeper, "_look_for_lost", noted)
    return seen


def engine_of(group: WorkerGroup) -> LocalEngine:
    engine = group._engine
    assert isinstance(engine, LocalEngine)
    return engine


@pytest.mark.parametrize("arena", [True, False], ids=["a tended arena", "nothing"])
def test_an_idle_keeper_sleeps_and_looks_again_at_a_call_that_takes_long(
    looks: list[float], arena: bool
) -> None:
    with WorkerGroup(Held, 2) as group:
        group.call("echo", b"x" * (4 << 20) if arena else None)
        engine = engine_of(group)
        until(lambda: engine.pump.wake_at == NEVER)
        if arena:  # which gives that back later, and is the keeper's next own wake-up
            until(lambda: engine.next_step is not None)
        before = len(looks)
        time.sleep(4 * TICK)
        assert len(looks) <= before + 1  # it may have been about to go to sleep
        before = len(looks)
        group.submit("nap", 60)
        until(lambda: len(looks) >= before + 8, what="it does not look at a call that is open")
        group.kill()


def test_ranks_that_print_do_not_keep_it_from_looking(looks: list[float]) -> None:
    with WorkerGroup(Held, 2) as group:
        before = len(looks)
        future = group.submit("chatter", 60)  # a message every few milliseconds
        until(lambda: len(looks) >= before + 8, what="it looks only where nothing else happens")
        assert not future._call.done
        group.kill()


def test_calls_in_a_row_do_not_wake_it_each() -> None:
    """It stays awake, by its own clock: who finds it asleep for good has to wake it."""
    with WorkerGroup(Held, 2) as group:
        pump = engine_of(group).pump
        until(lambda: pump.wake_at == NEVER)
        group.call("echo", 0)
        until(lambda: pump.wake_at != NEVER)
        began = last = time.monotonic()
        while last < began + 2.5:  # three times as long as it takes to go to sleep
            group.call("echo", 0)
            time.sleep(0.005)  # nothing is open nearly always
            asleep = pump.wake_at == NEVER
            now = time.monotonic()
            assert not asleep or now > last + 0.3, "it went to sleep between two calls"
            last = now


def test_one_that_fails_at_each_look_does_not_try_without_end(
    looks: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with WorkerGroup(Held, 2, on_failure=None) as group:
        pump = engine_of(group).pump
        passes: list[Any] = []
        serve = pump._serve

        def no_memory(events: list[tuple[int, int]]) -> None:
            if threading.current_thread().name.endswith("-io"):
                passes.append(None)
                raise MemoryError
            serve(events)

        monkeypatch.setattr(pump, "_serve", no_memory)
        future = group.submit("nap", 60)
        until(lambda: future._call.done)
        with pytest.raises(GroupBroken, match="MemoryError"):
            future.result(20)
        before = len(passes)
        time.sleep(10 * TICK)
        assert len(passes) <= before + 20, "it tries as fast as it can"
        monkeypatch.undo()
    assert caplog.text.count("the group's own thread failed") == 1
