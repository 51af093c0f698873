"""A future that is the only open call may be held: nothing is armed for it until somebody looks.

Whatever a holder does, he hears of the answer as soon as he would without that; who does nothing
hears of it when the keeper wakes, `HOLD` later at most. Most tests here have it sleep for longer
than they wait (`unhurried`): whoever hears all the same was not left to it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from drivers import Script, until
from held_ranks import Held

from rankwise import CallTimeout, GroupClosed, GroupFuture, WorkerDied, WorkerGroup
from rankwise._calls import Call
from rankwise._deadline import clock
from rankwise._pump import HOLD, NEVER, Pump
from rankwise._spin import Spin
from rankwise.backends.local import LocalEngine

PATIENCE = 15.0  # seconds; the keeper of `unhurried` sleeps for longer
LONG = 60.0


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper looks at the clock once a minute, and not even for what is held."""
    monkeypatch.setattr("rankwise._keeper.TICK", LONG)
    monkeypatch.setattr("rankwise._keeper.HOLD", LONG)
    monkeypatch.setattr("rankwise._pump.HOLD", LONG)


@pytest.fixture
def group(unhurried: None) -> Any:
    with WorkerGroup(Held, 2, on_failure=None) as group:
        yield group


def engine_of(group: WorkerGroup) -> LocalEngine:
    engine = group._engine
    assert isinstance(engine, LocalEngine)
    return engine


def lead_of(group: WorkerGroup) -> Any:
    return engine_of(group).pump.lead


@contextmanager
def soon() -> Iterator[None]:
    """What is inside does not wait for the keeper to look at the clock."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PATIENCE


def held(group: WorkerGroup, *args: object, method: str = "echo") -> GroupFuture[Any]:
    """A future that is held."""
    engine = engine_of(group)
    until(lambda: engine.next_step is None, what="the keeper looks at the start")
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE:
        first = group.submit("echo")
        if engine.pump.lead.held is first._call:
            first.result(PATIENCE)
            future: GroupFuture[Any] = group.submit(method, *args)
            if engine.pump.lead.held is future._call:
                return future
            future.exception(PATIENCE)
        first.result(PATIENCE)
        engine.pump.kick()  # its keeper is asleep for long: from now on it wakes for what is held
        time.sleep(HOLD / 4)
    raise AssertionError("no future was held")


# -- whoever looks --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", LOOKS)
def test_who_polls_hears_at_once(group: WorkerGroup, name: str) -> None:
    future = held(group, 0.05, method="nap")
    until(lambda: LOOKS[name](future))
    assert lead_of(group).held is None


def test_a_callback_comes_at_once(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    told: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.add_done_callback(lambda _: told.set_result(None))
    told.result(PATIENCE)


def test_a_callback_does_not_wake_the_keeper(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = held(group, 0.05, method="nap")
    pump = engine_of(group).pump
    kicks: list[int] = []
    monkeypatch.setattr(pump, "kick", lambda: kicks.append(1))
    future.add_done_callback(lambda _: None)
    assert lead_of(group).armed or future._call.done
    assert not kicks
    monkeypatch.undo()


def test_as_completed_returns_at_once(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    with soon():
        assert list(concurrent.futures.as_completed([future], timeout=LONG)) == [future]


def test_wait_returns_at_once(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    with soon():
        assert concurrent.futures.wait([future], timeout=LONG).done == {future}


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


def test_a_flush_hears_of_it(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    with soon():
        group.flush(LONG)
    assert future._call.done


def test_looking_at_one_in_a_step_of_ours_changes_nothing_there(group: WorkerGroup) -> None:
    future = held(group, 0.05, method="nap")
    with engine_of(group).pump.lock:  # as a handler finds it that has interrupted one
        assert not future.done()
        assert "running" in repr(future)
        assert lead_of(group).held is future._call
    until(lambda: future._call.done)
    assert lead_of(group).held is None


# -- what ends it ---------------------------------------------------------------------------------


def test_a_death_is_told_to_whoever_holds_it(group: WorkerGroup) -> None:
    future = held(group, LONG, method="nap")
    os.kill(group.pids[1], 9)
    until(lambda: future._call.done)
    with pytest.raises(WorkerDied, match="rank 1"):
        future.result(0)


def test_a_close_waits_for_it(unhurried: None) -> None:
    group = WorkerGroup(Held, 2)
    future = held(group, 0.2, method="nap")
    with soon():
        group.close(LONG)
    assert future.result(0) == [None, None]


def test_a_kill_settles_it(unhurried: None) -> None:
    group = WorkerGroup(Held, 2)
    future = held(group, LONG, method="nap")
    with soon():
        group.kill()
    with pytest.raises(GroupClosed):
        future.result(0)


class Strike(Exception):
    """As a signal handler raises it."""


def replace(lead: Any, name: str, instead: Callable[..., None]) -> None:
    """Have `lead` call `instead` as its method `name`: an object with slots takes no attribute."""
    members = {"__slots__": (), name: staticmethod(instead)}
    lead.__class__ = type("Struck", (type(lead),), members)


def test_a_strike_as_a_callback_is_added_leaves_it_to_the_keeper(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = held(group, 0.2, method="nap")
    lead = lead_of(group)
    arm = lead._arm_keeper
    strikes = [1]

    def struck(armed: bool) -> None:
        if strikes:
            strikes.pop()
            raise Strike  # before the `epoll.modify`, with `held` forgotten
        arm(armed)

    lead._arm_keeper = struck
    with pytest.raises(Strike):
        future.add_done_callback(lambda _: None)
    until(lambda: future._call.done)


def test_a_strike_as_an_await_parks_leaves_it_to_the_keeper(unhurried: None) -> None:
    with WorkerGroup(Held, 2, spin=0) as group:

        async def awaited() -> GroupFuture[Any]:
            future = held(group, 0.2, method="nap")
            lead = lead_of(group)
            port = engine_of(group).pump.port(asyncio.get_running_loop())
            led_by_loop, led = lead.led_by_loop, [0]

            def struck(call: Call, loops: bool) -> None:
                led[0] += 1
                if led[0] == 2:
                    call.led = loops
                    raise Strike  # between the two stores, as it parks
                led_by_loop(call, loops)

            replace(lead, "led_by_loop", struck)
            with pytest.raises(Strike):
                await future
            assert led[0] == 3
            assert not port._waiting
            return future

        future = asyncio.run(awaited())
        assert not future._call.led
        until(lambda: future._call.done)


def test_a_strike_as_a_cancelled_await_leaves_it_is_mended(unhurried: None) -> None:
    with WorkerGroup(Held, 2, spin=0) as group:

        async def awaited() -> GroupFuture[Any]:
            future = held(group, 0.3, method="nap")
            lead = lead_of(group)
            rearm, strikes = lead.rearm, [1]

            def struck() -> None:
                if strikes and not future._call.led:
                    strikes.pop()
                    raise Strike  # no loop leads for it any more, and the keeper is not armed
                rearm()

            replace(lead, "rearm", struck)
            task = asyncio.ensure_future(_awaiting(future))
            await asyncio.sleep(0.02)
            assert future._call.led
            task.cancel()
            with pytest.raises(Strike):
                await task
            assert not strikes
            return future

        future = asyncio.run(awaited())
        until(lambda: future._call.done)


async def _awaiting(future: GroupFuture[Any]) -> None:
    await future


def test_a_forked_child_may_look_at_it() -> None:
    code = """
    import rankwise._keeper, rankwise._pump
    rankwise._keeper.TICK = rankwise._keeper.HOLD = rankwise._pump.HOLD = 60.0
    from held_ranks import Held
    with WorkerGroup(Held, 2) as group:
        lead = group._engine.pump.lead
        while group._engine.next_step is not None: time.sleep(0.01)  # it looks at the start
        future = group.submit("nap", 0.3)
        child = os.fork()
        if not child:
            os._exit(0 if not future.done() and "running" in repr(future) else 1)
        _, status = os.waitpid(child, 0)
        say(status=status, held=lead.held is future._call, value=future.result(15))
    """
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    with Script(code, env={**os.environ, "PYTHONPATH": paths}) as script:
        assert script.line() == {"status": 0, "held": True, "value": [None, None]}
        assert script.end() == 0


# -- nobody looks ---------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group whose keeper looks around once a minute, but wakes in time for what is held."""
    monkeypatch.setattr("rankwise._keeper.TICK", LONG)
    with WorkerGroup(Held, 2) as group:
        yield group


