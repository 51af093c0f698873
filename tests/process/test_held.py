"""A future that is the only open call is held: the keeper is not armed for it until somebody looks.

Whatever a holder does, he hears of the answer as soon as he would without that; who does nothing
hears of a failure at the keeper's next look.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from held_ranks import Held

from rankwise import CallTimeout, GroupFuture, WorkerDied, WorkerGroup
from rankwise._pump import NEVER
from rankwise.backends.local import LocalEngine

SOON = 0.3  # seconds; the keeper's look is 0.4 away at first


@pytest.fixture
def group() -> Any:
    with WorkerGroup(Held, 2) as group:
        yield group


def lead_of(group: WorkerGroup) -> Any:
    engine = group._engine
    assert isinstance(engine, LocalEngine)
    return engine.pump.lead


def held(group: WorkerGroup, *args: object, method: str = "echo") -> GroupFuture[Any]:
    """A future that is held, its call submitted just after a look of the keeper's."""
    lead = lead_of(group)
    for _ in range(50):
        group.call("echo", 0)  # the keeper is awake, and looks in time
        keeper = group._engine.keeper  # type: ignore[attr-defined]
        look = keeper._next_look
        while keeper._next_look == look:
            time.sleep(0.002)
        future: GroupFuture[Any] = group.submit(method, *args)
        if lead.held is future._call:
            return future
        future.result(30)
    raise AssertionError("no future was held")


def polled(future: GroupFuture[Any], look: Callable[[GroupFuture[Any]], object]) -> float:
    """How long it took until `look` said yes, seconds."""
    began = time.monotonic()
    while not look(future):
        assert time.monotonic() < began + 20, "never"
        time.sleep(0.001)
    return time.monotonic() - began


LOOKS: dict[str, Callable[[GroupFuture[Any]], object]] = {
    "done": lambda future: future.done(),
    "running": lambda future: not future.running(),
    "repr": lambda future: "finished" in repr(future),
    "wait": lambda future: concurrent.futures.wait([future], timeout=0).done,
    "result": lambda future: _result_now(future),
}


def _result_now(future: GroupFuture[Any]) -> bool:
    with suppress(CallTimeout):
        future.result(0)
        return True
    return False


def soon(once: Callable[[], float]) -> bool:
    """Whether `once`, which says how long it took, was quick, if need be at the fourth try: another
    program may have the processors for a while."""
    return any(once() < SOON for _ in range(4))


@pytest.mark.parametrize("name", LOOKS)
def test_who_polls_hears_at_once(group: WorkerGroup, name: str) -> None:
    assert soon(lambda: polled(held(group, 0.05, method="nap"), LOOKS[name]))
    assert lead_of(group).held is None


def test_a_callback_comes_at_once(group: WorkerGroup) -> None:
    def once() -> float:
        future = held(group)
        told: concurrent.futures.Future[float] = concurrent.futures.Future()
        began = time.monotonic()
        future.add_done_callback(lambda _: told.set_result(time.monotonic()))
        return told.result(20) - began

    assert soon(once)


def test_as_completed_and_wait_return_at_once(group: WorkerGroup) -> None:
    def once() -> float:
        future = held(group)
        began = time.monotonic()
        assert list(concurrent.futures.as_completed([future], timeout=20)) == [future]
        took = time.monotonic() - began
        future = held(group)
        began = time.monotonic()
        assert concurrent.futures.wait([future], timeout=20).done == {future}
        return max(took, time.monotonic() - began)

    assert soon(once)


def test_a_waiter_takes_it_over(group: WorkerGroup) -> None:
    future = held(group, 7)
    assert future.result(20) == [7, 7]
    assert lead_of(group).held is None


def test_who_gives_up_waiting_leaves_it_to_the_keeper(group: WorkerGroup) -> None:
    future = held(group, 1.0, method="nap")
    with pytest.raises(CallTimeout):
        future.result(0.001)
    lead = lead_of(group)
    assert lead.held is None
    assert lead.armed or future.done()
    assert future.result(20) == [None, None]


