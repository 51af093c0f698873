"""When the keeper wakes: to look at what is open, by its own clock, and no more than that."""

from __future__ import annotations

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
        future = group.submit("nap", 20 * TICK)
        until(lambda: len(looks) >= before + 8, what="it does not look at a call that is open")
        future.result()


def test_ranks_that_print_do_not_keep_it_from_looking(looks: list[float]) -> None:
    with WorkerGroup(Held, 2) as group:
        before = len(looks)
        future = group.submit("chatter", 30 * TICK)  # a message every few milliseconds
        until(lambda: len(looks) >= before + 8, what="it looks only where nothing else happens")
        assert not future._call.done
        future.result()


def test_calls_in_a_row_do_not_wake_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerGroup(Held, 2) as group:
        pump = engine_of(group).pump
        until(lambda: pump.wake_at == NEVER)
        kicks: list[None] = []
        kick = pump.kick

        def counted() -> None:
            kicks.append(None)
            kick()

        monkeypatch.setattr(pump, "kick", counted)
        began = time.monotonic()
        calls = 0
        while time.monotonic() < began + 1.5:  # longer than it takes to go idle
            group.call("echo", calls)
            calls += 1
            time.sleep(0.005)  # nothing is open nearly always
        assert len(kicks) <= 3 < calls
        monkeypatch.undo()


def test_one_that_fails_at_each_look_does_not_try_without_end(
    looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerGroup(Held, 2, on_failure=None) as group:
        pump = engine_of(group).pump
        passes: list[Any] = []

        def no_memory() -> bool:
            passes.append(None)
            raise MemoryError

        monkeypatch.setattr(pump, "lead_once", no_memory)
        future = group.submit("nap", 60)
        with pytest.raises(GroupBroken, match="MemoryError"):
            future.result(20)
        before = len(passes)
        time.sleep(10 * TICK)
        assert len(passes) <= before + 20, "it tries as fast as it can"
        monkeypatch.undo()