@pytest.mark.parametrize("ahead", [HOLD / 2, 10.0, NEVER])
def test_a_call_is_held_only_where_the_keeper_will_wake_before_long(ahead: float) -> None:
    ours, theirs = socket.socketpair()
    pump = Pump([ours], Spin(0.0, learns=False))
    pump.wake_at = clock() + ahead
    call = Call("m", b"", (0,))
    call.future = object()
    assert pump.submit((call,)) is None
    assert pump.would_hold  # it will look more often
    assert (pump.lead.held is call) is (ahead < HOLD)
    assert pump.lead.armed is not (pump.lead.held is call)
    pump.close()
    theirs.close()


def test_a_keeper_that_is_in_no_hurry_otherwise_wakes_for_what_is_held(quiet: WorkerGroup) -> None:
    call = held(quiet, 0.1, method="nap")._call
    until(lambda: lead_of(quiet).held is not call)
    until(lambda: call.done)


def test_a_first_failure_settles_it_though_nobody_looks(quiet: WorkerGroup) -> None:
    call = held(quiet, 0, method="fail_or_nap")._call
    until(lambda: call.done)
    assert not call.ended, "it waited for the rank that naps"
    quiet.kill()


def test_a_failure_of_one_at_which_nobody_looks_is_logged(
    quiet: WorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="rankwise"):
        future = held(quiet, method="fail")
        del future
        gc.collect()
        until(lambda: "fail as told" in caplog.text)


def test_a_large_answer_without_an_arena_comes_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.backends.launching.make_room", lambda *args: False)
    with WorkerGroup(Held, 1) as group:
        future = held(group, 8 << 20, method="text")
        # One socketful a look would take seconds.
        until(lambda: future._call.done)
        [text] = future.result(0)
        assert len(text) == 8 << 20