def test_another_call_has_the_keeper_armed(group: WorkerGroup) -> None:
    first = held(group, 1.0, method="nap")
    second: GroupFuture[Any] = group.submit("echo", 2)
    lead = lead_of(group)
    assert lead.held is None
    assert lead.armed or second.done()
    assert second.result(20) == [2, 2]
    assert first.done()


def test_a_call_beside_it_hears_of_it_too(group: WorkerGroup) -> None:
    first = held(group, 1)
    assert group.call("echo", 2) == [2, 2]
    assert first._call.done  # it came before


def test_an_awaited_one_is_the_loops(group: WorkerGroup) -> None:
    async def awaited() -> object:
        return await held(group, 3)

    assert asyncio.run(awaited()) == [3, 3]
    assert lead_of(group).held is None


def test_nobody_need_look_for_a_failure_to_be_logged(
    group: WorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="rankwise"):
        future = held(group, method="fail")
        del future
        until = time.monotonic() + 20
        while "fail as told" not in caplog.text:
            assert time.monotonic() < until
            gc.collect()
            time.sleep(0.01)


def test_a_value_is_not_kept_by_having_been_held(group: WorkerGroup) -> None:
    call = held(group)._call
    began = time.monotonic()
    while lead_of(group).held is call:
        assert time.monotonic() < began + 20
        time.sleep(0.01)


def test_a_keeper_that_sleeps_until_the_arena_is_tended_looks_all_the_same(
    group: WorkerGroup,
) -> None:
    group.call("echo", b"x" * (4 << 20))  # through the arena, which gives that back later
    engine = group._engine
    assert isinstance(engine, LocalEngine)
    began = time.monotonic()
    while engine.pump.wake_at != NEVER or engine.next_step is None:
        assert time.monotonic() < began + 20
        time.sleep(0.05)
    assert engine.next_step > time.monotonic() + 10  # the keeper's next own wake-up
    call = group.submit("echo", 1)._call
    began = time.monotonic()
    while not call.done:  # nobody looks
        assert time.monotonic() < began + 5
        time.sleep(0.01)


def test_ranks_that_print_do_not_keep_the_keeper_from_looking(group: WorkerGroup) -> None:
    future = held(group, 1.5, method="chatter")
    lead = lead_of(group)
    began = time.monotonic()
    while lead.held is not None:
        assert time.monotonic() < began + 20
        time.sleep(0.01)
    assert not future._call.done, "it was looked at only once the chatter had ended"
    assert future.result(20) == [None, None]


def test_a_large_answer_without_an_arena_comes_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.backends.launching.make_room", lambda *args: False)
    with WorkerGroup(Held, 1) as group:
        future = held(group, 8 << 20, method="text")
        # By what a socket holds, a look: it would take a minute.
        assert polled(future, lambda future: future._call.done) < 10
        [text] = future.result(0)
        assert len(text) == 8 << 20


def test_a_death_is_told_to_whoever_holds_it() -> None:
    with WorkerGroup(Held, 2, on_failure=None) as group:
        future = held(group, 60.0, method="nap")
        pid = group.pids[1]
        os.kill(pid, 9)
        began = time.monotonic()
        while not future._call.done:
            assert time.monotonic() < began + 20
            time.sleep(0.001)
        with pytest.raises(WorkerDied, match="rank 1"):
            future.result(0)


def test_looking_at_one_in_a_step_of_ours_changes_nothing_there(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    engine = group._engine
    assert isinstance(engine, LocalEngine)
    with engine.pump.lock:  # as a handler finds it that has interrupted one
        assert not future.done()
        assert "running" in repr(future)
        assert lead_of(group).held is future._call
    polled(future, lambda future: future._call.done)
    assert lead_of(group).held is None
